# Sourced by the scripts beside it. `setup_env [EXTRA]` makes or updates the environment .venv in
# the repository and sets VENV_PYTHON; EXTRA is one of the extras in setup.py (test, cuda, tpu).
# PYTHON=/path/to/python chooses the Python it is made from.
# shellcheck shell=bash

ROOT="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"
VENV_PYTHON="$VENV/bin/python"
# Written before anything else, so that only an environment made here is ever deleted.
VENV_MARK="$VENV/.made-by-launch"
# Written last: the key of the environment, then one line for each extra in it.
VENV_STAMP="$VENV/.complete"

# Whatever environment is active is the user's: nothing is installed there or imported from there.
unset VIRTUAL_ENV CONDA_PREFIX PYTHONHOME PYTHONPATH

die() {
  echo "error: $*" >&2
  exit 1
}

have_uv() {
  command -v uv >/dev/null && uv --version >/dev/null 2>&1 # A pyenv shim can exist and not run.
}

# Prints version, executable and whether `python -m venv` works: three lines; fails if $1 does.
probe_python() {
  "$1" -I -c '
import importlib.util, sys
print("%d.%d.%d" % sys.version_info[:3])
print(sys.executable)
print("venv" if importlib.util.find_spec("ensurepip") else "no-venv")
' 2>/dev/null
}

# Sets BASE_PYTHON and BASE_VERSION: the first usable of $PYTHON alone, or of the usual names.
find_python() {
  local candidates=(python3.12 python3.11 python3 python3.13)
  [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
  local candidate probe version executable venv minor found=""
  BASE_PYTHON=""
  BASE_VERSION=""
  for candidate in "${candidates[@]}"; do
    command -v "$candidate" >/dev/null || continue
    if ! probe="$(probe_python "$candidate")"; then
      found+="${found:+, }$candidate (does not run)"
      continue
    fi
    { read -r version && read -r executable && read -r venv; } <<<"$probe"
    minor="${version#*.}"
    minor="${minor%%.*}"
    found+="${found:+, }$candidate ($version"
    if [[ "$version" != 3.* ]] || ((minor < 11)); then
      found+=" is too old)"
    elif [[ "$venv" == no-venv ]] && ! have_uv; then
      found+=" has no venv module)"
    else
      found+=")"
      if [[ -f "$(constraints_file "$version")" ]]; then
        BASE_PYTHON="$executable"
        BASE_VERSION="$version"
        return
      fi
      # No tested versions for this Python: only used when there is no other.
      : "${BASE_PYTHON:=$executable}" "${BASE_VERSION:=$version}"
    fi
  done
  [[ -n "$BASE_PYTHON" ]] || die "no usable Python: needs 3.11 or newer, with its venv module or" \
    "with uv; found ${found:-none of ${candidates[*]}}; install Python 3.12 or 3.11, or name one:" \
    "PYTHON=/path/to/python"
}

# constraints_file VERSION: where tested exact versions for this Python are, if there are any.
constraints_file() {
  local series="${1%.*}"
  echo "$ROOT/constraints/py${series/./}.txt"
}

# Everything the environment depends on; another key means a new environment.
environment_key() {
  { echo "$ROOT $BASE_VERSION" && cat "$ROOT/setup.py" "$@"; } | cksum
}

# environment_has KEY EXTRA
environment_has() {
  [[ -f "$VENV_STAMP" ]] && [[ "$(head -n 1 "$VENV_STAMP")" == "$1" ]] &&
    grep -qxF -- "extra:$2" "$VENV_STAMP" && "$VENV_PYTHON" -I -c "" 2>/dev/null
}

create_environment() {
  if [[ -e "$VENV" ]]; then
    [[ -f "$VENV_MARK" ]] || die "$VENV exists and was not made by launch/: move it away"
    # Renamed first: a deletion that is interrupted must not leave a .venv without its mark.
    rm -rf -- "$VENV.old"
    mv -- "$VENV" "$VENV.old"
    rm -rf -- "$VENV.old"
  fi
  { mkdir "$VENV" && touch "$VENV_MARK"; } || die "cannot write in $ROOT"
  if have_uv; then
    uv venv --quiet --allow-existing --prompt shortcut_jax --python "$BASE_PYTHON" "$VENV"
  else
    "$BASE_PYTHON" -I -m venv --prompt shortcut_jax "$VENV"
  fi
}

# install_project TARGET [-c FILE]
install_project() {
  if have_uv; then
    # As pip does: with PYTHONDONTWRITEBYTECODE set, as in many containers, nobody else ever would,
    # and every start would compile 1,500 modules.
    uv pip install --quiet --compile-bytecode --python "$VENV_PYTHON" --editable "$@"
  else
    "$VENV_PYTHON" -I -m pip install --quiet --disable-pip-version-check --editable "$@"
  fi
}

# build_environment KEY EXTRA [-c FILE]: from nothing, or adds EXTRA to what has the same key.
build_environment() {
  local key="$1" extra="$2" extras="extra:"
  shift 2
  cd -- "$ROOT" || die "cannot enter $ROOT"
  if environment_has "$key" ""; then
    extras="$(tail -n +2 "$VENV_STAMP")"
    rm -- "$VENV_STAMP" # Until the installation has finished, the environment is incomplete.
  else
    create_environment
  fi
  echo "Installing shortcut_jax${extra:+[$extra]} in .venv (Python $BASE_VERSION)" >&2
  install_project ".${extra:+[$extra]}" "$@" || die "the installation failed, see above"
  printf '%s\n' "$key" "$extras" ${extra:+"extra:$extra"} >"$VENV_STAMP"
}

setup_env() {
  local extra="${1:-}" constraints key
  find_python
  constraints="$(constraints_file "$BASE_VERSION")"
  if [[ -f "$constraints" ]]; then
    set -- -c "$constraints"
  else
    echo "No constraints file for Python $BASE_VERSION: installing untested versions" >&2
    set --
  fi
  key="$(environment_key ${2:+"$2"})"
  if ! environment_has "$key" "$extra"; then
    (
      # Two scripts started together: the second waits and then finds the environment complete.
      if command -v flock >/dev/null; then flock 9; fi
      if ! environment_has "$key" "$extra"; then
        build_environment "$key" "$extra" "$@"
      fi
    ) 9>"$ROOT/.venv.lock"
  fi
}
