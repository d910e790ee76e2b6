#!/usr/bin/env bash
# Trains on a Cloud TPU slice of any size (TPU VMs), from this machine, with gcloud.
#
#   bash launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [options] [-- flags of the program]
#
#   train    create, install, start and watch, in this order: one command from nothing to a run
#   create   asks for the slice and waits until it is there
#   install  copies the commit that is checked out to all workers and installs it there
#   start    starts the program on all workers, as a service that outlives ssh; started again, it
#            restarts
#   watch    waits for the end of the run, and after a preemption does create, install and start;
#            it may be stopped and given again, the run goes on without it
#   logs     follows the log of --worker
#   status   state of the slice, and of the service on each worker
#   stop     tells the program on all workers to save and end
#   delete   deletes the slice, which costs until then
#
#   --name, --zone   of the slice; the zone decides which types there are
#   --project        of Google Cloud; without it that of gcloud's configuration
#   --type           accelerator type, such as v5litepod-16 (create)
#   --version        TPU software version, such as v2-alpha-tpuv5-lite (create)
#   --spot           a cheaper slice that may be taken away at any time (create)
#   --queued         waits in the queue of queued resources instead of failing when nothing is free
#   --nfs            HOST:/SHARE, mounted as /mnt/shared on all workers: for --workdir
#   --data           gs://BUCKET/FOLDER, copied to /mnt/data on each worker: prepared images, latents
#   --module         program to run instead of shortcut_jax.main
#   --worker         whose log; 0 by default
#   --poll           seconds between two looks at what is waited for; 60 by default
#   --dry-run        prints the commands and runs nothing
#
#   bash launch/tpu_vm.sh train --name=sj --zone=us-west4-a --type=v5litepod-16 \
#       --version=v2-alpha-tpuv5-lite --spot --queued --nfs=10.0.0.2:/share -- \
#       --config=configs/imagenet.py --workdir=/mnt/shared/runs/imagenet
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=launch/tpu_worker.sh
source "$ROOT/launch/tpu_worker.sh"

name="" zone="" project="" type="" version="" spot="" queued="" nfs="" data="" worker=0 poll=60

# tpus GROUP VERB ...: gcloud compute tpus ..., with name, zone and project.
tpus() {
  local group="$1" verb="$2"
  shift 2
  run gcloud compute tpus "$group" "$verb" "$name" --zone="$zone" ${project:+"--project=$project"} "$@"
}

on_workers() { # WORKERS SCRIPT
  tpus tpu-vm ssh --quiet --worker="$1" --command="$2"
}

# state_of GROUP FIELD: of the slice or its request; GONE if there is none, UNKNOWN if that cannot be
# told now (a network that is down must not make anybody delete a slice).
state_of() {
  local said
  if said="$(tpus "$1" describe --format="value($2)" 2>&1)"; then
    echo "${said##*$'\n'}"
  elif [[ "$said" == *NOT_FOUND* ]]; then
    echo GONE
  else
    echo "$said" >&2
    echo UNKNOWN
  fi
}

create() {
  if [[ -z "$queued" ]]; then
    tpus tpu-vm create --accelerator-type="$type" --version="$version" ${spot:+--spot}
    return
  fi
  tpus queued-resources create --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$version" ${spot:+--spot} --async || return
  if [[ -n "$dry_run" ]]; then
    note "every $poll s, until it prints ACTIVE:"
    tpus queued-resources describe --format="value(state.state)"
    return
  fi
  local state
  while :; do
    state="$(state_of queued-resources state.state)"
    case "$state" in
      ACTIVE) return ;;
      FAILED | SUSPENDED | GONE)
        echo "error: the request for $name ended as $state." >&2
        return 1
        ;;
    esac
    note "$name: $state"
    sleep "$poll"
  done
}

delete() {
  if [[ -n "$queued" ]]; then
    tpus queued-resources delete --force --quiet
  else
    tpus tpu-vm delete --quiet
  fi
}

