"""The benchmark of a GPU in its small form, on a CPU; what it reports; what it refuses."""

import dataclasses
import importlib.util
import json
import keyword
import math
import os
import re
import select
import subprocess
import sys

import pytest

from shortcut_jax.benchmarks import Failure, correct, gpu_parts, gpu_report, summarize, variants
from shortcut_jax.benchmarks.gpu_parts import GRACE
from shortcut_jax.benchmarks.peer import FOLDER
from tests.sentences import assert_sentence

COMMAND = ["-m", "shortcut_jax.gpu_benchmark", "--small"]


# ---- everything, in small ------------------------------------------------------------------------


@pytest.mark.slow
def test_the_small_form_runs_and_reports(run_python, tmp_path):
    parts = "--parts=check,xl2,features"
    done = run_python([*COMMAND, parts, f"--out={tmp_path}", "--minutes=20"], timeout=1200)
    assert done.returncode == 0
    text = (tmp_path / "report.txt").read_text()
    assert "checks: " in text and "FAILED" not in text and "xl2/" not in text.splitlines()[1]
    check, xl2 = (gpu_report.read(tmp_path / f"{name}.json") for name in ("check", "xl2"))
    names = {m["name"] for m in check.measurements}
    assert {"check/attention/xla/small/dq", "check/repeats/xla", "check/step/params"} <= names
    (winner,) = (m for m in xl2.measurements if m["name"] == "xl2: winner")
    rates = {m["name"]: m["value"] for m in xl2.measurements if m["name"].endswith(": rows")}
    shortcut = [value for name, value in rates.items() if "shortcut" in name]
    assert winner["value"] == max(shortcut) and len(shortcut) >= 4
    # The same command again runs nothing.
    again = run_python([*COMMAND, parts, f"--out={tmp_path}"])
    assert again.stdout.count("done before") == 3 and again.returncode == 0


def test_checks_run_and_pass_in_small(tmp_path):
    settings = gpu_parts.Settings(small=True, torch_python="", authors="")
    wanted = {"attention", "network/xla"}
    pieces = {n: piece for n, piece in correct.checks(True).items() if n in wanted}
    assert pieces.keys() == wanted
    content = run_pieces(tmp_path, settings, pieces)
    assert content.failures == [] and len(content.measurements) == 4 + 2
    assert all(m["conditions"]["passed"] for m in content.measurements)
    assert gpu_report.report(tmp_path)[1]


def run_pieces(folder, settings, pieces):
    path = folder / "part.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_parts, "PARTS", {"part": lambda settings: pieces})
        gpu_parts.run_part("part", settings, path)
    return gpu_report.read(path)


# ---- what fails ----------------------------------------------------------------------------------

SETTINGS = gpu_parts.Settings(small=True, torch_python="", authors="")


def test_a_piece_that_fails_leaves_the_others_and_what_it_had_found(tmp_path):
    def breaks():
        yield summarize("breaks/first", [1.0], "s", {})
        assert json.loads((tmp_path / "part.json").read_text())["measurements"]  # as it goes
        raise RuntimeError("INTERNAL: an illegal memory access was encountered")

    def works():
        yield correct.checked("works", 0.5, 1.0)

    content = run_pieces(tmp_path, SETTINGS, {"breaks": breaks, "works": works})
    assert [m["name"] for m in content.measurements] == ["breaks/first", "check/works"]
    assert [f["name"] for f in content.failures] == ["breaks"]
    assert "illegal memory access" in content.failures[0]["error"]
    assert content.seconds is not None and not gpu_report.ended(tmp_path / "part.json")
    text, good = gpu_report.report(tmp_path)
    assert not good and "FAILED breaks: RuntimeError" in text and "1 of 1 passed" in text


def test_nothing_is_begun_when_the_time_is_up(tmp_path):
    late = dataclasses.replace(SETTINGS, deadline=-math.inf)
    content = run_pieces(tmp_path, late, {"a": lambda: pytest.fail("begun")})
    assert content.failures == [
        {"name": "a", "error": "not begun: the time is up", "too_large": False}
    ]
    found = list(variants.Sweep("xl2", {}, 16, deadline=-math.inf).run())
    assert found and all(isinstance(f, Failure) and "time is up" in f.error for f in found)


