"""Progress lines: one a stage in a log, one that is renewed on a terminal, none of single items."""

import io
import itertools
import logging

import pytest

from elm_jax.runtime.terminal import progress
from elm_jax.training.metrics_log import Progress

LOG = logging.getLogger(__name__)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by ten seconds a look."""
    ticks = itertools.count(0.0, 10.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(ticks))


def test_a_stage_is_one_line_in_a_log_and_names_what_takes_long(clock, monkeypatch, caplog):
    log = io.StringIO()
    monkeypatch.setattr(progress.sys, "stderr", log)
    with caplog.at_level(logging.INFO), progress.StageLine("preparing", 7, "split") as line:
        for number in range(7):
            progress.tell_item(LOG, "prepared %s", f"task{number}\x1b[31m")
            line.step(1000)
        Progress("an_expert", 0, 1).update(1, 0.5, 10.0)
    lines = log.getvalue().splitlines()
    assert lines[-1] == "preparing 7 splits: 7 of 7, 7,000 rows, 180.0 s"
    assert 4 <= len(lines) <= 7, "at most one each thirty seconds"
    assert any(line.endswith(r"  prepared task1\x1b[31m") for line in lines) and not caplog.records
    with caplog.at_level(logging.INFO):
        progress.tell_item(LOG, "prepared %s", "alone")
    assert caplog.messages == ["prepared alone"]


def test_a_failed_stage_writes_no_end_and_closes(clock, monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(progress.sys, "stderr", log)
    with pytest.raises(ValueError, match="task7"), progress.StageLine("preparing", 1, "split"):
        raise ValueError("task7")
    assert log.getvalue() == ""
    with progress.StageLine("training", 1, "expert"):
        pass
    assert log.getvalue().count("\n") == 1 and "training 1 expert: 0 of 1" in log.getvalue()


def test_on_a_terminal_the_line_is_renewed_fits_and_makes_room_for_messages(clock, monkeypatch):
    screen = Screen()
    monkeypatch.setattr(progress.sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "40")
    logger = logging.Logger("own")
    logger.addHandler(progress.ClearingHandler(screen))
    with progress.StageLine("preparing", 2, "split") as line:
        line.detail("x" * 90)
        logger.warning("a message")
        line.step()
        line.step()
    logger.warning("after")
    shown = screen.getvalue()
    assert shown.count("\n") == 3 and "\r\x1b[Ka message\n" in shown and shown.endswith("s\x1b[K\nafter\n")
    assert all(len(part.removesuffix("\x1b[K")) < 40 for part in shown.replace("\n", "\r").split("\r"))
