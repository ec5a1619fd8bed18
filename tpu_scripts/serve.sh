#!/usr/bin/env bash
# Runs `python -m e1jax.serve` on a TPU VM and makes it this machine's too, through SSH: it is at
# http://localhost:8000 for as long as this script runs. Ctrl-C lets running requests finish
# and ends both. The arguments are those of that command; paths are on the VM, relative ones
# from ~/e1jax.
#
#   PROJECT=my-project ZONE=us-central1-a TPU_NAME=e1 tpu_scripts/serve.sh [--dry-run] \
#       --model Salesforce/E1-Math-7B
#
# Inputs: PROJECT, ZONE, TPU_NAME, and if you like PORT, by default 8000, on both machines.
# Hardware: as for sample.sh, a slice with one host.
# Duration: reading the weights and compiling: minutes; /health says 200 from then on.
# Cost: that of the TPU meanwhile, whether there are requests or not.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PORT=${PORT:-8000}
check PORT '[0-9]{1,5}' 'the number of a port'

# The server listens on the VM's loopback alone. With a terminal (-t), Ctrl-C reaches it, and
# it does not outlive the connection.
tpus tpu-vm ssh "$TPU_NAME" --worker=0 --ssh-flag=-t "--ssh-flag=-L $PORT:localhost:$PORT" \
  "--command=$(python_command e1jax.serve --port "$PORT" "$@")"
