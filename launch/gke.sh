#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster: a JobSet with one pod per host, from an image of this
# repository. Needs gcloud, kubectl with gke-gcloud-auth-plugin, and docker for `image`.
#
#   bash launch/gke.sh COMMAND [options] [-- flags of the program]
#
#   cluster   creates a cluster, a node pool that is the slice, and the JobSet controller
#   image     builds the image from launch/Dockerfile and pushes it
#   train     submits the JobSet; pods that are preempted are made again, and resume
#   logs      follows the log of the first pod
#   status    shows the JobSet and its pods
#   stop      deletes the JobSet; its pods get two minutes to save
#   delete    deletes the cluster, which costs until then
#
#   --name         of the run (train, logs, status, stop)
#   --image        with its registry, such as us-docker.pkg.dev/PROJECT/REPOSITORY/shortcut_jax:1
#   --cluster      name of the cluster (cluster, delete)
#   --location     zone of the cluster (cluster, delete)
#   --project      of Google Cloud; without it that of gcloud's configuration
#   --machine      machine type of a host: ct5lp-hightpu-4t (default; v5e), ct5p-hightpu-4t,
#                  ct6e-standard-4t, ...
#   --accelerator  the label GKE gives such hosts: tpu-v5-lite-podslice (default), tpu-v5p-slice,
#                  tpu-v6e-slice, ...
#   --topology     chips in each direction: 4x4 (default), 2x2x4, ...
#   --chips        chips of one host: 4 (default)
#   --spot         hosts that may be taken away at any time (cluster, train)
#   --claim        PersistentVolumeClaim, ReadWriteMany, mounted as /mnt/shared: workdir and data
#   --restarts     how often the run is started again after a failure that is no preemption; 5
#   --module       program to run instead of shortcut_jax.main
#   --dry-run      prints the commands, the JobSet as their input, and runs nothing
#
#   bash launch/gke.sh train --name=sj --image=IMAGE --claim=shared -- \
#       --config=configs/imagenet.py --workdir=/mnt/shared/runs/imagenet
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

JOBSET=https://github.com/kubernetes-sigs/jobset/releases/download/v0.12.0/manifests.yaml
OF_RUN=jobset.sigs.k8s.io/jobset-name # the label of its pods
name="" image="" cluster="" location="" project="" spot="" claim="" restarts=5
machine=ct5lp-hightpu-4t accelerator=tpu-v5-lite-podslice topology=4x4 chips=4

# Sets $hosts: the chips of the topology over those of one host.
count_hosts() {
  [[ "$topology" =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
    die "--topology=$topology is no topology; expected chips in each direction, such as 4x4 or" \
      "2x2x4: change it."
  require_count chips
  local total=$((${topology//x/*}))
  hosts=$((total / chips))
  ((hosts * chips == total)) || die "--topology=$topology has $total chips, which --chips=$chips" \
    "does not divide; expected the chips of one host of the slice: change one of them."
}

create_cluster() {
  local where=(--location="$location")
  [[ -z "$project" ]] || where+=(--project="$project")
  # The JobSet controller does not fit on the smallest machines; a claim comes from Filestore.
  run gcloud container clusters create "$cluster" "${where[@]}" --num-nodes=1 \
    --machine-type=e2-standard-4 --addons=GcpFilestoreCsiDriver
  # A topology over several hosts makes the pool one slice.
  local pool=(--machine-type="$machine" --num-nodes="$hosts" ${spot:+--spot})
  ((hosts == 1)) || pool+=(--tpu-topology="$topology")
  run gcloud container node-pools create slice --cluster="$cluster" "${where[@]}" "${pool[@]}"
  run gcloud container clusters get-credentials "$cluster" "${where[@]}"
  run kubectl apply --server-side -f "$JOBSET"
}

# A JSON string, which is also one of YAML.
json() {
  local text="${1//\\/\\\\}"
  printf '"%s"' "${text//\"/\\\"}"
}

# The JobSet. With JAX_PLATFORMS=tpu,cpu a host whose chips do not answer is refused instead of
# training on its CPU. Exit status 75 and a pod that the cluster takes away fail the Job by its
# policy, and then the JobSet starts again without counting; every other failure counts. Python is
# the first process of the pod, so that it gets the SIGTERM.
manifest() {
  local flag
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(json "$name")
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: program
                  operator: In
                  values: [$PREEMPTED]
              - action: FailJob
                onPodConditions:
                  - type: DisruptionTarget
                    status: "True"
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(json "$accelerator")
                cloud.google.com/gke-tpu-topology: $(json "$topology")
END
  [[ -z "$spot" ]] || cat <<END
                cloud.google.com/gke-spot: "true"
END
  cat <<END
              containers:
                - name: program
                  image: $(json "$image")
                  command:
                    - python
                    - -m
                    - $(json "$module")
END
  for flag in "${MAIN_FLAGS[@]}"; do
    echo "                    - $(json "$flag")"
  done
  cat <<END
                  env:
                    - name: JAX_PLATFORMS
                      value: tpu,cpu
                  resources:
                    limits:
                      google.com/tpu: $chips
END
  [[ -z "$claim" ]] || cat <<END
                  volumeMounts:
                    - name: shared
                      mountPath: /mnt/shared
              volumes:
                - name: shared
                  persistentVolumeClaim:
                    claimName: $(json "$claim")
END
}

train() {
  if [[ -n "$dry_run" ]]; then
    printf '%s\n' "kubectl create -f - <<'END'" "$(manifest)" END
  else
    manifest | kubectl create -f -
  fi
}

command="${1:-}"
case "$command" in
  --help | "") show_help && exit ;;
  cluster | image | train | logs | status | stop | delete) shift ;;
  *) die "$command is no command of gke.sh; expected cluster, image, train, logs, status, stop or" \
    "delete: --help explains them." ;;
esac
parse_options "name= image= cluster= location= project= machine= accelerator= topology= chips= \
spot claim= restarts= module=" "$@"
case "$command" in
  cluster | delete)
    require cluster "the name of the cluster"
    require location "the zone of the cluster, such as us-west4-a"
    ;;
  train | logs | status | stop) require name "the name of the run" ;;
esac
case "$command" in
  cluster)
    count_hosts
    create_cluster
    ;;
  image)
    require image "the image with its registry"
    run docker build --file "$ROOT/launch/Dockerfile" --tag "$image" "$ROOT"
    run docker push "$image"
    ;;
  train)
    require image "the image that the command image has pushed"
    require_count restarts
    require_run_flags
    count_hosts
    train
    ;;
  logs)
    run kubectl logs --follow --tail=100 \
      --selector="$OF_RUN=$name,batch.kubernetes.io/job-completion-index=0"
    ;;
  status)
    run kubectl get jobset "$name"
    run kubectl get pods --output=wide --selector="$OF_RUN=$name"
    ;;
  stop) run kubectl delete jobset "$name" ;;
  delete)
    run gcloud container clusters delete "$cluster" --location="$location" \
      ${project:+"--project=$project"} --quiet
    ;;
esac
