#!/usr/bin/env bash
# The whole story on embedded tasks: environment, install, `elm demo`. Safe to run again.
#   bash launch/quickstart.sh [WORKDIR]        (default: demo/ in this checkout)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"
ensure_environment run -e .
exec "$VENV/bin/elm" demo --workdir "${1:-$ROOT/demo}"
