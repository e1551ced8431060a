"""Stopping a run: by SIGTERM, or by a cloud host's notice of maintenance or preemption.

A single process stops at its next step. Several processes agree on a step that none of them has passed, by
JAX's preemption service, whose handler then catches SIGTERM; a signal to one of them is enough.
"""

import logging
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jax.experimental import multihost_utils

from elm_jax.runtime import hosts

STOPPED = 128 + signal.SIGTERM
"""Exit status of a run that was told to stop, and has saved; the same command resumes it."""
METADATA_VARIABLES = ("GCE_METADATA_HOST", "GCE_METADATA_IP")
_EVENTS = {"maintenance-event": ("NONE",), "preempted": ("FALSE",)}
_WAIT_SECONDS = 60
_LOG = logging.getLogger(__name__)
_TOLD_TO: list[threading.Event] = []
_QUESTIONS = 0  # asked so far in this process, over all its runs: the clock of JAX's service


class Stopped(Exception):
    """Raised when a run was told to stop; its state is saved."""


@contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """Catches SIGTERM within a block; yields a function that says whether to stop.

    Every process must call the function equally often, as after each step.
    """
    if hosts.count() > 1:
        yield reached_sync_point
        return
    if _TOLD_TO or threading.current_thread() is not threading.main_thread():
        yield _told  # within another one; or in a thread, which signals do not reach
        return
    event = threading.Event()
    _TOLD_TO.append(event)
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield _told
    finally:
        signal.signal(signal.SIGTERM, before)
        _TOLD_TO.clear()


def _told() -> bool:
    told = any(event.is_set() for event in _TOLD_TO)
    if told:
        _LOG.warning("SIGTERM: saving and stopping")
    return told


def reached_sync_point() -> bool:
    """Whether all processes stop at this step because one was told to; False for a single process."""
    global _QUESTIONS
    if hosts.count() == 1:
        return False
    _QUESTIONS += 1
    stop = multihost_utils.reached_preemption_sync_point(_QUESTIONS)
    if stop and hosts.is_first():
        _LOG.warning("SIGTERM or a preemption notice: all processes save and stop")
    return stop


def watch_notices() -> None:
    """Sends this process SIGTERM when a Google Cloud TPU host announces maintenance or preemption."""
    address = next((os.environ[name] for name in METADATA_VARIABLES if os.environ.get(name)), None)
    if address is None and not hosts.on_tpu_host():
        return
    for kind, quiet in _EVENTS.items():
        url = f"http://{address or 'metadata.google.internal'}/computeMetadata/v1/instance/{kind}"
        threading.Thread(target=_watch, args=(url, quiet), name=f"notice {kind}", daemon=True).start()


def _watch(url: str, quiet: tuple[str, ...]) -> None:
    """Polls the metadata server for a notice; it answers when the value changes, or after a minute."""
    asked = url
    while True:
        request = urllib.request.Request(asked, headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(request, timeout=2 * _WAIT_SECONDS) as answer:
                notice = answer.read().decode().strip()
        except (OSError, ValueError):  # no such server, or no such value there
            time.sleep(_WAIT_SECONDS)
            continue
        if notice.upper() not in quiet:
            _LOG.warning("notice from the cloud host: %s", notice)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        asked = f"{url}?wait_for_change=true&timeout_sec={_WAIT_SECONDS}"