def test_a_variant_that_fails_is_not_the_winner(monkeypatch):
    rates = {"none": 3.0, "dots": 2.0, "full": 1.0}

    def measure(self, name, variant, contender):
        if not variant.scan_layers:
            raise MemoryError("too much")
        if contender == variants.OBJECTIVE:
            self.rates[variant] = rates[variant.remat]
        return [summarize(f"{name}: rows", [rates[variant.remat]], "rows / s", {})]

    monkeypatch.setattr(variants.Sweep, "_measure", measure)
    found = list(variants.Sweep("b2", {}, 16, deadline=math.inf).run())
    (failed,) = (f for f in found if isinstance(f, Failure))
    assert "xla,none,unrolled,16" in failed.name and "MemoryError: too much" in failed.error
    numbers = {f.name: f for f in found if not isinstance(f, Failure)}
    assert numbers["b2: winner"].conditions["variant"] == "xla,none,scanned,16"
    assert numbers["b2: winner"].value == 3.0
    assert "b2/flow_matching/xla,none,scanned,16: rows" in numbers


@pytest.mark.parametrize(
    ("error", "too_large"),
    [
        (MemoryError("needs 90.0 GB of 80.0"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"), True),
        (RuntimeError("INTERNAL: cuDNN"), False),
    ],
)
def test_what_does_not_fit_is_a_result_and_is_not_tried_again(
    monkeypatch, tmp_path, error, too_large
):
    def measure(self, name, variant, contender):
        if variant.remat == "none":
            raise error
        self.rates[variant] = 1.0
        return [summarize(f"{name}: MFU", [0.5], "", {})]

    monkeypatch.setattr(variants.Sweep, "_measure", measure)
    sweep = variants.Sweep("b2", {}, 16, deadline=math.inf)
    content = run_pieces(tmp_path, SETTINGS, {"b2": sweep.run})
    (failure,) = content.failures
    assert "none" in failure["name"] and failure["too_large"] is too_large
    assert gpu_report.ended(tmp_path / "part.json") is too_large
    text, good = gpu_report.report(tmp_path)
    assert good is too_large and ("DOES NOT FIT b2/" in text) is too_large


def test_where_the_first_does_not_fit_something_is_wrong(monkeypatch):
    def measure(self, name, variant, contender):
        raise MemoryError("RESOURCE_EXHAUSTED")  # others have the memory

    monkeypatch.setattr(variants.Sweep, "_measure", measure)
    found = list(variants.Sweep("b2", {}, 16, deadline=math.inf).run())
    assert found and not any(f.too_large for f in found)


def test_large_networks_are_not_begun_on_a_cpu(tmp_path):
    large = dataclasses.replace(SETTINGS, small=False)
    content = run_pieces(tmp_path, large, {"a": lambda: pytest.fail("begun")})
    (failure,) = content.failures
    assert_sentence(failure["error"], ["on a CPU", "a GPU", "--small"])
    assert not gpu_report.ended(tmp_path / "part.json")


def test_a_part_gets_the_memory_and_keeps_its_programs_beside_its_file(tmp_path):
    given = {"JAX_COMPILATION_CACHE_DIR": "/elsewhere", "HOME": "/home"}  # as `cli.main` names it
    found = gpu_parts.environment("xl2", tmp_path, given)
    assert found == {
        "HOME": "/home",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "XLA_CLIENT_MEM_FRACTION": "0.94",
    }
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        found = gpu_parts.environment("xl2", tmp_path, {name: "0.5"})  # jax refuses both at once
        assert {k: v for k, v in found.items() if k.startswith("XLA")} == {name: "0.5"}
    for part, platforms, expected in (
        ("torch_xl2", "cuda", "cpu"), ("xl2", "cuda", "cuda,cpu"), ("xl2", "cpu", "cpu")
    ):  # fmt: skip
        found = gpu_parts.environment(part, tmp_path, {"JAX_PLATFORMS": platforms})
        assert found["JAX_PLATFORMS"] == expected


def test_an_error_beyond_its_bound_or_that_is_no_number_fails(tmp_path):
    for value, passed in ((0.5, True), (1.5, False), (math.nan, False)):
        content = gpu_report.Content("check", {})
        found = correct.checked("x", value, 1.0)
        assert found.conditions["passed"] is passed
        content.add(tmp_path / "check.json", found)
        text, good = gpu_report.report(tmp_path)
        assert good is passed and ("FAILED check/x" in text) is not passed


def test_a_process_that_dies_is_reported(run_python, tmp_path):
    # A Python that ends at once in place of the one with PyTorch.
    dies = tmp_path / "python"
    dies.write_text("#!/bin/sh\nexit 3\n")
    dies.chmod(0o755)
    args = [*COMMAND, "--parts=torch_b2", f"--out={tmp_path / 'out'}", f"--torch_python={dies}"]
    done = run_python([*args, "--in_process"])
    assert done.returncode == 1 and "FAILED torch_b2" in done.stdout
    (failure,) = gpu_report.read(tmp_path / "out" / "torch_b2.json").failures
    assert "without a word" in failure["error"]
    gpu_report.add_failure(tmp_path / "out" / "b2.json", "b2", "its process ended with -11")
    assert "b2: its process ended with -11" in gpu_report.report(tmp_path / "out")[0]
    assert GRACE > 0


# ---- the other side ------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [True, False], ids=["it ends", "it is killed"])
def test_no_process_of_a_part_is_left(tmp_path, ends):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    child = f"exec > {pipe}; sleep 600 & " + ("exit 3" if ends else "wait")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    if ends:
        assert gpu_parts.run_group(["sh", "-c", child], os.environ, 60) == 3
    else:
        with pytest.raises(subprocess.TimeoutExpired):
            gpu_parts.run_group(["sh", "-c", child], os.environ, 0.5)
    os.set_blocking(reader, True)
    assert select.select([reader], [], [], 20)[0] and os.read(reader, 1) == b""  # no writer is left
    os.close(reader)


def test_torch_compile_can_name_every_part_of_the_network():
    """In the Python that it writes: a part called "in" was a SyntaxError there."""
    text = (FOLDER / "torch_dit.py").read_text()
    names = re.findall(r'add_module\(f?"(\w+)', text)
    assert names and not any(keyword.iskeyword(name) for name in names)


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs PyTorch: pip install -e .[parity]"
)
def test_torch_compiles_the_step_to_one_program(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
import torch, torch_dit
from torch._dynamo import explain
model = dict(patch_size=2, hidden_size=16, depth=2, num_heads=2, num_classes=3, mlp_ratio=4.0)
network = torch_dit.build(model | dict(time_scale=1000.0), [4, 4, 4])
names = [n.replace(".first.", ".in.") for n in network.state_dict()]
network.load_state_dict(torch_dit.named(dict(zip(names, network.state_dict().values()))))
optimizer = dict(lr=1e-4, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.1)
arguments = dict(model=model, image_shape=[4, 4, 4], batch_size=4, dtype="bfloat16", max_steps=8)
arguments |= dict(ema_rate=0.999, optimizer=optimizer, compile=False)
training = torch_dit.Training(arguments, network, "cpu")
for bootstrap in (0, 1):
    torch._dynamo.reset()
    found = explain(training._loss_and_targets)(bootstrap)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found
    training.step(bootstrap)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=250, cwd=tmp_path)


# ---- the report ----------------------------------------------------------------------------------


def test_the_report_compares_at_one_batch_and_names_the_winner(tmp_path):
    content = gpu_report.Content("xl2", {"device": "a card"})
    for name, value, extra in (
        ("shortcut_1_4/cudnn,none,scanned,64", 100.0, 0.45),
        ("shortcut_1_4/cudnn,none,scanned,256", 150.0, 0.55),
        ("flow_matching/cudnn,none,scanned,64", 130.0, 0.4),
    ):
        for what, number in (
            ("rows", value),
            ("MFU", extra),
            ("peak memory", 9),
            ("compilation", 1),
        ):
            content.add(tmp_path / "xl2.json", summarize(f"xl2/{name}: {what}", [number], "", {}))
    for what, variant in (("same batch", 64), ("winner", 256)):
        conditions = {"variant": f"cudnn,none,scanned,{variant}", "batch_size": variant}
        content.add(tmp_path / "xl2.json", summarize(f"xl2: {what}", [1.0], "rows / s", conditions))
    for other, value in (("torch", 80.0), ("authors", 125.0)):
        theirs = gpu_report.Content(f"{other}_xl2", {})
        found = summarize(f"{other}_xl2/shortcut_1_4: rows", [value], "rows / s", {})
        theirs.add(tmp_path / f"{other}_xl2.json", found)
    text, good = gpu_report.report(tmp_path)
    assert good
    assert "ours 100 rows / s, torch 80: 1.25 x" in text
    assert "ours 100 rows / s, authors 125: 0.80 x" in text
    starred = [line for line in text.splitlines() if line.startswith("*")]
    assert len(starred) == 1 and "cudnn,none,scanned,256" in starred[0] and "55.0%" in starred[0]
    assert "MFU of cudnn,none,scanned,256: 55.0%, at least the 50%" in text


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        (["--parts=check,nothing", "--out=x"], ("'nothing'", "xl2", "choose among them")),
        (["--parts=check"], ("--out is empty", "set --out=")),
    ],
)
def test_wrong_flags_are_a_sentence(run_python, args, fragments):
    done = run_python([*COMMAND, *args])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert_sentence(done.stderr.splitlines()[-1], fragments)


def test_parts_whose_other_side_is_not_given_are_left_out():
    assert gpu_parts.missing("torch_xl2", SETTINGS) == "--torch_python"
    assert gpu_parts.missing("authors_b2", SETTINGS) == "--authors"
    assert gpu_parts.missing("xl2", SETTINGS) == ""
    given = dataclasses.replace(SETTINGS, torch_python="python3")
    assert gpu_parts.missing("torch_xl2", given) == ""
