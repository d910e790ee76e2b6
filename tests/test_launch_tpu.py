"""The launcher of TPU VMs, with a stand-in for gcloud: what it does when, and to the workers."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.launching import ROOT, RUN, TPU, launch
from tests.sentences import assert_sentence

# Answers each `describe` and `ssh` of the service with the next line of $AT/KIND, the last one for
# ever; "!" is an error. Everything else is only written down.
GCLOUD = """
kind="$4"
case "$*" in *"systemctl show"*) kind=service ;; esac
echo "$kind ${*:3:1} ${*: -1:1}" | head -n 1 | cut -c 1-60 >>"$AT/calls"
[[ -f "$AT/$kind" ]] || exit 0
answer="$(head -n 1 "$AT/$kind")"
[[ "$(wc -l <"$AT/$kind")" -eq 1 ]] || sed -i 1d "$AT/$kind"
if [[ "$answer" == "!"* ]]; then echo "${answer#!}" >&2; exit 1; fi
echo "$answer"
"""
RUNNING = "ActiveState=active Result=success ExecMainStatus=0 ExecMainStartTimestamp=Sat 2026"
FINISHED = "ActiveState=inactive Result=success ExecMainStatus=0 ExecMainStartTimestamp=Sat 2026"
STOPPED = "ActiveState=inactive Result=success ExecMainStatus=75 ExecMainStartTimestamp=Sat 2026"
NOT_STARTED = "ActiveState=inactive Result=success ExecMainStatus=0 ExecMainStartTimestamp="
FAILED = "ActiveState=failed Result=exit-code ExecMainStatus=1 ExecMainStartTimestamp=Sat 2026"


@pytest.fixture
def checkout(tmp_path):
    """A repository with the launchers, everything committed."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("launch", "constraints"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", "-C", str(folder)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "Begin"]):
        subprocess.run([*git, *command], check=True)
    return folder


@pytest.fixture
def tpu(stand_in, checkout, tmp_path):
    """`tpu(COMMAND, ..., describe=[...], service=[...])`: process, and gcloud's calls in order."""
    stand_in("gcloud", GCLOUD)

    def run(command, *args, **answers):
        for kind, lines in answers.items():
            (tmp_path / kind).write_text("".join(f"{line}\n" for line in lines))
        args = [command, *TPU, "--poll=0", *args, *RUN]
        done = launch("tpu_vm.sh", *args, env=stand_in.env, root=checkout)
        calls = tmp_path / "calls"
        return done, calls.read_text().split("\n")[:-1] if calls.exists() else []

    return run


def kinds(calls):
    return [call.split()[0] for call in calls]


def test_watch_ends_with_the_run(tpu):
    done, calls = tpu("watch", describe=["READY"], service=[NOT_STARTED, RUNNING, FINISHED])
    assert done.returncode == 0 and "has finished" in done.stderr
    assert kinds(calls) == ["describe", "service"] * 3


def test_a_stopped_run_is_no_finished_one(tpu):
    done, _ = tpu("watch", describe=["READY"], service=[STOPPED])
    assert done.returncode == 0 and "was stopped" in done.stderr


def test_a_failed_run_shows_its_log_and_costs_no_new_slice(tpu):
    done, calls = tpu("watch", describe=["READY"], service=[RUNNING, FAILED])
    assert done.returncode == 1
    assert_sentence(done.stderr.splitlines()[-1], ["run on sj has failed", "start and watch"])
    assert kinds(calls)[-2:] == ["service", "ssh"] and "tail -n 50" in calls[-1]
    assert "create" not in kinds(calls)


@pytest.mark.parametrize("gone", ["PREEMPTED", "TERMINATED", "!ERROR: NOT_FOUND: no such node"])
def test_a_preempted_slice_is_made_again(tpu, gone):
    states = ["READY", gone, "READY"]
    done, calls = tpu("watch", "--spot", describe=states, service=[RUNNING, FINISHED])
    assert done.returncode == 0, done.stderr
    assert kinds(calls) == [
        "describe", "service", "describe", "delete", "create", "scp", "ssh", "ssh",
        "describe", "service",
    ]  # fmt: skip
    assert calls[4] == "create tpu-vm --spot"


