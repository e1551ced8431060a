#!/usr/bin/env bash
# All hosts of a Cloud TPU slice, or of several. Usage: bash launch/tpu_pod.sh -t NAME[,NAME...] -z ZONE [OPTIONS] JOB
#
# Jobs:
#   setup                installs this checkout's environment on every host
#   expert ARGS...       one expert on all hosts of the slice: elm train ARGS
#   stack ARGS...        many prompt experts in one program:   elm train --gin_file experts/prompt_stack.gin ARGS
#   farm FOLDER ARGS...  experts of a farm: every slice is one worker; FOLDER is a network folder (Filestore)
#                        that all hosts mount at the same place: elm farm work --dir FOLDER ARGS
#   elm ARGS...          any other verb:                       elm ARGS
# Options:
#   -t NAME,...  the slice; several for a farm
#   -z ZONE      their zone
#   -d DIR       the checkout on the hosts (default: elm_jax, in the home folder)
#   -r N         start again up to N times when stopped, killed or bereft of a process (default: 0)
#   -n           dry run: print the commands, run nothing
#   -h           this text
# The hosts of a slice find each other by themselves. Maintenance notices are watched for: the run saves and
# ends with status 143, and -r starts it again. Environment: DRY_RUN=1 (as -n).
# Examples:
#   bash launch/tpu_pod.sh -t v5e-16 -z us-west4-a setup
#   bash launch/tpu_pod.sh -t v5e-16 -z us-west4-a -r 10 expert --kind dataset --task ag_news \
#     --base gs://bucket/base --output gs://bucket/runs/ag --prepared gs://bucket/prepared
#   bash launch/tpu_pod.sh -t slice-a,slice-b -z us-west4-a -r 10 farm /mnt/share/farm
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$ROOT/launch/jobs.sh"

NAMES="" ZONE="" FOLDER=elm_jax RESTARTS=0
while getopts "t:z:d:r:nh" option; do
  case "$option" in
    t) NAMES="$OPTARG" ;;
    z) ZONE="$OPTARG" ;;
    d) FOLDER="$OPTARG" ;;
    r) RESTARTS="$OPTARG" ;;
    n) DRY_RUN=1 ;;
    h) usage "${BASH_SOURCE[0]}" && exit 0 ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
[ -n "$NAMES" ] && [ -n "$ZONE" ] || fail "-t and -z are needed (-h explains)"
IFS=, read -ra SLICES <<<"$NAMES"
INSTALL="source launch/common.sh; ensure_environment tpu -e '.[tpu]'"
if [ "${1:-}" = setup ]; then
  REMOTE="$INSTALL"
else
  elm_words "$@"
  [ "${#SLICES[@]}" -eq 1 ] || [ "$1" = farm ] || fail "several slices are for a farm"
  REMOTE="$INSTALL; exec \"\$VENV/bin/elm\" $(show "${WORDS[@]}")"
fi
REMOTE="cd $(show "$FOLDER")&& $REMOTE"

# one SLICE: the command on all its hosts at once.
one() {
  run gcloud compute tpus tpu-vm ssh "$1" --zone "$ZONE" --worker all --command "bash -c $(show "$REMOTE")"
}

if [ -n "${DRY_RUN:-}" ]; then
  for SLICE in "${SLICES[@]}"; do one "$SLICE"; done
  exit 0
fi
COMMANDS=()
for SLICE in "${SLICES[@]}"; do # a slice that goes down starts again without the others
  COMMANDS+=("again $(show "$RESTARTS" one "$SLICE")")
done
together
