#!/usr/bin/env bash
# Runs `python -m e1jax.sample` on a TPU VM. The arguments are those of that command; paths
# are on the VM, relative ones from ~/e1jax.
#
#   PROJECT=my-project ZONE=us-central1-a TPU_NAME=e1 tpu_scripts/sample.sh [--dry-run] \
#       "How many primes are below 100?" --model Salesforce/E1-Math-7B -n 4
#
# Inputs: PROJECT, ZONE, TPU_NAME. After --, --help and --dry-run are passed on as well.
# Hardware: a slice with one host: v5litepod-8, v6e-8 or v5p-8 for a 7B model. Sampling does
#   not span hosts.
# Duration: reading the weights and, the first time, compiling: minutes. Then what
#   `python -m e1jax.plan --part sample` estimates per step.
# Cost: that of the TPU meanwhile.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

on_worker 0 "$(python_command e1jax.sample "$@")"
