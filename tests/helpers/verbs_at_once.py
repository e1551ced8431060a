"""Several commands at once: forks of one process that has imported the verbs, and computed nothing.

A fork of the test's own process would not do: JAX's threads are not in it.
"""

import functools
import importlib
import json
import os
import pathlib
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import many_processes
import numpy as np
import processes

IMPORTED = ("elm_jax.cli.execution", "elm_jax.cli.library", "elm_jax.cli.convert", "elm_jax.cli.tasks")


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    output: str
    errors: str


class VerbServer:
    """The process that commands are forked from; a context manager.

    Args:
        folder: for what commands print.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder, self._number = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=processes.environment(1, PYTHONPATH=os.pathsep.join(filter(None, sys.path))))

    def __enter__(self) -> "VerbServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(30)

    def run(self, *commands: Sequence[object]) -> list[Ended]:
        """Runs commands, all released at one moment: words of `elm`, or a function here and its own."""
        self._number += 1
        places = [str(self._folder / f"{self._number}_{each}") for each in range(len(commands))]
        words = [[str(word) for word in command] for command in commands]
        self._process.stdin.write(json.dumps([places, words]) + "\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        statuses = [int(text.removeprefix("status ") or 0) for text in told]
        return [Ended(status, *(pathlib.Path(f"{place}.{name}").read_text() for name in ("out", "err")))
                for status, place in zip(statuses, places, strict=True)]


class HashEncoder:
    """An encoder that needs no package: a text's row is drawn by its hash."""

    name, fingerprint, dimension = "hashes", "sha256:hashes", 8

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.stack([np.random.default_rng(zlib.crc32(text.encode())).normal(size=8) for text in texts])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def change_library(action: str, library: str, expert: str) -> int:
    """Adds or removes one expert, as a program that opens a library does; opens it meanwhile, too."""
    from elm_jax.experts.library import ExpertLibrary
    from elm_jax.routing.text import RoutingInstance

    opened = ExpertLibrary.open(library, HashEncoder())
    time.sleep(0.2)  # all have read the same
    if action == "remove":
        opened.remove(expert)
    else:
        opened.add({expert: [RoutingInstance(f"{expert} {number}") for number in range(3)]})
    for _ in range(10):
        ExpertLibrary.open(library, HashEncoder())
    return 0


def serve() -> None:
    """Runs what standard input names, one line a set of commands."""
    from elm_jax.cli.main import main

    for name in IMPORTED:
        importlib.import_module(name)
    here = {"change_library": change_library}

    def command(words: list[str], place: str) -> None:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{place}.{name}", os.O_CREAT | os.O_WRONLY, 0o600), number)
        try:
            status = here[words[0]](*words[1:]) if words[0] in here else main(words)
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)

    for line in sys.stdin:
        jobs = [functools.partial(command, words, place)
                for place, words in zip(*json.loads(line), strict=True)]
        told = many_processes.at_once(jobs, seconds=300)
        print(json.dumps([text if text.startswith("status ") or not text else "status -1" for text in told]),
              flush=True)


if __name__ == "__main__":
    serve()
