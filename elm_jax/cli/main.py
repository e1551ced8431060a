"""The entry point of the `elm` command: parses flags, then runs the verb."""

import shlex
import sys
from collections.abc import Sequence

from elm_jax.cli.flags import make_parser
from elm_jax.runtime import lazy

GIN_PREFIX = "--gin."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Returns:
        The exit status: 0 success, 1 the run failed, 2 wrong input, 143 stopped by SIGTERM and saved, 75
        another process of the run was lost. After 143 and 75 the same command resumes the run.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    known, bindings = _take_gin_bindings(argv)
    arguments = parser.parse_args(known)
    if bindings and not getattr(arguments, "takes_gin", False):
        parser.error(f"`elm {arguments.verb}` takes no gin bindings: {bindings[0]}")
    arguments.gin_bindings = bindings
    arguments.command = shlex.join(["elm", *argv])
    with lazy.without_collector():
        from elm_jax.cli import execution  # late: imports JAX, which help and wrong flags do not need
    return execution.run(arguments)


def _take_gin_bindings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits ``--gin.NAME=VALUE`` (or ``--gin.NAME VALUE``), T5X's notation, off the arguments."""
    known, bindings, position = [], [], 0
    while position < len(argv):
        word = argv[position]
        if word.startswith(GIN_PREFIX):
            binding = word.removeprefix(GIN_PREFIX)
            if "=" not in binding and position + 1 < len(argv):
                position += 1
                binding = f"{binding}={argv[position]}"
            bindings.append(binding)
        else:
            known.append(word)
        position += 1
    return known, bindings
