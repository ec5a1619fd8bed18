#!/usr/bin/env bash
# Installs the copied checkout with the TPU build of JAX in ~/e1jax/.venv on every worker
# and, if BUCKET is set, mounts that bucket at /mnt/e1jax. Commands read and write gs://
# without a mount.
#
#   PROJECT=my-project ZONE=us-central1-a TPU_NAME=e1 BUCKET=my-bucket \
#       tpu_scripts/install.sh [--dry-run]
#
# Inputs: PROJECT, ZONE, TPU_NAME, and if you like BUCKET: the name of a bucket with a
#   hierarchical namespace, near the zone. docs/tpu.md says how to make one, and why no other
#   kind can be mounted. Run it again after a restart of the VMs, which ends the mount.
# Hardware: any TPU VM with a way to the internet. The images of Cloud TPU VMs bring Python
#   3.10; uv brings 3.12.
# Duration: a few minutes. Cost: that of the TPU meanwhile.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
refuse_flags "$@"

on_worker all 'set -eu
cd e1jax
python3 -m pip install --user --quiet --upgrade uv
python3 -m uv venv --allow-existing --python 3.12 .venv
python3 -m uv pip install --python .venv/bin/python -e ".[tpu,serve,gcs]"
JAX_PLATFORMS=cpu .venv/bin/python -c "import libtpu, e1jax.train"'

if [[ -n ${BUCKET-} ]]; then
  check BUCKET '[a-z0-9][-a-z0-9_.]{1,61}[a-z0-9]' 'the name of a bucket, without gs://'
  # Nothing that a host remembers of the bucket is trusted, because the others write to it
  # too. A checkpoint gets its name by renaming a directory: tried at once.
  # shellcheck disable=SC2016 # the rest is expanded on the workers
  on_worker all "set -eu
bucket=$BUCKET
"'if ! mountpoint -q /mnt/e1jax; then
  if ! command -v gcsfuse > /dev/null; then
    key=/usr/share/keyrings/cloud.google.asc
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee $key > /dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list
    sudo apt-get update -q
    sudo apt-get install -qy gcsfuse
  fi
  sudo mkdir -p /mnt/e1jax
  sudo chown "$(id -un)" /mnt/e1jax
  gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$bucket" /mnt/e1jax
fi
probe=/mnt/e1jax/.probe-$(hostname)
rm -rf "$probe"
mkdir -p "$probe/old"
touch "$probe/old/file"
if ! mv "$probe/old" "$probe/new"; then
  echo "error: $bucket cannot rename directories; it needs a hierarchical namespace" >&2
  exit 1
fi
rm -r "$probe"'
fi
