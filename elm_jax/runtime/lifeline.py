"""A connection from every process to the first: sends short messages and detects dead processes.

If a process is killed or its host goes down, the system closes its connection (or TCP's keep-alive finds it
dead), and the other processes end with one message. JAX's own service only notices missing heartbeats, later,
and ends the process with a C++ stack trace.

Messages are JSON lines. Every process first sends a random word, which the first process has shared through
JAX's service; a connection without it is closed.
"""

import contextlib
import json
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from elm_jax.errors import LOST_PROCESS, RunError, describe

JOIN_SECONDS = 120.0
GOODBYE_SECONDS = 5.0
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 6, "TCP_USER_TIMEOUT": 45_000}


class _Peer:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():  # a host without power is noticed within 45 s
            with contextlib.suppress(AttributeError, OSError):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.name = ""
        self.left = False
        self.gone = threading.Event()
        self._connection = connection
        self._reader = connection.makefile("r", encoding="utf-8")
        self._lock = threading.Lock()

    def send(self, **message: Any) -> None:
        """Sends one message; drops it if the connection is broken, since the reader reports that."""
        with self._lock, contextlib.suppress(OSError):
            self._connection.sendall((json.dumps(message) + "\n").encode())

    def receive(self) -> dict[str, Any] | None:
        """Returns the next message; None at the end of the connection."""
        try:
            line = self._reader.readline()
            message = json.loads(line) if line else None
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class Lifeline:
    """This process's end of the connections between the processes of a run.

    Args:
        index: number of this process.
        count: number of processes, at least 2.
    """

    def __init__(self, index: int, count: int) -> None:
        self.index = index
        self.count = count
        self._peers: dict[int, _Peer] = {}
        self._changed = threading.Condition()
        self._arrived: dict[int, int] = {}
        self._barriers = 0
        self._told: queue.Queue[Any] = queue.Queue()
        self._passed: queue.Queue[int] = queue.Queue()
        self._ending = threading.Lock()

    # -- joining

    def serve(self) -> dict[str, Any]:
        """First process: starts to listen; returns the port and the word that the others need to join."""
        server = socket.create_server(("", 0), backlog=self.count)
        word = secrets.token_hex(16)
        threading.Thread(target=self._accept, args=(server, word), name="lifeline", daemon=True).start()
        return {"port": server.getsockname()[1], "word": word}

    def wait_for_all(self) -> None:
        """First process: waits until every other process has joined."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._peers) == self.count - 1, JOIN_SECONDS):
                missing = sorted(set(range(1, self.count)) - set(self._peers))
                raise RunError(describe("Processes did not join in time", got=f"no word of {missing}",
                                        expected=f"{self.count} processes within {JOIN_SECONDS:.0f} s",
                                        cure="look at their logs; may they reach this host by TCP?"))

    def join(self, host: str, told: dict[str, Any]) -> None:
        """Other processes: connects to the first."""
        end = time.monotonic() + JOIN_SECONDS
        while True:
            try:
                connection = socket.create_connection((host, told["port"]), timeout=10)
                break
            except OSError as error:
                if time.monotonic() > end:
                    raise RunError(describe("The first process cannot be reached",
                                            where=f"{host}:{told['port']}", got=str(error))) from error
                time.sleep(0.5)
        connection.settimeout(None)
        peer = _Peer(connection)
        peer.name = f"process 0 of {self.count} ({host})"
        peer.send(word=told["word"], index=self.index, host=socket.gethostname(), pid=os.getpid())
        self._peers[0] = peer
        threading.Thread(target=self._follow, args=(peer,), name="lifeline", daemon=True).start()

    def _accept(self, server: socket.socket, word: str) -> None:
        while len(self._peers) < self.count - 1:
            peer = _Peer(server.accept()[0])
            threading.Thread(target=self._serve_one, args=(peer, word), name="lifeline", daemon=True).start()
            with self._changed:
                self._changed.wait(0.2)
        server.close()

    def _serve_one(self, peer: _Peer, word: str) -> None:
        hello = peer.receive() or {}
        index = hello.get("index")
        known = secrets.compare_digest(str(hello.get("word")), word)
        if not known or index not in range(1, self.count) or index in self._peers:
            peer.close()
            return
        peer.name = f"process {index} of {self.count} (host {hello.get('host')}, pid {hello.get('pid')})"
        with self._changed:
            self._peers[index] = peer
            self._changed.notify_all()
        while (message := peer.receive()) is not None:
            if "at" in message:
                with self._changed:
                    self._arrived[message["at"]] = self._arrived.get(message["at"], 0) + 1
                    self._changed.notify_all()
            elif "failed" in message:
                self._end(message["failed"], f"{message['text']}\n  process: {peer.name}")
            elif "bye" in message:
                peer.left = True
        peer.gone.set()
        if not peer.left:
            self._end(LOST_PROCESS, lost_message(peer.name))

    def _follow(self, peer: _Peer) -> None:
        while (message := peer.receive()) is not None:
            if "told" in message:
                self._told.put(message["told"])
            elif "passed" in message:
                self._passed.put(message["passed"])
            elif "end" in message:
                leave_process(message["end"])
            elif "bye" in message:
                peer.left = True
        if not peer.left:
            leave_process(LOST_PROCESS, lost_message(peer.name))

    # -- messages

    def tell(self, value: Any) -> None:
        """First process: sends a JSON value to all others."""
        for peer in self._peers.values():
            peer.send(told=value)

    def told(self) -> Any:
        """Other processes: waits for the next value that the first one sends, without a limit."""
        return self._told.get()

    def barrier(self) -> None:
        """Waits until every process has called it as often as this one."""
        self._barriers += 1
        number = self._barriers
        if self.index:
            self._peers[0].send(at=number)
            self._passed.get()
            return
        with self._changed:
            self._changed.wait_for(lambda: self._arrived.get(number, 0) == self.count - 1)
            del self._arrived[number]
        for peer in self._peers.values():
            peer.send(passed=number)

    # -- ends

    def leave(self) -> None:
        """Announces that this process ends normally."""
        for peer in self._peers.values():
            peer.left = True
            peer.send(bye=True)

    def fail(self, status: int, text: str) -> NoReturn:
        """Ends all processes with a status; the first one prints the text, once."""
        if self.index == 0:
            self._end(status, text)
        self._peers[0].send(failed=status, text=text)
        time.sleep(2 * GOODBYE_SECONDS)  # the reading thread ends the process before
        leave_process(status, text)

    def _end(self, status: int, text: str) -> NoReturn:
        """First process: prints, ends the others first (they depend on its JAX service), then itself."""
        if not self._ending.acquire(blocking=False):
            time.sleep(3 * GOODBYE_SECONDS)  # another thread is ending the process
            leave_process(status)
        _say(text)
        for peer in self._peers.values():
            peer.send(end=status)
        end = time.monotonic() + GOODBYE_SECONDS
        for peer in self._peers.values():
            peer.gone.wait(max(0.0, end - time.monotonic()))
        leave_process(status)


def lost_message(name: str) -> str:
    """The error message for a process that ended without notice."""
    return "elm: " + describe(
        "A process of this run was lost, so all of them end", where=name,
        got="its connection broke without a word: it was killed, ran out of memory, or its host went down",
        cure="start all of them again: the run goes on from its newest checkpoint; that process's own log "
        f"may say more (exit status {LOST_PROCESS}: worth a restart)")


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


BEFORE_LEAVING: list[Callable[[], None]] = []
"""Functions that `leave_process` calls, for what its sudden end would leave behind."""


def leave_process(status: int, text: str | None = None) -> NoReturn:
    """Ends the process from any thread, even if the main thread is blocked."""
    if text is not None:
        _say(text)
    for function in BEFORE_LEAVING:
        function()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def give_time_before_abort() -> None:
    """Delays an abort by some seconds, in which a lifeline can end the process with a clear message.

    When the first process dies, JAX's C++ client calls ``abort`` at the same moment as the lifeline's
    thread learns of it. The handler is C's own ``sleep``, called with the signal's number: six seconds,
    without Python and its lock; then the abort continues.
    """
    import ctypes  # late: wanted by runs of several processes only

    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
