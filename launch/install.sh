#!/usr/bin/env bash
# The virtual environment with elm_jax in it, and nothing else. Safe to run again: quickstart.sh begins with the same.
#   bash launch/install.sh && source .venv/bin/activate
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"
ensure_environment run -e .
echo "elm is in $VENV/bin; for this shell: source $VENV/bin/activate"
