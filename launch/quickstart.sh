#!/usr/bin/env bash
# Trains on the digits data set (nothing to download but the packages) and evaluates the result.
#
#   bash launch/quickstart.sh [WORKDIR] [--config.KEY=VALUE ...]
#
# WORKDIR defaults to runs/digits. The same command again resumes, or only repeats the evaluation.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

workdir="$ROOT/runs/digits"
if (($# > 0)) && [[ "$1" != -* ]]; then
  workdir="$1"
  shift
  # Relative to where the user stands; gs:// and the like are left as they are.
  [[ "$workdir" == /* || "$workdir" == *://* ]] || workdir="$PWD/$workdir"
fi

setup_env
cd -- "$ROOT"
"$VENV_PYTHON" -m shortcut_jax.main --config=configs/digits.py --workdir="$workdir" "$@"
"$VENV_PYTHON" -m shortcut_jax.eval --config=configs/digits.py --workdir="$workdir" "$@"

cat <<END

Look at the samples first: every row starts from the same noise, and a column is a number of steps.
The run itself:
  $workdir/metrics.jsonl        losses, norms and speed during training
  "$VENV/bin/tensorboard" --logdir "$workdir"
END
