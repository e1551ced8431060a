#!/usr/bin/env bash
# One GPU host. Usage: bash launch/gpu.sh [OPTIONS] JOB [ARGUMENTS]
#
# Jobs:
#   expert ARGS...       one expert on all GPUs of this host:  elm train ARGS
#   stack ARGS...        many prompt experts in one program:   elm train --gin_file experts/prompt_stack.gin ARGS
#   farm FOLDER ARGS...  experts of a farm, one worker for each share of the GPUs (-w):
#                        elm farm work --dir FOLDER ARGS
#   elm ARGS...          any other verb:                       elm ARGS
# Options:
#   -w N   independent workers of a farm on this host (default: 1); each gets its share of the GPUs
#   -p N   processes of ONE run on this host (default: 1); each gets its share of the GPUs
#   -r N   start again up to N times when stopped, killed or bereft of a process (default: 0)
#   -n     dry run: print the commands, run nothing
#   -h     this text
# Environment: CUDA_VISIBLE_DEVICES (which GPUs), XLA_PYTHON_CLIENT_MEM_FRACTION (default here: 0.92),
#   ELM_VENV (virtual environment), ELM_NO_INSTALL=1 (it is ready as it is), DRY_RUN=1 (as -n).
# Examples:
#   bash launch/gpu.sh expert --task ag_news__classify --base runs/base/base --output runs/ag
#   bash launch/gpu.sh -w 8 farm farms/p3
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$ROOT/launch/jobs.sh"

WORKERS=1 PROCESSES=1 RESTARTS=0
while getopts "w:p:r:nh" option; do
  case "$option" in
    w) WORKERS="$OPTARG" ;;
    p) PROCESSES="$OPTARG" ;;
    r) RESTARTS="$OPTARG" ;;
    n) DRY_RUN=1 ;;
    h) usage "${BASH_SOURCE[0]}" && exit 0 ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
elm_words "$@"
[ "$WORKERS" -ge 1 ] && [ "$PROCESSES" -ge 1 ] || fail "-w and -p are at least 1"
[ "$WORKERS" -eq 1 ] || [ "$1" = farm ] || fail "-w is for a farm; -p makes several processes of one run"
[ "$WORKERS" -eq 1 ] || [ "$PROCESSES" -eq 1 ] || fail "-w or -p, not both"
environment gpu -e ".[gpu]"
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"

# gpus: numbers of the GPUs, with commas: those that are visible, or all that there are.
gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    echo "$CUDA_VISIBLE_DEVICES"
  elif command -v nvidia-smi >/dev/null 2>&1; then
    nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd, -
  fi
}

# share PART OF: that part of the GPUs; nothing if there are fewer than parts.
share() {
  local all each
  IFS=, read -ra all <<<"$(gpus)"
  each=$((${#all[@]} / $2))
  [ "$each" -eq 0 ] || (IFS=,; echo "${all[*]:$1*$each:$each}")
}

START=$((20000 + RANDOM % 20000))
COMMANDS=()
NUMBER=$((WORKERS * PROCESSES))
for ((i = 0; i < NUMBER; i++)); do
  SETTINGS=()
  if [ "$NUMBER" -gt 1 ]; then
    OWN="$(share "$i" "$NUMBER")"
    [ -z "$OWN" ] || SETTINGS+=("CUDA_VISIBLE_DEVICES=$OWN")
  fi
  if [ "$PROCESSES" -gt 1 ]; then
    SETTINGS+=("ELM_COORDINATOR=127.0.0.1:$START" "ELM_NUM_PROCESSES=$PROCESSES" "ELM_PROCESS_ID=$i")
  fi
  COMMANDS+=("$(show env "${SETTINGS[@]}" "$VENV/bin/elm" "${WORDS[@]}")")
done
if [ -n "${DRY_RUN:-}" ]; then
  printf '%s\n' "${COMMANDS[@]}"
  exit 0
fi
again "$RESTARTS" together
