"""Progress on standard error: one line a stage, renewed in place on a terminal and rare in a log."""

import logging
import shutil
import sys
import time
from typing import Any, TextIO

from elm_jax.runtime import hosts
from elm_jax.runtime.terminal.text_tables import visible

PLAIN_SECONDS = 15.0
STAGE_SECONDS = 30.0
"""Least seconds between two lines of a stage in a log."""
TERMINAL_SECONDS = 0.2

_open_stages: list["StageLine"] = []
_on_screen: list["StatusLine"] = []


class StatusLine:
    """One line on standard error, rewritten in place on a terminal and written every 15 s elsewhere.

    While a stage is open (`StageLine`) it is a part of the stage's line.

    Args:
        stream: defaults to standard error.
    """

    def __init__(self, stream: TextIO | None = None, plain_seconds: float = PLAIN_SECONDS) -> None:
        self._outer = _open_stages[-1] if _open_stages and stream is None else None
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._wait = TERMINAL_SECONDS if self._terminal else plain_seconds
        self._start = self._last = self._now = time.monotonic()

    def tick(self) -> tuple[float, bool]:
        """Seconds since the session began, above zero, and whether the last line is old enough."""
        self._now = time.monotonic()
        return max(self._now - self._start, 1e-9), self._now - self._last >= self._wait

    def show(self, line: str) -> None:
        """Writes the line, as of the newest tick; on a terminal as much of it as one line holds."""
        self._last = self._now
        if self._outer is not None:
            self._outer.detail(line)
            return
        line = visible(line)
        if self._terminal:
            line = f"\r{line[:max(shutil.get_terminal_size().columns - 1, 1)]}\x1b[K"
            _on_screen[:] = [self]
        else:
            line += "\n"
        self._stream.write(line)
        self._stream.flush()

    def close(self) -> None:
        """Ends the line on a terminal."""
        if self._terminal and self._outer is None:
            self._stream.write("\n")
            self._stream.flush()
        _on_screen[:] = [line for line in _on_screen if line is not self]

    def clear(self) -> None:
        """Empties the line on a terminal, for something else to be written there."""
        self._stream.write("\r\x1b[K")
        self._stream.flush()


class StageLine(StatusLine):
    """The line of a stage of many items: how many are done, rows, seconds, and what is under way.

    A context; a stage that is opened inside another is a part of its line. Only the first process of a run
    writes. The last line, ``preparing 18 splits: 18 of 18, 3,240 rows, 4.1 s``, is written unless the block
    raises an error.

    Args:
        what: is done with the items, say ``preparing``.
        total: number of items.
        unit: what one item is, in the singular.
        stream: defaults to standard error.
    """

    def __init__(self, what: str, total: int, unit: str, stream: TextIO | None = None) -> None:
        super().__init__(stream, STAGE_SECONDS)
        self._title = f"{what} {total} {unit}{'s' * (total != 1)}"
        self._total, self._done, self._rows = total, 0, 0

    def __enter__(self) -> "StageLine":
        _open_stages.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        _open_stages.remove(self)
        self.tick()
        if kind is None:
            self._write("")
        if hosts.is_first():
            self.close()

    def step(self, rows: int = 0) -> None:
        """Counts one finished item, and its rows."""
        self._done, self._rows = self._done + 1, self._rows + rows
        self.detail("")

    def detail(self, text: str) -> None:
        """Shows the stage with what is under way, if the last line is old enough."""
        if self.tick()[1]:
            self._write(text)

    def _write(self, text: str) -> None:
        if not hosts.is_first():
            return
        rows = f"{self._rows:,} rows, " if self._rows else ""
        self.show(f"{self._title}: {self._done} of {self._total}, {rows}{self._now - self._start:.1f} s"
                  f"{text and '  '}{text}")


def tell_item(logger: logging.Logger, message: str, *values: Any) -> None:
    """Tells of one item: in the line of the open stage, or in the log where no stage is open."""
    if _open_stages:
        _open_stages[-1].detail(message % values)
    else:
        logger.info(message, *values)


class ClearingHandler(logging.StreamHandler):
    """Writes messages on a line of their own: the progress line of a terminal makes room."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one message."""
        for line in _on_screen:
            line.clear()
        super().emit(record)
