"""Regular expressions that files bring along, matched within a limit of time.

Python's matcher may need longer than the age of the world for a short expression and a short name, as for
``(a|a)*b``; which expressions do is not told from their text.
"""

import re
import signal
import threading
from types import FrameType

from elm_jax.errors import InputError, describe

MAX_SECONDS = 2.0
"""Most seconds of processor time for one name; PEFT's usual expressions take microseconds."""


class _TooLongError(Exception):
    """Raised in the middle of a match when its time is over."""


def match(expression: str, name: str, *, whole: bool = False) -> re.Match[str] | None:
    """Matches an expression with the beginning of a name, as `re.match` does, or with the whole name.

    Outside of a program's main thread, where no timer can be set, there is no limit.

    Raises:
        InputError: it takes longer than `MAX_SECONDS`.
    """
    compiled = re.compile(expression)
    matching = compiled.fullmatch if whole else compiled.match
    if threading.current_thread() is not threading.main_thread():
        return matching(name)
    before = signal.signal(signal.SIGVTALRM, _stop)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
        try:
            return matching(name)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except _TooLongError as error:
        raise InputError(describe(
            f"A regular expression of the adapter takes longer than {MAX_SECONDS:g} seconds for one name",
            where=f"module {name}", got=expression[:200],
            cure="write it without repeats inside of repeats, or list the modules")) from error
    finally:
        signal.signal(signal.SIGVTALRM, before)


def fits(expression: str, name: str) -> bool:
    """Whether an expression matches a whole name, as `re.fullmatch` does; the errors of `match`."""
    return match(expression, name, whole=True) is not None


def _stop(number: int, frame: FrameType | None) -> None:
    raise _TooLongError
