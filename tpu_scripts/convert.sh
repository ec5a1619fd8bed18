#!/usr/bin/env bash
# Runs `python -m e1jax.convert` on the first worker: Hugging Face weights to an e1jax
# checkpoint, and a trained run back. The arguments are those of that command.
#
#   PROJECT=my-project ZONE=us-central1-a TPU_NAME=e1 tpu_scripts/convert.sh [--dry-run] \
#       from-hf Skywork/Skywork-OR1-Math-7B gs://my-bucket/models/skywork-or1-math-7b
#
# Inputs: PROJECT, ZONE, TPU_NAME. After --, --help and --dry-run are passed on as well.
#   Models may be gs://BUCKET/PATH; a bucket that install.sh mounted is at /mnt/e1jax too.
# Hardware: any TPU VM; only its processor and network are used. The download takes as
#   much of the VM's own disk as the model has bytes (15 GB for 7B), memory somewhat less.
# Duration: that of moving those bytes from the hub and to the bucket, mostly.
# Cost: that of the TPU meanwhile, so use a small one, and the bytes kept in the bucket.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# No TPU: of a slice with several hosts, one alone would wait for the others.
on_worker 0 "export JAX_PLATFORMS=cpu; $(python_command e1jax.convert "$@")"
