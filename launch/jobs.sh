# shellcheck shell=bash disable=SC2034
# Sourced by gpu.sh, tpu_pod.sh, slurm.sbatch and jobset.sh: the four jobs, dry runs, signals and restarts.

# Exit statuses of `elm` after which the same command goes on: told to stop and saved, lost another process,
# killed, aborted. 1 (failed) and 2 (wrong input) are not among them.
RESTARTABLE=" 143 75 137 134 "

# usage FILE: the comment at the head of a script, from its second line on.
usage() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$1" | grep -v '^SBATCH\|^!'; }

fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# elm_words JOB ARGS...: sets WORDS, the command line of `elm` for a job.
elm_words() {
  [ "$#" -gt 0 ] || fail "which job? expert, stack, farm or elm (-h explains)"
  local job="$1"
  shift
  case "$job" in
    expert) WORDS=(train "$@") ;;
    stack) WORDS=(train --gin_file experts/prompt_stack.gin "$@") ;;
    farm)
      [ "$#" -gt 0 ] || fail "farm needs the farm's folder"
      local folder="$1"
      shift
      WORDS=(farm work --dir "$folder" "$@")
      ;;
    elm) WORDS=("$@") ;;
    *) fail "unknown job '$job': expert, stack, farm or elm (-h explains)" ;;
  esac
}

# show WORDS...: prints a command as one could type it.
show() {
  printf '%q ' "$@"
  printf '\n'
}

# run WORDS...: runs a command, or prints it when DRY_RUN is set.
run() {
  if [ -n "${DRY_RUN:-}" ]; then
    show "$@"
  else
    "$@"
  fi
}

# environment NAME PIP_ARGS...: the virtual environment of common.sh; nothing in a dry run.
environment() {
  if [ -n "${DRY_RUN:-}" ] || [ -n "${ELM_NO_INSTALL:-}" ]; then
    return
  fi
  ensure_environment "$@"
}

is_restartable() { case "$RESTARTABLE" in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

# together: starts every command of the array COMMANDS (one a line, as `show` prints it), hands SIGTERM and
# SIGINT on to them, and waits. Its status is that of the first that failed: the others end because of it.
together() {
  local command pid status=0 one
  PIDS=()
  # Bash's own children: `kill 0` would reach whoever started this script as well.
  trap 'STOPPING=1; for pid in "${PIDS[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done' TERM INT
  for command in "${COMMANDS[@]}"; do
    eval "$command &"
    PIDS+=("$!")
  done
  for pid in "${PIDS[@]}"; do
    while true; do
      one=0
      wait "$pid" || one=$?
      # A signal interrupts `wait`; the process itself is still there then.
      kill -0 "$pid" 2>/dev/null || break
    done
    if [ "$one" -ne 0 ] && { [ "$status" -eq 0 ] || [ "$status" -eq 75 ]; }; then
      status=$one
    fi
  done
  trap - TERM INT
  return "$status"
}

# again LIMIT COMMAND...: runs a command, and again while its status says so, at most LIMIT times more.
again() {
  local left="$1" status
  shift
  while true; do
    status=0
    "$@" || status=$?
    if [ "$left" -le 0 ] || ! is_restartable "$status" || [ -n "${STOPPING:-}" ]; then
      return "$status"
    fi
    left=$((left - 1))
    echo "${0##*/}: status $status, starting again ($left restarts left)" >&2
  done
}
