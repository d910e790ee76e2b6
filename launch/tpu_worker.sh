# Sourced by tpu_vm.sh: the scripts that run on the workers of a TPU slice.
# shellcheck shell=bash

# Where the program logs, in the home folder that ssh enters.
LOG=shortcut_jax.log

# service_script: prints what systemd knows of the service, in one line.
service_script() {
  cat <<'END'
systemctl show shortcut_jax --property=ActiveState,Result,ExecMainStatus,ExecMainStartTimestamp |
  tr '\n' ' '
echo
END
}

# install_script NFS DATA: takes over the commit in ~/shortcut_jax.bundle, mounts, copies data,
# installs. Given again it changes what has changed.
install_script() {
  cat <<'END'
set -euo pipefail
cd ~
git init --quiet shortcut_jax
git -C shortcut_jax fetch --quiet ~/shortcut_jax.bundle HEAD
git -C shortcut_jax checkout --quiet --force --detach FETCH_HEAD
END
  if [[ -n "$1" ]]; then
    # In fstab, so that it is there again when a worker has restarted.
    printf 'nfs=%s\n' "$(quoted "$1")"
    cat <<'END'
command -v mount.nfs >/dev/null || { sudo apt-get -qq update && sudo apt-get -qq install -y nfs-common; }
sudo mkdir -p /mnt/shared
grep -q ' /mnt/shared ' /etc/fstab || echo "$nfs /mnt/shared nfs _netdev,nofail 0 0" | sudo tee -a /etc/fstab >/dev/null
mountpoint -q /mnt/shared || sudo mount /mnt/shared
END
  fi
  if [[ -n "$2" ]]; then
    printf 'data=%s\n' "$(quoted "${2%/}")"
    cat <<'END'
sudo install -d -o "$USER" /mnt/data
gcloud storage rsync --recursive "$data" /mnt/data
END
  fi
  # The Python of TPU software is too old; uv brings one of its own.
  cat <<'END'
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
uv python install --quiet 3.12
export PYTHON="$(uv python find 3.12)"
cd shortcut_jax
source launch/env.sh
setup_env tpu
END
}

# start_script MODULE FLAG...: starts the program as a service of systemd. It outlives ssh and, being
# enabled, a restart of the worker; it gets SIGTERM and time to save when the worker goes down.
start_script() {
  local module="$1"
  shift
  # tpu first, so that a worker whose chips do not answer is refused instead of training on its CPU.
  printf '%s\n' 'set -euo pipefail' "cat >~/run.sh <<'RUN'" 'cd ~/shortcut_jax' \
    "exec env JAX_PLATFORMS=tpu,cpu .venv/bin/python -m $(quoted_words "$module" "$@")" 'RUN'
  # 75: told to stop, and has saved. Any other failure is tried again, too, because a worker that
  # restarts makes the others fail; six in an hour are enough.
  # mixed: only the main process gets SIGTERM; it ends its own workers.
  # memlock: the TPU driver pins host memory. nofile: a data set may have 1,024 shards.
  cat <<END
sudo tee /etc/systemd/system/shortcut_jax.service >/dev/null <<UNIT
[Unit]
Description=$module
Wants=network-online.target
After=network-online.target remote-fs.target
StartLimitIntervalSec=3600
StartLimitBurst=6

[Service]
User=\$USER
WorkingDirectory=\$HOME
ExecStart=/bin/bash \$HOME/run.sh
Restart=on-failure
RestartForceExitStatus=$PREEMPTED
SuccessExitStatus=$PREEMPTED
RestartSec=10
KillMode=mixed
TimeoutStopSec=120
LimitMEMLOCK=infinity
LimitNOFILE=65536
StandardOutput=append:\$HOME/$LOG
StandardError=inherit

[Install]
WantedBy=multi-user.target
UNIT
sudo systemctl daemon-reload
sudo systemctl reset-failed shortcut_jax 2>/dev/null || true
sudo systemctl enable --quiet shortcut_jax
sudo systemctl restart shortcut_jax
END
}
