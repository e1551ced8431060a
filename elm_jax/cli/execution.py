"""Runs a verb of the `elm` command: sets up logging, joins the run's processes, returns the exit status."""

import argparse
import atexit
import gc
import io
import logging
import os
import sys
import time
import traceback
from typing import Any

from elm_jax.errors import ElmError
from elm_jax.runtime import hosts, lazy, preemption
from elm_jax.runtime.terminal.progress import ClearingHandler
from elm_jax.runtime.terminal.text_tables import visible

LOSS_SECONDS = 3.0


def run(arguments: argparse.Namespace) -> int:
    """Runs the verb whose ``module:function`` is in ``arguments.run``; returns the exit status.

    Returns:
        See `main.main`.
    """
    atexit.register(gc.freeze)  # at exit, garbage collection would visit all objects of JAX
    _set_up_streams()
    for noisy in ("jax", "orbax", "tensorflow", "tensorflow_datasets", "matplotlib", "seqio"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs an error's traceback, then raises it
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _without_orphaned_writes
    try:
        verb = lazy.resolve(f"elm_jax.cli.{arguments.run}")
        _join_hosts(arguments)
        status = verb(arguments) or 0
    except ElmError as error:
        return _end(error.exit_status, f"elm {arguments.verb}: {error}")
    except preemption.Stopped:
        logging.info("stopped by SIGTERM; the same command goes on from here")
        status = preemption.STOPPED
    except KeyboardInterrupt:
        return _end(130, f"elm {arguments.verb}: interrupted; start again to go on")
    except BrokenPipeError:
        status = 0
    except Exception:
        if hosts.count() == 1:
            raise
        time.sleep(LOSS_SECONDS)  # if another process has died, the lifeline ends this one now
        return _end(1, traceback.format_exc())
    hosts.finish()
    return status


def _set_up_streams() -> None:
    """Logs on standard error; no text, whatever file it is from, acts on a terminal or cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = ClearingHandler(sys.stderr)
    handler.setFormatter(_VisibleFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class _VisibleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), keep="\n\t")


def _join_hosts(arguments: argparse.Namespace) -> None:
    """Joins the other processes of this run; only the first process logs and prints results."""
    if not hasattr(arguments, "coordinator_address"):
        return
    hosts.start(arguments.coordinator_address, arguments.num_processes, arguments.process_id)
    preemption.watch_notices()
    if hosts.count() > 1:  # Gloo writes to standard output, which is for results: redirect it
        results = os.dup(1) if hosts.is_first() else os.open(os.devnull, os.O_WRONLY)
        os.dup2(2, 1)
        sys.stdout = os.fdopen(results, "w", encoding="utf-8")
    if not hosts.is_first():
        logging.getLogger().setLevel(logging.WARNING)


def _end(status: int, text: str) -> int:
    """Prints why the run ends, once for all processes, and ends all of them."""
    if hosts.count() > 1:
        hosts.fail(status, text)
    print(visible(text, keep="\n\t"), file=sys.stderr)
    return status


def _without_orphaned_writes(unraisable: Any) -> None:
    """Prints exceptions that Python cannot raise, except those that follow from an earlier failed write.

    On a full disk Orbax raises the first failure and closes its event loop while TensorStore still has
    other leaves to write; each of those would print a traceback before the one clear error.
    """
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)
