#!/usr/bin/env bash
# A Kubernetes JobSet: launch/jobset.yaml, filled in. Usage: bash launch/jobset.sh -i IMAGE [OPTIONS] JOB
#
# Jobs:
#   expert ARGS...       one expert on all hosts:              elm train ARGS
#   stack ARGS...        many prompt experts in one program:   elm train --gin_file experts/prompt_stack.gin ARGS
#   farm FOLDER ARGS...  experts of a farm: -w workers of -p hosts each; FOLDER lies on the claim's volume:
#                        elm farm work --dir FOLDER ARGS
#   elm ARGS...          any other verb:                       elm ARGS
# Options:
#   -i IMAGE     container image in which `elm` is installed
#   -j NAME      of the JobSet (default: elm)
#   -w N         independent workers (default: 1; more for a farm)
#   -p N         hosts, so processes, of each (default: 1)
#   -s KEY=VALUE node selector; may be given again (cloud.google.com/gke-tpu-topology=4x4)
#   -a NAME=N    accelerators of a host (default: nvidia.com/gpu=8; google.com/tpu=4)
#   -v CLAIM     persistent volume claim, mounted at /share (needs ReadWriteMany)
#   -r N         restarts of each host that count (default: 20); evictions and drained nodes do not
#   -n           dry run: print the manifest and the command, apply nothing
#   -h           this text
# Example:
#   bash launch/jobset.sh -i registry/elm_jax -p 4 -a google.com/tpu=4 -v share \
#     -s cloud.google.com/gke-tpu-accelerator=tpu-v5-lite-podslice -s cloud.google.com/gke-tpu-topology=4x4 \
#     expert --task ag_news__classify --base /share/base --output /share/runs/ag
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$ROOT/launch/jobs.sh"

IMAGE="" NAME=elm WORKERS=1 PROCESSES=1 ACCELERATOR="nvidia.com/gpu=8" CLAIM="" RESTARTS=20 SELECTORS=()
while getopts "i:j:w:p:s:a:v:r:nh" option; do
  case "$option" in
    i) IMAGE="$OPTARG" ;;
    j) NAME="$OPTARG" ;;
    w) WORKERS="$OPTARG" ;;
    p) PROCESSES="$OPTARG" ;;
    s) SELECTORS+=("$OPTARG") ;;
    a) ACCELERATOR="$OPTARG" ;;
    v) CLAIM="$OPTARG" ;;
    r) RESTARTS="$OPTARG" ;;
    n) DRY_RUN=1 ;;
    h) usage "${BASH_SOURCE[0]}" && exit 0 ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
[ -n "$IMAGE" ] || fail "-i IMAGE is needed (-h explains)"
elm_words "$@"
[ "$WORKERS" -eq 1 ] || [ "$1" = farm ] || fail "-w is for a farm; -p gives the hosts of one run"

# quoted WORDS...: a list of YAML (that is, JSON) strings.
quoted() {
  local word text=""
  for word in "$@"; do
    word="${word//\\/\\\\}"
    text="$text${text:+, }\"${word//\"/\\\"}\""
  done
  echo "[$text]"
}

SELECTOR="{}"
if [ "${#SELECTORS[@]}" -gt 0 ]; then
  SELECTOR=""
  for pair in "${SELECTORS[@]}"; do
    SELECTOR="$SELECTOR${SELECTOR:+, }\"${pair%%=*}\": \"${pair#*=}\""
  done
  SELECTOR="{$SELECTOR}"
fi
VOLUME="emptyDir: {}"
[ -z "$CLAIM" ] || VOLUME="persistentVolumeClaim: {claimName: $CLAIM}"

# manifest: jobset.yaml without its comments, its @NAMES@ replaced.
manifest() {
  local text
  text="$(grep -v '^ *#' "$ROOT/launch/jobset.yaml")"
  text="${text//@NAME@/"$NAME"}"
  text="${text//@IMAGE@/"$IMAGE"}"
  text="${text//@WORKERS@/"$WORKERS"}"
  text="${text//@PROCESSES@/"$PROCESSES"}"
  text="${text//@RESTARTS@/"$((RESTARTS * PROCESSES))"}"
  text="${text//@ACCELERATOR@/"${ACCELERATOR%%=*}"}"
  text="${text//@COUNT@/"${ACCELERATOR#*=}"}"
  text="${text//@SELECTOR@/"$SELECTOR"}"
  text="${text//@VOLUME@/"$VOLUME"}"
  text="${text//@ARGUMENTS@/"$(quoted "${WORDS[@]}")"}"
  echo "$text"
}

if [ -n "${DRY_RUN:-}" ]; then
  manifest
  echo "# $(show kubectl apply -f -)"
  exit 0
fi
manifest | kubectl apply -f -
