#!/usr/bin/env bash
# Asks training to save where it is and to end, and waits until it has, on all workers.
# train.sh or resume.sh goes on from there.
#
#   PROJECT=my-project ZONE=us-central1-a TPU_NAME=e1 tpu_scripts/stop.sh [--dry-run]
#
# Inputs: PROJECT, ZONE, TPU_NAME.
# Hardware: the TPU that trains. It goes on costing until delete.sh.
# Duration: the update that is being computed, or nothing of the sampling, and writing a
#   checkpoint.
# Cost: that of the TPU meanwhile.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
refuse_flags "$@"

# Not the shell that this is, nor the one that holds the lock, which is waited for.
on_worker all 'pkill -TERM -f "^[.]venv/bin/python -m e1jax[.]train " ||
  echo "training is not running"
flock train.lock true'
