#!/usr/bin/env bash
# Gets training going again, whatever has happened: waits for a TPU that is on its way, makes
# one anew that was preempted or has failed, copies and installs, and starts the same
# training, which goes on from its last checkpoint. Where training is running, it does
# nothing, so it can be run every few minutes.
#
#   PROJECT=... ZONE=... TPU_NAME=... ACCELERATOR=... SPOT=yes RUN_DIR=gs://... \
#       tpu_scripts/resume.sh [--dry-run] configs/e1_math_7b.yaml
#
# Inputs: those of create.sh, install.sh and train.sh, as they were given to these; the
#   arguments too. --dry-run prints what is done for a TPU that was preempted.
# Hardware: that of create.sh.
# Duration: the wait for a TPU, and then minutes. Lost are the steps since the last checkpoint.
# Cost: as for create.sh. It makes TPUs by itself, but never more than one.
set -euo pipefail
scripts=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$scripts/common.sh"

: "${RUN_DIR:?the directory of the run, like gs://my-bucket/runs/e1}"
[[ $RUN_DIR = gs://* ]] ||
  : "${BUCKET:?the bucket that install.sh mounts; the disk of a preempted VM is lost}"
: "${1:?the configuration, like configs/e1_math_7b.yaml}"
export PROJECT ZONE TPU_NAME QUEUED BUCKET RUN_DIR

if [[ -n $dry_run ]]; then
  ask_state
  lost=yes
elif await_tpu; then
  lost=
  # Only asks: the lock is free again when `true` has ended.
  status=$(on_worker all 'flock -n train.lock true && echo idle || echo running')
  if [[ $status = *running* ]]; then
    echo "training is running on $TPU_NAME"
    exit
  fi
else
  echo "$TPU_NAME is $state; making it anew" >&2
  lost=yes
fi
if [[ -n $lost ]]; then
  delete_tpu
  make_tpu
  await_tpu || die "$TPU_NAME is $state; run this again"
fi
"$scripts/copy.sh" ${dry_run:+--dry-run}
"$scripts/install.sh" ${dry_run:+--dry-run}
"$scripts/train.sh" ${dry_run:+--dry-run} -- "$@"
