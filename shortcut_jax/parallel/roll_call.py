"""Who has come: processes that know each other's number and one address wait for all to be there.

jax.distributed does the same, but ends a process that waited in vain with an abort that names
nobody. So process 0 first listens at the address itself: every other one says its number there and
hears what came of it. The socket is closed before jax.distributed takes the address.
"""

import contextlib
import json
import re
import socket
import time

from shortcut_jax.errors import UserError

_GREETING = re.compile(r"shortcut_jax (\d+) of (\d+)\n")
_PATIENCE = 5.0  # seconds for one message over a connection that stands


def answer(address: str, count: int, index: int, timeout: float) -> None:
    """Returns when all processes are there.

    Args:
      address: HOST:PORT of process 0, on which nothing may listen yet.
      count: number of processes.
      index: of this one.
      timeout: seconds to wait.

    Raises:
      UserError: one is missing, two say the same number, or they expect different counts.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(
            f"--coordinator={address} is no address; expected HOST:PORT of process 0: give, for "
            "example, --coordinator=10.0.0.2:8476."
        )
    if not 0 <= index < count:
        raise UserError(
            f"--process_id={index} does not fit --num_processes={count}; expected 0 to "
            f"{count - 1}: give each process its own."
        )
    deadline = time.monotonic() + timeout
    if index == 0:
        sentence = _listen(address, int(port), count, deadline, timeout)
    else:
        sentence = _report((host.strip("[]"), int(port)), count, index, deadline, timeout)
    if sentence:
        raise UserError(sentence)


def _listen(address: str, port: int, count: int, deadline: float, timeout: float) -> str:
    """Process 0: the sentence for all, empty if all came."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        raise UserError(
            f"--coordinator={address} cannot be listened on by process 0 ({error}); expected a "
            "free port of this host: choose another one, or end what uses it."
        ) from error
    came: dict[int, socket.socket] = {}
    sentence = ""
    with server:
        while not sentence and len(came) < count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                sentence = _missing(address, sorted({*range(1, count)} - came.keys()), timeout)
                break
            greeting = _GREETING.fullmatch(_read_line(connection, _PATIENCE))
            if greeting is None:  # something that scans ports
                connection.close()
                continue
            index, expected = map(int, greeting.groups())
            if expected != count:
                sentence = (
                    f"process {index} was started with --num_processes={expected} and process 0 "
                    f"with {count}; expected the same on all: start them the same way."
                )
            elif index in came or index == 0:
                sentence = (
                    f"two processes were started with --process_id={index}; expected 0 to "
                    f"{count - 1}, each once: give each its own."
                )
            came[index if index not in came else -index] = connection
    for connection in came.values():
        with contextlib.suppress(OSError):  # it died meanwhile: jax.distributed will miss it
            connection.sendall(json.dumps(sentence).encode() + b"\n")
        connection.close()
    return sentence


def _report(
    address: tuple[str, int], count: int, index: int, deadline: float, timeout: float
) -> str:
    """Every other process: what process 0 says."""
    why = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=min(left, _PATIENCE)) as connection:
                connection.sendall(f"shortcut_jax {index} of {count}\n".encode())
                # Process 0 may have begun later, and then waits longer.
                reply = _read_line(connection, left + timeout)
            if reply:
                return json.loads(reply)
            why = "it hung up"
        except (OSError, ValueError) as error:
            why = str(error)
        time.sleep(0.2)
    return (
        f"process 0 of {count} did not answer process {index} at {address[0]}:{address[1]} within "
        f"{timeout:g} s ({why}); expected it to be started there: start all processes with the "
        "same --coordinator, open that port between the hosts, or wait longer with --init_timeout."
    )


def _missing(address: str, missing: list[int], timeout: float) -> str:
    names = ", ".join(map(str, missing))
    one = len(missing) == 1
    return (
        f"process{'' if one else 'es'} {names} did not come to {address} within {timeout:g} s; "
        f"expected {'it' if one else 'them'} to be started, too: start the same command on every "
        "host with its own --process_id, or wait longer with --init_timeout."
    )


def _read_line(connection: socket.socket, timeout: float) -> str:
    """One line of at most 4 KiB; what there is of it if the other side ends or says nothing."""
    connection.settimeout(timeout)
    received = b""
    try:
        while not received.endswith(b"\n") and len(received) < 2**12:
            part = connection.recv(2**12)
            if not part:
                break
            received += part
    except OSError:
        pass
    return received.decode(errors="replace")
