"""SIGTERM, and the notice of a cloud host, in one process."""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from processes import environment

from elm_jax.runtime import preemption


def test_sigterm_is_remembered_inside_and_kills_outside():
    with preemption.stop_flag() as told:
        assert not told()
        with preemption.stop_flag() as inner:  # a training within a farm's worker
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner() and told()
        assert told()
    with preemption.stop_flag() as told:
        assert not told()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


WATCHING = """
import sys, time
from elm_jax.runtime import preemption
with preemption.stop_flag() as told:
    preemption.watch_notices()
    print("watching", flush=True)
    end = time.monotonic() + 60
    while not told() and time.monotonic() < end:
        time.sleep(0.02)
    sys.exit(preemption.STOPPED if told() else 1)
"""


@pytest.mark.parametrize(("kind", "notice"), [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"),
                                              ("preempted", "TRUE")])
def test_a_notice_of_the_cloud_host_is_a_sigterm(kind, notice):
    """A metadata server of our own: quiet at first, then with a notice for those that wait for a change."""
    asked, given = [], threading.Event()

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            assert self.headers["Metadata-Flavor"] == "Google"
            if "wait_for_change" in self.path:
                given.wait(60)
            told = given.is_set() and self.path.startswith(f"/computeMetadata/v1/instance/{kind}")
            quiet = "NONE" if "maintenance" in self.path else "FALSE"
            self.send_response(200)
            self.end_headers()
            self.wfile.write((notice if told else quiet).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    process = subprocess.Popen([sys.executable, "-c", WATCHING], stdout=subprocess.PIPE, env=environment(
        1, GCE_METADATA_HOST=f"127.0.0.1:{server.server_port}"))
    assert process.stdout.readline() == b"watching\n"
    end = time.monotonic() + 60
    while sum("wait_for_change" in path for path in asked) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert process.poll() is None
    given.set()
    assert process.wait(60) == preemption.STOPPED
    server.shutdown()
