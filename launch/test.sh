#!/usr/bin/env bash
# Runs the tests: bash launch/test.sh [pytest arguments]
#
# Tests that take minutes are left out; run them with: bash launch/test.sh -m slow
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

setup_env test
cd -- "$ROOT"
exec "$VENV_PYTHON" -m pytest "$@"
