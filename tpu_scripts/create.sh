#!/usr/bin/env bash
# Makes a TPU, as a queued resource (the default) or at once as a VM, and waits for it.
#
#   PROJECT=my-project ZONE=us-central1-a TPU_NAME=e1 ACCELERATOR=v5litepod-8 \
#       tpu_scripts/create.sh [--dry-run]
#
# Inputs: PROJECT, ZONE, TPU_NAME, ACCELERATOR (v5litepod-N: N chips of v5e; v6e-N: N chips;
#   v5p-N: N cores, half as many chips), and if you like QUEUED=no (`tpu-vm create`),
#   SPOT=yes (cheaper, may be taken away at any time), RUNTIME (TPU software version, known
#   for these three), SERVICE_ACCOUNT (that of the VM; it must be allowed to use your bucket).
# Hardware: the slice you name; docs/tpu.md helps to choose it.
# Duration: minutes where TPUs are free; a queued resource may wait for hours or days.
#   Ctrl-C leaves it in the queue, and resume.sh waits on.
# Cost: chips x hours from the moment it is ACTIVE (READY) until delete.sh, idle or not, at
#   the rate of kind, zone and spot or not: https://cloud.google.com/tpu/pricing
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
refuse_flags "$@"

make_tpu
await_tpu || die "$TPU_NAME is $state; delete.sh removes it"
