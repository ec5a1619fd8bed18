#!/usr/bin/env bash
# Deletes the TPU and, with it, the disks of its VMs. Does not ask.
#
#   PROJECT=my-project ZONE=us-central1-a TPU_NAME=e1 tpu_scripts/delete.sh [--dry-run]
#
# Inputs: PROJECT, ZONE, TPU_NAME, and QUEUED=no if it was made so.
# Hardware: the TPU that is deleted. What is not in the bucket is lost.
# Duration: minutes.
# Cost: none; this is what ends the cost of the TPU. The bucket goes on costing, by
#   gigabytes x months: https://cloud.google.com/storage/pricing
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
refuse_flags "$@"

delete_tpu
