#!/usr/bin/env bash
# Trains on one machine with NVIDIA GPUs: one process that uses all of them.
#
#   bash launch/gpu.sh [--module=shortcut_jax.main] [--dry-run] \
#       -- --config=configs/imagenet.py --workdir=runs/imagenet
#
#   --module   program to run instead of shortcut_jax.main, such as shortcut_jax.cache_latents
#   --dry-run  prints the command and runs nothing
#
# CUDA_VISIBLE_DEVICES=0,1 leaves out GPUs. A process that ends with 75 (told to stop, and has saved)
# is started again; Ctrl-C or a signal to the launcher stops it for good. The first start makes .venv
# with the extra cuda; ENV_PYTHON=/path/to/python names an environment that has shortcut_jax instead.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

process() { # its argument, the index of the process, is always 0
  # cuda, so that a machine whose driver does not work is refused instead of training on its CPU.
  local command=(env JAX_PLATFORMS=cuda "$VENV_PYTHON" -m "$module" "${MAIN_FLAGS[@]}")
  if [[ -n "$dry_run" ]]; then
    quoted_words "${command[@]}"
  else
    exec "${command[@]}"
  fi
}

parse_options "module=" "$@"
require_run_flags
if [[ -z "$dry_run" ]] && ! nvidia-smi -L >&2; then
  die "nvidia-smi -L finds no GPU; expected a machine with an NVIDIA driver: install the driver," \
    "or try launch/local.sh, which needs none."
fi
use_environment cuda
run cd -- "$ROOT"
if [[ -n "$dry_run" ]]; then
  note "again while it ends with $PREEMPTED:"
  process 0
else
  supervise 1 process
fi
