#!/usr/bin/env bash
# Starts `python -m e1jax.train` on all workers, and returns. It goes on when the connection
# ends; its output is in ~/train.log on each worker. Where it is running, nothing is started.
#
#   PROJECT=my-project ZONE=us-central1-a TPU_NAME=e1 RUN_DIR=gs://my-bucket/runs/e1_math_7b \
#       tpu_scripts/train.sh [--dry-run] configs/e1_math_7b.yaml
#
# Inputs: PROJECT, ZONE, TPU_NAME, RUN_DIR: gs://BUCKET/PATH, or an absolute path that every
#   worker sees, and that outlives the VMs: below /mnt/e1jax, where install.sh mounts a bucket.
# Hardware: the slice of the configuration's header; several hosts are one run.
# Duration: steps x (sampling + update) of a step; metrics.jsonl has both times after the
#   first one. Compiling takes minutes more at the first step.
# Cost: that of the TPU meanwhile, and the checkpoints kept in the bucket.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

: "${RUN_DIR:?the directory of the run, the same for every worker, like gs://my-bucket/runs/e1}"
check RUN_DIR '/.*|gs://.*' 'an absolute path or gs://BUCKET/PATH'
config=${1:?the configuration, like configs/e1_math_7b.yaml}
shift
[[ $config = /* || -f $root/$config ]] || die "there is no $config in $root"

# The lock is held for as long as training runs, and by nothing that outlives it.
# stop.sh and resume.sh know by it.
command=$(python_command e1jax.train --config "$config" --run-dir "$RUN_DIR" "$@")
on_worker all "flock -n train.lock true || { echo 'training is running already'; exit 0; }
nohup flock -n -o train.lock bash -c $(words "$command") >> train.log 2>&1 < /dev/null &"
