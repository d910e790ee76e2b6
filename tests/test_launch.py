"""The launchers: what they print, refuse and really do, here with stand-ins for clusters."""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.golden import make_launch
from tests.sentences import assert_sentence

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = ["local.sh", "gpu.sh", "slurm.sbatch", "tpu_vm.sh", "gke.sh"]
EXPECTED = make_launch.read()
RUN = ["--", "--config=configs/digits.py:small", "--workdir=runs/x"]
TPU = ["--name=sj", "--zone=z", "--type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"]


def launch(script, *args, env=None, root=ROOT, timeout=250):
    """A launcher as a process; nothing that it started is left behind."""
    command, variables = ["bash", f"launch/{script}", *args], {**os.environ, **(env or {})}
    with subprocess.Popen(
        command, cwd=root, env=variables, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@pytest.fixture
def stand_in(tmp_path):
    """`stand_in(NAME, SCRIPT)` puts an executable first on the PATH that `stand_in.env` has."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(name, script):
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
        return path

    make.env = {"PATH": f"{folder}:{os.environ['PATH']}", "AT": str(tmp_path)}
    return make


# ------------------------------------------------------------------ dry runs


@pytest.mark.parametrize("command", EXPECTED)
def test_dry_runs_print_what_is_stored(command):
    """If this is meant to change: python tests/golden/make_launch.py, and read the difference."""
    assert make_launch.run(command).rstrip() == EXPECTED[command].rstrip()


def flags_of(module, seen=None):
    """Flags that a module defines, or those of this package that it imports."""
    seen = set() if seen is None else seen
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    if module in seen or not path.is_file():
        return set()
    seen.add(module)
    found, imported = {"config"} if module == "shortcut_jax.config_flag" else set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("flags.DEFINE_"):
            found.add(node.args[0].value)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shortcut_jax"):
            imported |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found.union(*(flags_of(name, seen) for name in imported))


DISTRIBUTED = {"coordinator", "num_processes", "process_id"} <= flags_of("shortcut_jax.main")
needs_processes = pytest.mark.skipif(not DISTRIBUTED, reason="main has no --coordinator")


def test_the_programs_have_the_flags_that_are_used():
    used = set()
    for text in EXPECTED.values():
        # In the JobSet the words of the command are lines of YAML.
        words = re.sub(r'\n +- "?(.*?)"?(?=\n)', r" \1", text)
        for module, flags in re.findall(r"-m (shortcut_jax\.\w+)((?: '?--[\w.]+[^\n]*)?)", words):
            used |= {(module, flag) for flag in re.findall(r"--(\w+)", flags)}
    assert {("shortcut_jax.main", "workdir"), ("shortcut_jax.cache_latents", "out")} <= used
    if not DISTRIBUTED:  # they are used for several processes alone
        used -= {("shortcut_jax.main", f) for f in ("coordinator", "num_processes", "process_id")}
    assert {(m, f) for m, f in used if f not in flags_of(m)} == set()


@pytest.mark.parametrize("command", [c for c in EXPECTED if "gke.sh train" in c])
def test_the_job_set_is_yaml_with_the_flags_as_typed(command):
    job_set = yaml.safe_load("\n".join(EXPECTED[command].splitlines()[1:-1]))
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == (4 if "spot" in command else 2)
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"][:3] == ["python", "-m", "shortcut_jax.main"]
    assert container["command"][3:] == shlex.split(command.partition(" -- ")[2])
    rules = job["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"] == {
        "containerName": container["name"], "operator": "In", "values": [75]
    }  # fmt: skip


def test_awkward_flags_survive_yaml_and_shell():
    flags = ["--config=a", "--workdir=b", '--x=it\'s "q" \\ $HOME `id` é']
    printed = launch("gke.sh", "train", "--dry-run", "--name=n", "--image=i", "--", *flags).stdout
    job_set = yaml.safe_load("\n".join(printed.splitlines()[1:-1]))
    pod = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"][3:] == flags
    printed = launch("gpu.sh", "--dry-run", "--", *flags).stdout
    assert shlex.split(printed.splitlines()[-1])[-3:] == flags


# ------------------------------------------------------------------ help and refusals


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_explains_every_option(script):
    shown = launch(script, "--help")
    assert shown.returncode == 0 and "#" not in shown.stdout.split()[0]
    text = (ROOT / "launch" / script).read_text()
    (options,) = re.findall(r'^parse_options "([^"]+)"', text, re.MULTILINE)
    names = options.replace("\\\n", " ").replace("=", "").split()
    assert "module" in names
    assert [name for name in [*names, "dry-run"] if f"--{name}" not in shown.stdout] == []
    assert "YOUR_" not in text and "TODO" not in text


@pytest.mark.parametrize(
    ("script", "args", "fragments"),
    [
        ("local.sh", ["--dry-run"], ["--config is missing", "-- --config=VALUE"]),
        ("local.sh", ["--", "--config=a"], ["--workdir is missing", "every process must see"]),
        ("local.sh", ["--devices=0", *RUN], ["--devices=0", "whole number from 1"]),
        ("local.sh", ["--process=2", *RUN], ["--process=2 is not an option of local.sh"]),
        ("local.sh", ["--devices", *RUN], ["--devices has no value"]),
        ("local.sh", ["--config=a"], ["--config=a is not an option", "follow a lone --"]),
        ("gpu.sh", ["--dry-run=yes", *RUN], ["--dry-run=yes is not an option"]),
        ("slurm.sbatch", RUN, ["SLURM_JOB_ID is not set", "submit it with sbatch"]),
        ("slurm.sbatch", ["--install", "--dry-run"], ["--install has no dry run"]),
        ("tpu_vm.sh", ["begin"], ["begin is no command", "train, create"]),
        ("tpu_vm.sh", ["train", "--dry-run", *RUN], ["--name is missing", "--name=VALUE"]),
        ("tpu_vm.sh", ["status", "--name=a"], ["--zone is missing", "us-west4-a"]),
        ("tpu_vm.sh", ["train", *TPU], ["--config is missing"]),
        ("tpu_vm.sh", ["create", *TPU[:2]], ["--type is missing", "v5litepod-16"]),
        ("tpu_vm.sh", ["watch", *TPU[:3], *RUN], ["--version is missing"]),
        ("gke.sh", ["train", "--image=i", *RUN], ["--name is missing"]),
        ("gke.sh", ["train", "--name=n", *RUN], ["--image is missing", "image has pushed"]),
        ("gke.sh", ["cluster", "--cluster=c"], ["--location is missing"]),
        ("gke.sh", ["train", "--name=n", "--image=i", "--topology=4", *RUN], ["--topology=4 is"]),
        ("gke.sh", ["train", "--name=n", "--image=i", "--topology=3x3", *RUN],
         ["9 chips", "--chips=4"]),
    ],
)  # fmt: skip
def test_refusals_are_one_sentence(stand_in, script, args, fragments):
    for tool in ("gcloud", "kubectl", "docker", "srun", "nvidia-smi"):
        stand_in(tool, 'touch "$AT/used"')
    done = launch(script, *args, env=stand_in.env)
    assert done.returncode == 1 and done.stdout == ""
    assert_sentence(done.stderr, ["error: ", *fragments])
    assert not Path(stand_in.env["AT"], "used").exists()


def test_a_machine_without_a_gpu_is_refused(stand_in):
    stand_in("nvidia-smi", "exit 9")
    done = launch("gpu.sh", *RUN, env=stand_in.env)
    assert done.returncode == 1
    assert_sentence(done.stderr, ["finds no GPU", "launch/local.sh"])


# ------------------------------------------------------------------ starting again


@pytest.fixture
def program(stand_in):
    """A stand-in for Python: process I ends its n-th start with the n-th word of $AT/statuses-I.

    Starts are lines of $AT/starts-I. `wait` waits for SIGTERM and ends with 75.
    """
    python = stand_in("python", """
case "$1" in -c) echo 12345; exit ;; esac
id=0
for word in "$@"; do case "$word" in --process_id=*) id="${word#*=}" ;; esac; done
echo "$*" >>"$AT/starts-$id"
status="$(cut -d ' ' -f "$(wc -l <"$AT/starts-$id")" <"$AT/statuses-$id")"
if [[ "$status" == wait ]]; then
  trap 'touch "$AT/terminated-$id"; exit 75' TERM
  touch "$AT/waiting-$id"
  while :; do sleep 0.05; done
