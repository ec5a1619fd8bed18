#!/usr/bin/env bash
# Shows what training writes, as it comes: the log of one worker. Ctrl-C ends the showing,
# not the training.
#
#   PROJECT=my-project ZONE=us-central1-a TPU_NAME=e1 tpu_scripts/watch.sh [--dry-run] [WORKER]
#
# Inputs: PROJECT, ZONE, TPU_NAME. WORKER is a number, by default 0.
# Hardware: any TPU VM. Duration: until you end it. Cost: none of its own.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

WORKER=${1:-0}
check WORKER '[0-9]+' 'the number of a worker'
on_worker "$WORKER" 'tail -n 100 -F train.log'
