"""What the binaries share: flags, and errors as one sentence without a traceback."""

import logging as stdlib_logging
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from absl import app, flags, logging

from shortcut_jax import compilation_cache
from shortcut_jax.errors import UserError
from shortcut_jax.files import raise_open_files_limit
from shortcut_jax.parallel import distributed, preemption

Parser = Callable[[Sequence[str]], list[str]]


def main(function: Callable[..., None], parse: Parser | None = None) -> None:
    """Parses the flags and calls `function`.

    A UserError or bad flag ends with status 2, `preemption.Preempted` with 75.

    Args:
      function: what the binary does; its arguments are the words that `parse` returns after the
        name of the program (none, where only flags are taken).
      parse: gives meaning to argv; by default plain flags.
    """

    def guarded(argv: Sequence[str]) -> None:
        compilation_cache.use()
        try:
            with distributed.devices_named():
                function(*argv[1:])
            distributed.wait_for_others()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            distributed.end(2)
        except preemption.Preempted as left:
            print(f"preempted: {left}: start the same command again.", file=sys.stderr)
            distributed.end(preemption.EXIT_STATUS)
        except Exception:
            if not distributed.several():
                raise
            traceback.print_exc()
            distributed.end(1)

    raise_open_files_limit()
    logging.set_verbosity(logging.INFO)
    # Orbax reports a dozen lines per save through the same logger, and jax every missing back end.
    logging.get_absl_handler().addFilter(
        lambda record: (
            record.levelno > stdlib_logging.INFO
            or not re.search("orbax|xla_bridge", record.pathname)
        )
    )
    app.run(guarded, flags_parser=parse or parse_flags)


def fail(sentence: str) -> NoReturn:
    """Prints one sentence and ends the process with status 2."""
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def parse_flags(argv: Sequence[str], positional: str = "") -> list[str]:
    """Parses plain flags; a wrong one ends the process.

    Args:
      argv: what was typed.
      positional: name of a flag that one argument without `--name=` sets.
    """
    try:
        rest = flags.FLAGS(argv)
        if positional and len(rest) == 2:
            flags.FLAGS[positional].parse(rest.pop())
        refuse_rest(rest)
        return rest
    except UserError as error:
        fail(str(error))
    except flags.Error as error:
        fail(explain(str(error)))


def split_command(
    argv: Sequence[str], commands: Mapping[str, Sequence[str]]
) -> tuple[list[str], list[str]]:
    """Splits PROGRAM COMMAND ARGUMENT ... --flag=value ... into words and flags.

    Args:
      argv: of the process.
      commands: the names of the arguments of each command.

    Returns:
      The command and its arguments; and PROGRAM with the flags, to be parsed.

    Raises:
      UserError: no such command, or not its arguments.
    """
    flags_from = next((i for i, a in enumerate(argv) if i and a.startswith("-")), len(argv))
    words = list(argv[1:flags_from])
    usages = [" ".join([name, *arguments]) for name, arguments in commands.items()]
    if not words or len(words) != 1 + len(commands.get(words[0], [])) or words[0] not in commands:
        found = f"{' '.join(words)!r} is not a command" if words else "the command is missing"
        raise UserError(
            f"{found}; expected one of {', '.join(usages)}, and flags after it: --help explains "
            "them."
        )
    return words, [argv[0], *argv[flags_from:]]


def refuse_rest(rest: Sequence[str]) -> None:
    """Raises UserError if the arguments hold more than flags."""
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not a flag; flags are written --name=value.")


def explain(refused: str) -> str:
    """The sentence for what absl refused."""
    wrong_value = re.match(r"flag --(\w+)=(.*?): (.*)", refused, re.DOTALL)
    if wrong_value:
        name, found, why = wrong_value[1], repr(wrong_value[2]), " ".join(wrong_value[3].split())
        kind = flags.FLAGS[name].flag_type()
        return (
            f"--{name}={found} is refused ({why}); expected one of type {kind}: --help explains it."
        )
    return (
        f"{' '.join(refused.split()).rstrip(' ?.')}; flags are written --name=value, and --help "
        "lists them."
    )
