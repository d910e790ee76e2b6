"""What is read from a trace: unions of spans, in a table and a timeline."""

import jax
import pytest

from shortcut_jax.benchmarks import trace
from shortcut_jax.errors import UserError
from tests.sentences import assert_sentence


def test_overlaps_count_once_and_what_sticks_out_does_not():
    spans = [(0.0, 4.0), (1.0, 2.0), (3.0, 6.0), (8.0, 20.0)]
    assert trace.covered(spans, (2.0, 10.0)) == (6 - 2) + (10 - 8)
    assert trace.covered([], (2.0, 10.0)) == 0


def test_the_table_gives_milliseconds_per_step_and_shares():
    million = 1e6
    found = trace.Found(
        {"data": [(million, 2 * million)], "log": []},
        [(0.0, 3 * million), (4 * million, 10 * million)],
    )
    lines = trace.text(found, steps=2).splitlines()
    assert lines[0] == "2 steps, 5.00 ms each"
    assert "| a program on the device | 4.500 | 90.00 % |" in lines
    assert "| data | 0.500 | 10.00 % |" in lines
    device, data = (line[25:] for line in lines[-3:-1])
    assert device == "#" * 24 + " " * 8 + "#" * 48
    assert data == " " * 8 + "#" * 8 + " " * 64


def test_host_and_device_are_found_in_a_trace_of_jax(tmp_path):
    program = jax.jit(lambda a: (a @ a).sum())
    matrix = jax.numpy.ones((500, 500))
    program(matrix).block_until_ready()
    with jax.profiler.trace(tmp_path):
        for _ in range(3):
            with jax.profiler.TraceAnnotation("dispatch"):
                out = program(matrix)
            out.block_until_ready()
    found = trace.read(tmp_path)
    assert len(found.host["dispatch"]) == 3 and not found.host["data"]
    assert len(found.device) == 3
    begin, end = found.whole
    assert 0 < trace.covered(found.device, found.whole) <= end - begin


def test_a_folder_without_a_trace_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no trace") as error:
        trace.read(tmp_path)
    assert_sentence(str(error.value), [str(tmp_path), "--from_step"])


def test_a_gpu_has_kernels_and_transfers_on_its_streams(tmp_path):
    """And no line of programs, which a TPU has."""

    def plane(name, line, events):
        names = dict(enumerate(sorted({event for event, *_ in events}), start=1))
        known = {event: number for number, event in names.items()}
        metadata = "".join(
            f'event_metadata {{ key: {i} value {{ id: {i} name: "{event}" }} }}'
            for i, event in names.items()
        )
        found = "".join(
            f"events {{ metadata_id: {known[event]} offset_ps: {1000 * at} "
            f"duration_ps: {1000 * took} }}"
            for event, at, took in events
        )
        return f'planes {{ name: "{name}" {metadata} lines {{ name: "{line}" {found} }} }}'

    kernels = [("MemcpyH2D", 0, 5), ("gemm", 10, 20), ("fusion", 30, 10), ("Memset", 50, 5)]
    stream = "Stream #118(MemcpyH2D,Compute,Memset)"
    text = plane("/device:GPU:0", stream, kernels)
    text += plane("/device:GPU:1", stream, [("gemm", 0, 100)])
    text += plane("/host:CPU", "python", [("dispatch", 5, 3)])
    content = jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)
    (tmp_path / "host.xplane.pb").write_bytes(content)
    found = trace.read(tmp_path)
    assert found.device == [(10, 30), (30, 40)]
    assert found.host["dispatch"] == [(5, 8)]
