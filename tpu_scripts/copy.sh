#!/usr/bin/env bash
# Copies this checkout, as it is now, to ~/e1jax on every worker. Configurations of your own
# go with it if they are in configs/.
#
#   PROJECT=my-project ZONE=us-central1-a TPU_NAME=e1 tpu_scripts/copy.sh [--dry-run]
#
# Inputs: PROJECT, ZONE, TPU_NAME. For a TPU of several hosts, gcloud wants your key in an
#   agent: ssh-add ~/.ssh/google_compute_engine
# Hardware: any TPU VM. Duration: under a minute. Cost: that of the TPU meanwhile.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
refuse_flags "$@"

run mkdir -p "$root/build"
run tar -czf "$root/build/e1jax.tar.gz" --exclude=__pycache__ -C "$root" \
  pyproject.toml README.md LICENSE e1jax configs
tpus tpu-vm scp "$root/build/e1jax.tar.gz" "$TPU_NAME:e1jax.tar.gz" --worker=all
# What was deleted here must not stay there; the environment in e1jax/.venv may.
on_worker all 'mkdir -p e1jax && rm -rf e1jax/e1jax e1jax/configs && tar -xzf e1jax.tar.gz -C e1jax'
