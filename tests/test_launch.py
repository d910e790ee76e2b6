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
from tests.launching import ROOT, RUN, TPU, launch
from tests.sentences import assert_sentence

LAUNCHERS = ["local.sh", "gpu.sh", "slurm.sbatch", "tpu_vm.sh", "gke.sh"]
EXPECTED = make_launch.read()

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


def test_the_programs_have_the_flags_that_are_used():
    used = set()
    for text in EXPECTED.values():
        # In the JobSet the words of the command are lines of YAML.
        words = re.sub(r'\n +- "?(.*?)"?(?=\n)', r" \1", text)
        for module, flags in re.findall(r"-m (shortcut_jax\.\w+)((?: '?--[\w.]+[^\n]*)?)", words):
            used |= {(module, flag) for flag in re.findall(r"--(\w+)", flags)}
    assert {("shortcut_jax.main", "workdir"), ("shortcut_jax.cache_latents", "out")} <= used
    assert {(m, f) for m, f in used if f not in flags_of(m)} == set()


@pytest.mark.parametrize("command", [c for c in EXPECTED if "gke.sh train" in c])
def test_the_job_set_is_yaml_with_the_flags_as_typed(command):
    job_set = yaml.safe_load("\n".join(EXPECTED[command].splitlines()[1:-1]))
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == (4 if "spot" in command else 2)
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"][:3] == ["python", "-m", "shortcut_jax.main"]
    assert container["command"][3:] == shlex.split(command.partition(" -- ")[2])
    assert container["env"] == [{"name": "JAX_PLATFORMS", "value": "tpu,cpu"}]
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


@pytest.mark.parametrize(
    ("said", "found"),
    [({}, "cuda"), ({"JAX_PLATFORMS": "rocm"}, "rocm"), ({"JAX_PLATFORMS": ""}, "")],
)
def test_the_tasks_of_a_job_do_not_fall_back_to_the_cpu(slurm, stand_in, tmp_path, said, found):
    slurm["ENV_PYTHON"] = str(stand_in("python", 'echo "platform=$JAX_PLATFORMS"'))
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | slurm | said
    command = ["bash", "launch/slurm.sbatch", *RUN]
    done = subprocess.run(command, env=env, cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"platform={found}\n")


def test_a_job_from_elsewhere_is_refused(slurm, tmp_path):
    slurm["SLURM_SUBMIT_DIR"] = str(tmp_path)
    done = launch("slurm.sbatch", *RUN, env=slurm)
    assert done.returncode == 1
    assert_sentence(
        done.stderr, [str(tmp_path), "launch/common.sh", "submit the job from the root"]
    )


# ------------------------------------------------------------------ for real


TWO_DEVICES = "--xla_force_host_platform_device_count=2"


def steps_logged(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [line["step"] for line in map(json.loads, lines) if "loss" in line]


def flags_for(workdir, *flags):
    config = "--config=configs/digits.py:small,objective=flow_matching"
    return ["--", config, f"--workdir={workdir}", "--config.eval.every=0", *flags]


def test_local_trains_and_a_slurm_job_goes_on(slurm, tmp_path):
    env = {"ENV_PYTHON": sys.executable, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = launch("local.sh", "--devices=2", *flags_for(tmp_path / "run"), env=env)
    assert done.returncode == 0, done.stderr
    assert steps_logged(tmp_path / "run") == [2, 4, 6, 8]
    env |= slurm | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": TWO_DEVICES}
    flags = flags_for(tmp_path / "run", "--config.total_steps=12")
    done = launch("slurm.sbatch", *flags, env=env)
    assert done.returncode == 0, done.stderr
    assert "Resumed from step 8" in done.stderr
    assert steps_logged(tmp_path / "run") == [2, 4, 6, 8, 10, 12]


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
