#!/usr/bin/env bash
# Runs `python -m e1jax.evaluate` on a TPU VM. The arguments are those of that command; paths
# are on the VM, relative ones from ~/e1jax. Interrupted, the same command goes on, if
# --output names a directory that is still there.
#
#   PROJECT=my-project ZONE=us-central1-a TPU_NAME=e1 tpu_scripts/evaluate.sh [--dry-run] \
#       --model Salesforce/E1-Math-7B --dataset aime24 --output /mnt/e1jax/results/e1
#
# Inputs: PROJECT, ZONE, TPU_NAME. After --, --help and --dry-run are passed on as well.
# Hardware: as for sample.sh, a slice with one host.
# Duration: problems x n x budgets x tokens of a response, over the tokens/s of the slice;
#   `--limit` and `-n` make it short.
# Cost: that of the TPU meanwhile.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

on_worker 0 "$(python_command e1jax.evaluate "$@")"
