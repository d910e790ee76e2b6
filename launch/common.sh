# Sourced by the launchers beside it: options, dry runs, and processes that are started again.
# shellcheck shell=bash

# shellcheck source=launch/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

# How `shortcut_jax.main` ends after it was told to stop and has saved: it is to be started again.
PREEMPTED=75
GRACE=60 # seconds that processes get to save and end

MAIN_FLAGS=() # what follows a lone -- on the command line: flags of the program
module=shortcut_jax.main # --module: the program
dry_run=""

# parse_options "NAME= SWITCH ..." ARGUMENT...: sets $NAME from --NAME=VALUE, $SWITCH from --SWITCH
# (with _ for -), and MAIN_FLAGS from what follows --. --help and --dry-run are always there.
parse_options() {
  local options=" $1 dry-run " argument option
  shift
  while (($#)); do
    argument="$1"
    option="${argument#--}"
    option="${option%%=*}"
    shift
    case "$argument" in
      --)
        MAIN_FLAGS=("$@")
        return
        ;;
      --help)
        show_help
        exit 0
        ;;
      --*=*)
        [[ "$options" == *" $option= "* ]] || unknown_option "$argument"
        printf -v "${option//-/_}" %s "${argument#*=}"
        ;;
      --*)
        [[ "$options" != *" $option= "* ]] || die "$argument has no value; write $argument=VALUE."
        [[ "$options" == *" $option "* ]] || unknown_option "$argument"
        printf -v "${option//-/_}" yes
        ;;
      *) unknown_option "$argument" ;;
    esac
  done
}

unknown_option() {
  die "$1 is not an option of $(basename -- "$0"); flags of the program follow a lone --," \
    "and --help explains the rest."
}

# The comment at the head of the script, without the lines for sbatch.
show_help() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 && !/^#SBATCH/ { sub(/^# ?/, ""); print }' "$0"
}

# require NAME MEANING: refuses to go on without --NAME.
require() {
  local value="${1//-/_}"
  [[ -n "${!value}" ]] || die "--$1 is missing; expected $2: give --$1=VALUE."
}

# require_count NAME: refuses a value of --NAME that is no positive whole number.
require_count() {
  local value="${1//-/_}"
  [[ "${!value}" =~ ^[1-9][0-9]*$ ]] ||
    die "--$1=${!value} is not a count; expected a whole number from 1: change it."
}

# require_flag NAME MEANING: refuses flags of the program that lack --NAME=.
require_flag() {
  [[ " ${MAIN_FLAGS[*]-}" == *" --$1="* ]] ||
    die "--$1 is missing among the flags of the program; expected $2: give -- --$1=VALUE."
}

# require_run_flags: of the program $module that the launcher starts.
require_run_flags() {
  require_flag config "a config file such as configs/imagenet.py"
  case "$module" in
    shortcut_jax.main | shortcut_jax.eval)
      require_flag workdir "the folder of the run, which every process must see"
      ;;
  esac
}

# quoted WORD: as a shell reads it back.
quoted() {
  local quote="'\\''"
  if [[ "$1" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
    printf %s "$1"
  else
    printf "'%s'" "${1//\'/$quote}"
  fi
}

# quoted_words WORD...: on one line.
quoted_words() {
  local word line=""
  for word in "$@"; do
    line+="${line:+ }$(quoted "$word")"
  done
  printf '%s\n' "$line"
}

# run COMMAND...: runs it, or prints it in a dry run.
run() {
  if [[ -n "$dry_run" ]]; then
    quoted_words "$@"
  else
    "$@"
  fi
}

# note TEXT...: for people; a comment in a dry run, whose output is a script.
note() {
  if [[ -n "$dry_run" ]]; then
    echo "# $*"
  else
    echo "$*" >&2
  fi
}

# use_environment EXTRA: sets VENV_PYTHON to a Python that has shortcut_jax, installing it unless
# ENV_PYTHON names one, such as that of a conda environment or container.
use_environment() {
  if [[ -n "${ENV_PYTHON:-}" ]]; then
    VENV_PYTHON="$ENV_PYTHON"
  elif [[ -z "$dry_run" ]]; then
    setup_env "$1"
  fi
}

# supervise COUNT COMMAND...: runs COUNT processes `COMMAND... I` at once, I from 0, and all again
# while they end with 75. If one fails, the others are stopped. A signal to the launcher goes to all
# of them and is the end. Returns the status of the first that failed, 75, or 0.
supervise() {
  local count="$1" status
  shift
  stopped=""
  trap 'stopped=yes; stop_processes TERM' INT TERM
  while :; do
    status=0
    run_together "$count" "$@" || status=$?
    ((status == PREEMPTED)) && [[ -z "$stopped" ]] || return "$status"
    note "Interrupted after saving: starting again."
  done
}

stop_processes() {
  kill "-$1" "${pids[@]}" 2>/dev/null || true
}

# run_together COUNT COMMAND...: one round of `supervise`.
run_together() {
  local count="$1" i status=0 left ended deadline=""
  shift
  pids=()
  for ((i = 0; i < count; i++)); do
    "$@" "$i" &
    pids+=("$!")
  done
  [[ -z "$stopped" ]] || stop_processes TERM
  left=" ${!pids[*]} "
  while [[ "$left" != " " ]]; do
    for i in $left; do
      # By polling: `wait -n` needs a newer bash than macOS has.
      kill -0 "${pids[i]}" 2>/dev/null && continue
      ended=0
      wait "${pids[i]}" || ended=$?
      left="${left/ $i / }"
      if ((ended != 0 && (status == 0 || status == PREEMPTED))); then
        status="$ended"
      fi
    done
    if [[ -z "$deadline" ]] && { [[ -n "$stopped" ]] || ((status && status != PREEMPTED)); }; then
      stop_processes TERM
      deadline=$((SECONDS + GRACE))
    elif [[ -n "$deadline" ]] && ((SECONDS > deadline)); then
      stop_processes KILL
    fi
    [[ "$left" == " " ]] || sleep 0.2
  done
  return "$status"
}