# Made once: a slice that is made again days later gets the code that the run began with.
make_bundle() {
  if [[ -n "$dry_run" ]]; then
    bundle=/tmp/shortcut_jax.bundle
  else
    [[ -z "$(git -C "$ROOT" status --porcelain --untracked-files=no)" ]] ||
      die "$ROOT has changes that are not committed; expected none, so that results name the code" \
        "that made them: commit them."
    scratch="$(mktemp -d)"
    trap 'rm -rf -- "$scratch"' EXIT
    bundle="$scratch/shortcut_jax.bundle"
  fi
  run git -C "$ROOT" bundle create "$bundle" HEAD
}

install() {
  run gcloud compute tpus tpu-vm scp "$bundle" "$name:shortcut_jax.bundle" --quiet \
    --worker=all --zone="$zone" ${project:+"--project=$project"} &&
    on_workers all "$(install_script "$nfs" "$data")"
}

start() {
  on_workers all "$(start_script "$module" "${MAIN_FLAGS[@]}")"
}

# Ends with 0 when the run has finished or was stopped, and with an error when it has failed.
watch() {
  if [[ -n "$dry_run" ]]; then
    note "every $poll s; PREEMPTED or no such slice: delete, create, install, start again:"
    tpus tpu-vm describe --format="value(state)"
    on_workers 0 "$(service_script)"
    return
  fi
  local state service
  while :; do
    state="$(state_of tpu-vm state)"
    service=""
    case "$state" in
      READY)
        # A worker that does not answer now may do so the next time.
        service="$(on_workers 0 "$(service_script)" || true)"
        ! service_has_ended "$service" || return 0
        ;;
      PREEMPTED | TERMINATED | STOPPED | GONE)
        note "$name: $state; making it again."
        delete || true # what is left of it, if anything: the name must be free
        until create && install && start; do
          note "Not yet; trying again."
          sleep "$poll"
          delete || true
        done
        ;;
    esac
    note "$name: $state ${service//$'\n'/ }"
    sleep "$poll"
  done
}

# service_has_ended LINE: whether the run is over by what `service_script` printed; an error if it
# has failed.
service_has_ended() {
  case "$1" in
    *ActiveState=failed*)
      on_workers 0 "tail -n 50 $LOG" || true
      die "The run on $name has failed, see above; expected it to end with 0: mend the cause, then" \
        "give start and watch."
      ;;
    # Without a time, it has not been started yet.
    *ActiveState=inactive*) [[ "$1" == *ExecMainStartTimestamp=[A-Z]* ]] || return 1 ;;
    *) return 1 ;;
  esac
  if [[ "$1" == *ExecMainStatus=0* ]]; then
    note "The run has finished; the slice costs until you delete it."
  else
    note "The run was stopped; start goes on with it, and the slice costs until you delete it."
  fi
}

status() {
  if [[ -n "$queued" ]]; then
    tpus queued-resources describe --format="value(state.state)"
  fi
  tpus tpu-vm describe --format="value(state)"
  on_workers all "$(service_script)"
}

command="${1:-}"
case "$command" in
  --help | "") show_help && exit ;;
  train | create | install | start | watch | logs | status | stop | delete) shift ;;
  *) die "$command is no command of tpu_vm.sh; expected train, create, install, start, watch," \
    "logs, status, stop or delete: --help explains them." ;;
esac
parse_options "name= zone= project= type= version= spot queued nfs= data= module= worker= poll=" "$@"
require name "the name of the slice"
require zone "the zone of the slice, such as us-west4-a"
case "$command" in
  train | start | watch) require_run_flags ;; # before anything costs
esac
case "$command" in
  train | create | watch)
    require type "an accelerator type, such as v5litepod-16"
    require version "a TPU software version, such as v2-alpha-tpuv5-lite"
    ;;
esac
case "$command" in
  train | install | watch) make_bundle ;;
esac
case "$command" in
  train)
    create
    install
    start
    watch
    ;;
  logs) on_workers "$worker" "tail -n 100 -F $LOG" ;;
  stop) on_workers all "sudo systemctl stop shortcut_jax" ;;
  *) "$command" ;;
esac