fi
exit "$status"
""")  # fmt: skip
    stand_in("nvidia-smi", 'echo "GPU 0"')
    stand_in.env["ENV_PYTHON"] = str(python)
    return stand_in


def starts(at, process=0):
    return (at / f"starts-{process}").read_text().splitlines()


@pytest.mark.parametrize("script", ["local.sh", "gpu.sh"])
@pytest.mark.parametrize(("statuses", "ends"), [("75 75 0", 0), ("75 3 0", 3), ("2 0", 2)])
def test_started_again_only_after_75(program, tmp_path, script, statuses, ends):
    (tmp_path / "statuses-0").write_text(statuses)
    done = launch(script, *RUN, env=program.env)
    assert done.returncode == ends
    assert starts(tmp_path) == [f"-m shortcut_jax.main {RUN[1]} {RUN[2]}"] * (
        statuses.split().index(str(ends)) + 1
    )


def test_processes_start_again_together(program, tmp_path):
    (tmp_path / "statuses-0").write_text("75 0")
    (tmp_path / "statuses-1").write_text("75 0")
    done = launch("local.sh", "--processes=2", *RUN, env=program.env)
    assert done.returncode == 0
    for process in range(2):
        wanted = f"--coordinator=localhost:12345 --num_processes=2 --process_id={process}"
        assert [line.endswith(wanted) for line in starts(tmp_path, process)] == [True, True]


def test_one_that_fails_takes_the_others_along(program, tmp_path):
    (tmp_path / "statuses-0").write_text("wait wait")
    (tmp_path / "statuses-1").write_text("4 4")
    done = launch("local.sh", "--processes=2", *RUN, env=program.env)
    assert done.returncode == 4
    assert (tmp_path / "terminated-0").exists() and len(starts(tmp_path)) == 1


def test_a_signal_to_the_launcher_is_the_end(program, tmp_path):
    (tmp_path / "statuses-0").write_text("wait 0")
    command = ["bash", "launch/local.sh", *RUN]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **program.env}) as process:
        for _ in range(200):
            if (tmp_path / "waiting-0").exists():
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
    assert (tmp_path / "terminated-0").exists() and len(starts(tmp_path)) == 1


# ------------------------------------------------------------------ SLURM

# As srun does: $TASKS processes with SLURM's variables; the highest status.
SRUN = """
echo "$*" >>"$AT/srun"
while [[ "$1" == --* ]]; do shift; done
for ((i = 0; i < TASKS; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=$TASKS SLURM_STEP_NODELIST=localhost \\
    SLURM_STEP_NUM_NODES=1 SLURM_STEP_ID=0 "$@" &
done
highest=0
for job in $(jobs -p); do wait "$job"; status=$?; ((status <= highest)) || highest=$status; done
exit "$highest"
"""


@pytest.fixture
def slurm(stand_in):
    """Environment of a job whose srun starts $TASKS processes here."""
    stand_in("srun", SRUN)
    stand_in("scontrol", 'echo "$*" >>"$AT/scontrol"')
    env = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_SUBMIT_DIR": str(ROOT), "TASKS": "1"}
    return {**stand_in.env, **env}


@pytest.mark.parametrize("status", [0, 2, 75])
def test_a_job_that_was_interrupted_is_queued_again(slurm, stand_in, tmp_path, status):
    slurm["ENV_PYTHON"] = str(stand_in("python", f"exit {status}"))
    # A copy elsewhere, as SLURM makes one.
    copy = shutil.copy(ROOT / "launch" / "slurm.sbatch", tmp_path / "slurm_script")
    done = subprocess.run(["bash", copy, *RUN], env={**os.environ, **slurm}, cwd="/", timeout=60)
    assert done.returncode == status
    queued = (tmp_path / "scontrol").exists()
    assert queued == (status == 75)
    if queued:
        assert (tmp_path / "scontrol").read_text() == f"requeue {os.getpid()}\n"


def test_a_job_from_elsewhere_is_refused(slurm, tmp_path):
    slurm["SLURM_SUBMIT_DIR"] = str(tmp_path)
    done = launch("slurm.sbatch", *RUN, env=slurm)
    assert done.returncode == 1
    assert_sentence(
        done.stderr, [str(tmp_path), "launch/common.sh", "submit the job from the root"]
    )


# ------------------------------------------------------------------ TPU VMs

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
    assert "[tpu]" in (tmp_path / "uv").read_text()
    python = home / "shortcut_jax" / ".venv" / "bin" / "python"
    python.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    python.chmod(0o755)
    env = {**os.environ, "HOME": str(home)}
    done = subprocess.run(["bash", home / "run.sh"], env=env, capture_output=True, check=True)
    flags = ["--config=a b.py", "--workdir=$HOME/it's"]
    assert json.loads(done.stdout) == ["-m", "shortcut_jax.main", *flags]
    unit = tmp_path / "root/etc/systemd/system/shortcut_jax.service"
    text = unit.read_text()
    assert f"ExecStart=/bin/bash {home}/run.sh" in text and "User=someone" in text
    assert "Restart=on-failure\nRestartForceExitStatus=75\n" in text and "StartLimitBurst" in text
    assert (tmp_path / "systemctl").read_text().endswith("systemctl restart shortcut_jax\n")
    if shutil.which("systemd-analyze"):
        unit.write_text(text.replace("User=someone", "User=root"))
        done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
        assert [line for line in done.stderr.splitlines() if "shortcut_jax" in line] == []


# ------------------------------------------------------------------ for real


TWO_DEVICES = "--xla_force_host_platform_device_count=2"


def steps_logged(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [line["step"] for line in map(json.loads, lines) if "loss" in line]


def flags_for(workdir, *flags):
    config = "--config=configs/digits.py:small,objective=flow_matching"
    return ["--", config, f"--workdir={workdir}", "--config.eval.every=0", *flags]


def test_local_trains_and_a_slurm_job_goes_on(slurm, tmp_path):
    env = {"ENV_PYTHON": sys.executable}
    done = launch("local.sh", "--devices=2", *flags_for(tmp_path / "run"), env=env)
    assert done.returncode == 0, done.stderr
    assert steps_logged(tmp_path / "run") == [2, 4, 6, 8]
    env |= slurm | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": TWO_DEVICES}
    flags = flags_for(tmp_path / "run", "--config.total_steps=12")
    done = launch("slurm.sbatch", *flags, env=env)
    assert done.returncode == 0, done.stderr
    assert "Resumed from step 8" in done.stderr
    assert steps_logged(tmp_path / "run") == [2, 4, 6, 8, 10, 12]


@needs_processes
@pytest.mark.slow
@pytest.mark.parametrize("script", ["local.sh", "slurm.sbatch"])
def test_two_processes_train(slurm, tmp_path, script):
    slurm |= {"ENV_PYTHON": sys.executable, "TASKS": "2"}
    args = ["--devices=2", "--processes=2"]
    if script == "slurm.sbatch":
        slurm |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": TWO_DEVICES}
        args = []
    done = launch(script, *args, *flags_for(tmp_path / "run"), env=slurm, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps_logged(tmp_path / "run") == [2, 4, 6, 8]
