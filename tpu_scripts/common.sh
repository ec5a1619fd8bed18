# shellcheck shell=bash
# What the scripts beside it share. Sourced, not run: it takes --dry-run and --help off the
# arguments, checks the inputs that every script has, and knows how to talk to gcloud.

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# shellcheck disable=SC2034 # the checkout, for the scripts
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# --dry-run and --help are the script's own wherever they stand, but not after a --, which
# is taken off. The other arguments stay in their order.
dry_run=
own=yes
for word in "$@"; do
  shift
  case $own$word in
  yes--dry-run) dry_run=yes ;;
  yes-h | yes--help) # the comment that the script begins with
    sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0"
    exit
    ;;
  yes--) own=no ;;
  *) set -- "$@" "$word" ;;
  esac
done

# For a script without flags: another one, a misspelt --dry-run say, runs nothing.
refuse_flags() {
  local word
  for word in "$@"; do
    [[ $word != -* ]] || die "$(basename "$0") has no flag $word; see --help"
  done
}

: "${PROJECT:?the Google Cloud project that pays for the TPU}"
: "${ZONE:?the zone of the TPU, like us-central1-a}"
: "${TPU_NAME:?the name that you give the TPU, like e1-train}"
QUEUED=${QUEUED:-yes} # no: `tpu-vm create`, which fails at once where no TPU is free

# Refuses an input that is not what it should be: NAME PATTERN MEANING.
check() {
  [[ ${!1} =~ ^($2)$ ]] || die "$1='${!1}' is not $3"
}

check PROJECT '[a-z][-a-z0-9.:]*[a-z0-9]' 'the id of a project'
check ZONE '[a-z]+-[a-z]+[0-9]+-[a-z0-9]+' 'a zone, like us-central1-a'
check TPU_NAME '[a-z]([-a-z0-9]{0,60}[a-z0-9])?' \
  'a name of small letters, digits and hyphens that begins with a letter'
check QUEUED 'yes|no' 'yes or no'

# The arguments as words of a command line, for this shell or a remote one. Not printf %q,
# whose $'...' only some shells read, and which puts a backslash before every space.
words() {
  local word sep='' one="'" escaped="'\\''"
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      word="'${word//$one/$escaped}'"
    fi
    printf '%s%s' "$sep" "$word"
    sep=' '
  done
}

# Runs a command, or prints it if this is a dry run; a failure ends the script.
run() {
  if [[ -n $dry_run ]]; then
    words "$@"
    echo
  else
    "$@" || die "exit code $? from: $(words "$@")"
  fi
}

# gcloud compute tpus GROUP VERB NAME [FLAG...], in the project and zone.
tpus() {
  run gcloud compute tpus "$@" "--zone=$ZONE" "--project=$PROJECT"
}

# Runs a command line on a worker of the TPU, or on all at once: WORKER COMMANDS. It may be
# run twice, because gcloud does that where a connection breaks.
on_worker() {
  tpus tpu-vm ssh "$TPU_NAME" "--worker=$1" "--command=$2"
}

# A Python module of the copied checkout, with its arguments, as a remote command line.
python_command() {
  printf 'cd e1jax && exec .venv/bin/python -m %s' "$(words "$@")"
}

make_tpu() {
  : "${ACCELERATOR:?the kind and size of the TPU, like v5litepod-8, v6e-8 or v5p-8}"
  SPOT=${SPOT:-no}
  check ACCELERATOR '[a-z0-9]+-[0-9]+' 'an accelerator type, like v5litepod-8'
  check SPOT 'yes|no' 'yes or no'
  case $ACCELERATOR in
  v5litepod-*) : "${RUNTIME:=v2-alpha-tpuv5-lite}" ;;
  v5p-*) : "${RUNTIME:=v2-alpha-tpuv5}" ;;
  v6e-*) : "${RUNTIME:=v2-alpha-tpuv6e}" ;;
  *) : "${RUNTIME:?the TPU software version for $ACCELERATOR}" ;;
  esac
  check RUNTIME '[a-z0-9][-a-z0-9.]*' 'a TPU software version'
  local flags=("--accelerator-type=$ACCELERATOR")
  [[ $SPOT = no ]] || flags+=(--spot)
  [[ -z ${SERVICE_ACCOUNT-} ]] || flags+=("--service-account=$SERVICE_ACCOUNT")
  if [[ $QUEUED = yes ]]; then
    tpus queued-resources create "$TPU_NAME" "--node-id=$TPU_NAME" \
      "--runtime-version=$RUNTIME" "${flags[@]}"
  else
    tpus tpu-vm create "$TPU_NAME" "--version=$RUNTIME" "${flags[@]}"
  fi
}

delete_tpu() {
  if [[ $QUEUED = yes ]]; then
    tpus queued-resources delete "$TPU_NAME" --force --quiet
  else
    tpus tpu-vm delete "$TPU_NAME" --quiet
  fi
}

# Prints the state of the queued resource or VM.
ask_state() {
  if [[ $QUEUED = yes ]]; then
    tpus queued-resources describe "$TPU_NAME" '--format=value(state.state)'
  else
    tpus tpu-vm describe "$TPU_NAME" '--format=value(state)'
  fi
}

# Waits while the TPU is on its way; fails, with the state in `state`, if it is lost.
await_tpu() {
  if [[ -n $dry_run ]]; then
    # shellcheck disable=SC2016 # expanded by whoever runs what is printed
    printf 'until [[ $(%s) =~ ^(ACTIVE|READY)$ ]]; do sleep 30; done\n' "$(ask_state)"
    return
  fi
  while true; do
    state=$(ask_state) || exit
    case $state in
    ACTIVE | READY) return 0 ;;
    FAILED | SUSPENDED | PREEMPTED | TERMINATED | STOPPED) return 1 ;;
    esac
    echo "$TPU_NAME is $state; asking again in 30 s" >&2
    sleep 30
  done
}
