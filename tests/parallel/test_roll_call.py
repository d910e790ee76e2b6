"""Everyone hears the same, whoever comes first, late, twice or not at all."""

import contextlib
import socket
import threading
import time

import pytest

from shortcut_jax.errors import UserError
from shortcut_jax.parallel import roll_call
from tests.sentences import assert_sentence


@pytest.fixture
def address():
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    return f"localhost:{port}"


def call(address, places, timeout=0.6):
    """What each (count, index) of `places` hears: "" if all are there."""
    heard = [None] * len(places)

    def come(i):
        count, index = places[i]
        try:
            roll_call.answer(address, count, index, timeout)
            heard[i] = ""
        except UserError as error:
            heard[i] = str(error)

    threads = [threading.Thread(target=come, args=(i,)) for i in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return heard


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0)])
def test_all_come(address, order):
    assert call(address, [(4, i) for i in order], timeout=20) == [""] * 4
    assert call(address, [(4, i) for i in order], timeout=20) == [""] * 4  # the port is free again


def test_all_hear_who_is_missing(address):
    zero, two = call(address, [(4, 0), (4, 2)])
    assert zero == two
    assert_sentence(zero, ["processes 1, 3 did not come", address, "0.6 s", "--init_timeout"])


def test_without_process_0_each_ends(address):
    (sentence,) = call(address, [(2, 1)])
    assert_sentence(sentence, ["process 0 of 2", "process 1", address, "0.6 s", "--coordinator"])


def test_two_with_the_same_number(address):
    for sentence in call(address, [(3, 0), (3, 1), (3, 1)], timeout=20):
        assert_sentence(sentence, ["two processes", "--process_id=1", "0 to 2"])


def test_different_counts(address):
    for sentence in call(address, [(2, 0), (3, 1)], timeout=20):
        assert_sentence(sentence, ["process 1", "--num_processes=3", "process 0 with 2"])


def test_what_is_no_process_is_ignored(address):
    host, _, port = address.rpartition(":")
    zero = threading.Thread(target=roll_call.answer, args=(address, 2, 0, 20))
    zero.start()
    said = False
    while not said:
        with contextlib.suppress(ConnectionRefusedError):  # until process 0 listens
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            said = True
        time.sleep(0.01)
    assert call(address, [(2, 1)], timeout=20) == [""]
    zero.join(20)
    assert not zero.is_alive()


def test_a_port_in_use_and_no_address(address):
    with socket.create_server(("", int(address.rpartition(":")[2]))):
        assert_sentence(call(address, [(2, 0)])[0], [address, "cannot be listened on", "port"])
    for wrong in ("localhost", "localhost:", ":1", "localhost:70000"):
        assert_sentence(call(wrong, [(2, 1)])[0], [f"--coordinator={wrong}", "HOST:PORT"])


def test_a_number_that_is_none_of_them(address):
    assert_sentence(call(address, [(2, 2)])[0], ["--process_id=2", "--num_processes=2", "0 to 1"])
