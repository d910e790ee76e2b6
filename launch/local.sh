#!/usr/bin/env bash
# Trains on this machine's CPU with fake devices, to try what a pod will do: sharding, several
# processes, resuming. It is slow; nothing is installed but .venv.
#
#   bash launch/local.sh [--devices=8] [--processes=1] [--module=shortcut_jax.main] [--dry-run] \
#       -- --config=configs/digits.py:small --workdir=runs/try
#
#   --devices    fake devices of each process
#   --processes  processes, which find each other on a free port of this machine
#   --module     program to run instead of shortcut_jax.main
#   --dry-run    prints the commands and runs nothing
#
# A process that ends with 75 (told to stop, and has saved) is started again, all with it; Ctrl-C or
# a signal to the launcher stops them for good. ENV_PYTHON=/path/to/python names an environment that
# has shortcut_jax; without it .venv is made or updated.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

devices=8
processes=1

# process I: runs process I in place of this shell.
process() {
  local command=("$VENV_PYTHON" -m "$module" "${MAIN_FLAGS[@]}")
  if ((processes > 1)); then
    command+=(--coordinator="localhost:$port" --num_processes="$processes" --process_id="$1")
  fi
  local flags="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
  command=(env JAX_PLATFORMS=cpu XLA_FLAGS="${flags# }" "${command[@]}")
  if [[ -n "$dry_run" ]]; then
    quoted_words "${command[@]}"
  elif ((processes > 1)); then
    exec "${command[@]}" > >(sed "s/^/[$1] /") 2>&1
  else
    exec "${command[@]}"
  fi
}

parse_options "devices= processes= module=" "$@"
require_count devices
require_count processes
require_run_flags
use_environment ""
run cd -- "$ROOT"
if [[ -n "$dry_run" ]]; then
  port=PORT
  ((processes == 1)) || note "all at once; PORT is a free port of this machine:"
  note "again while it ends with $PREEMPTED:"
  for ((i = 0; i < processes; i++)); do process "$i"; done
  exit
fi
port="$("$VENV_PYTHON" -c '
import socket
with socket.socket() as s:
    s.bind(("localhost", 0))
    print(s.getsockname()[1])')"
supervise "$processes" process