def test_a_slice_that_cannot_be_asked_is_left_alone(tpu):
    states = ["!ERROR: could not resolve host", "READY"]
    done, calls = tpu("watch", describe=states, service=[FINISHED])
    assert done.returncode == 0
    assert kinds(calls) == ["describe", "describe", "service"]


def test_capacity_that_is_not_there_is_asked_for_again(tpu):
    done, calls = tpu(
        "watch", describe=["PREEMPTED", "READY"], create=["!no capacity", "made"],
        service=[FINISHED],
    )  # fmt: skip
    assert done.returncode == 0
    assert kinds(calls)[1:6] == ["delete", "create", "delete", "create", "scp"]


def test_train_waits_in_the_queue(tpu):
    states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "READY"]
    done, calls = tpu("train", "--queued", describe=states, service=[FINISHED])
    assert done.returncode == 0
    assert kinds(calls) == ["create", *["describe"] * 3, "scp", "ssh", "ssh", "describe", "service"]


def test_a_request_that_failed_ends_train(tpu):
    done, calls = tpu("train", "--queued", describe=["FAILED"])
    assert done.returncode == 1 and "ended as FAILED" in done.stderr
    assert kinds(calls) == ["create", "describe"]


def test_changes_that_are_not_committed_are_refused(tpu, checkout):
    (checkout / "setup.py").write_text("")
    done, calls = tpu("train")
    assert done.returncode == 1 and calls == []
    assert_sentence(done.stderr, [str(checkout), "not committed", "commit them"])


# A worker: what ssh runs, runs here, with $AT/home as the home folder.
WORKER = """
case "$4" in
  scp) cp "$5" "$AT/home/${6#*:}" ;;
  ssh) for word; do case "$word" in --command=*) HOME="$AT/home" USER=someone bash -c "${word#*=}" ;; esac; done ;;
esac
"""  # noqa: E501


def test_the_scripts_for_the_workers_do_what_they_say(stand_in, checkout, tmp_path):
    (tmp_path / "home").mkdir()
    stand_in("gcloud", WORKER)
    # tee: files of root go below $AT/root.
    stand_in("sudo", """
case "$1" in
  tee) mkdir -p "$AT/root$(dirname "$2")"; tee "$AT/root$2" ;;
  systemctl) echo "$*" >>"$AT/systemctl" ;;
  *) exit 1 ;;
esac
""")  # fmt: skip
    stand_in("uv", f"""
echo "$*" >>"$AT/uv"
[[ "$*" != "python find"* ]] || echo {sys.executable}
[[ "$1" != venv ]] || mkdir -p "${{@: -1}}/bin"
""")  # fmt: skip
    for command in ("install", "start", "install"):  # and again
        args = [command, *TPU, "--", "--config=a b.py", "--workdir=$HOME/it's"]
        done = launch("tpu_vm.sh", *args, env=stand_in.env, root=checkout)
        assert done.returncode == 0, done.stderr
    home = tmp_path / "home"
    heads = [
        subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, check=True)
        for folder in (checkout, home / "shortcut_jax")
    ]
    assert heads[0].stdout == heads[1].stdout
    installed = (tmp_path / "uv").read_text()
    assert "[tpu]" in installed and "--compile-bytecode" in installed
    python = home / "shortcut_jax" / ".venv" / "bin" / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([os.environ['JAX_PLATFORMS'], *sys.argv[1:]]))\n"
    )
    python.chmod(0o755)
    env = {**os.environ, "HOME": str(home)}
    done = subprocess.run(["bash", home / "run.sh"], env=env, capture_output=True, check=True)
    flags = ["--config=a b.py", "--workdir=$HOME/it's"]
    assert json.loads(done.stdout) == ["tpu,cpu", "-m", "shortcut_jax.main", *flags]
    unit = tmp_path / "root/etc/systemd/system/shortcut_jax.service"
    text = unit.read_text()
    assert f"ExecStart=/bin/bash {home}/run.sh" in text and "User=someone" in text
    assert "Restart=on-failure\nRestartForceExitStatus=75\n" in text and "StartLimitBurst" in text
    assert (tmp_path / "systemctl").read_text().endswith("systemctl restart shortcut_jax\n")
    if shutil.which("systemd-analyze"):
        unit.write_text(text.replace("User=someone", "User=root"))
        done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
        assert [line for line in done.stderr.splitlines() if "shortcut_jax" in line] == []
