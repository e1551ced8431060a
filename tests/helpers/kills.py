"""Kills of a verb at every change of its files: what each leaves behind, and what the same verb makes of it.

`sweep` runs a verb once. A hook of Python's audit events sees every change of the work folder before it is
made, and copies the folder: the copy is what a kill at this moment leaves, since the system keeps what was
written and releases locks. Files that are written between two events, from C++ too, are also cut off at their
half. Then the verb runs again on each of these states, must end well, and the folder must be as after the
undisturbed run.

As a script it does the same with real kills: ``python kills.py WORK STRIDE WORDS...`` runs `elm WORDS` in
forked children that kill themselves at every `STRIDE`-th change within WORK, after each one that does not.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from elm_jax.errors import InputError

MANIFEST = "manifest.ocdbt"
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FOLDERS = {"os.rename": ((0, 2), (1, 3)), "os.remove": ((0, 1),), "os.rmdir": ((0, 1),),
            "os.mkdir": ((0, 2),), "os.link": ((1, 3),), "os.symlink": ((1, 2),), "os.truncate": ((0, None),)}
"""Where an event's arguments hold a path that changes, and the folder that it is relative to."""
_TIMES = re.compile(rb'"(seconds|created|\w+_timestamp_nsecs)": ?[^,\n}]+'
                    rb"|\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\.\d+)?(\+00:00|Z| UTC)?")
Verb = Callable[[], int]


class _Watch:
    """Calls a function before every change within a folder, in whichever thread; the hook itself stays."""

    def __init__(self) -> None:
        self._folder, self._before = "", None
        self._lock = threading.Lock()
        self._inside = threading.local()

    @contextlib.contextmanager
    def over(self, folder: pathlib.Path, before: Callable[[], None]) -> Iterator[None]:
        self._folder, self._before = os.path.realpath(folder), before
        try:
            yield
        finally:
            self._before = None

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._before is None or getattr(self._inside, "hook", False):
            return
        if event == "open":
            paths = [arguments[0]] if arguments[2] & _WRITING else []
        else:
            paths = [_whole(arguments[place], arguments[folder] if folder is not None else -1)
                     for place, folder in _FOLDERS.get(event, ())]
        if any(self._is_within(path) for path in paths if not isinstance(path, int)):
            self._inside.hook = True
            try:
                with self._lock:
                    self._before()
            finally:
                self._inside.hook = False

    def _is_within(self, path: Any) -> bool:
        path = os.path.abspath(os.fsdecode(path))
        return path == self._folder or path.startswith(self._folder + os.sep)


def _whole(path: Any, folder: Any) -> Any:
    """A path with the folder that a descriptor stands for, as `shutil.rmtree` gives it."""
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    if isinstance(folder, int) and folder >= 0:
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
    return path


@contextlib.contextmanager
def watch(folder: pathlib.Path, before: Callable[[], None]) -> Iterator[None]:
    """Within the block `before` is called ahead of every change in a folder."""
    global _WATCH
    if _WATCH is None:
        _WATCH = _Watch()
        sys.addaudithook(_WATCH.hear)
    with _WATCH.over(folder, before):
        yield


_WATCH: _Watch | None = None


def sweep(verb: Verb, work: pathlib.Path, scratch: pathlib.Path, every: int = 1,
          facts: Callable[[pathlib.Path], Any] | None = None) -> int:
    """Runs a verb on all that its kills leave; returns the number of these states.

    Args:
        verb: returns its exit status.
        work: folder that it changes; what lies in it before belongs to the state before the verb.
        scratch: an empty folder, for copies.
        every: only each so-many-th state, the last ones among them.
        facts: of the folder, equal after every run; None for `tree`.
    """
    facts = facts or tree
    states: dict[str, pathlib.Path] = {}

    def keep() -> None:
        place = scratch / f"{len(states):04}"
        _copy(work, place)
        if states.setdefault(_digest(place), place) is not place:
            shutil.rmtree(place)

    with watch(work, keep):
        assert verb() == 0
    expected = facts(work)
    keep()
    *found, last = states.values()
    tried = [*found[::-1][::every], *list(_between([*found, last]))[::-1][::every]]
    for state in tried:
        _copy(state, work)
        left = sorted(name for name in map(str, (path.relative_to(work) for path in work.rglob("*")))
                      if "/d/" not in name)
        clock = scratch / "clock"
        clock.touch()
        status = verb()
        assert status == 0, (f"status {status} after a kill that left", left)
        found = facts(work)
        assert found == expected, ("after a kill that left", left, _differences(found, expected))
        assert _mixed(work, clock.stat().st_mtime_ns) == []
    return len(tried)


def tree(folder: pathlib.Path) -> dict[str, str]:
    """Digests of all files of a folder by their names, folders too; times in them do not count.

    Of a tree of arrays in Orbax's format, whose files are named by chance, the values count.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if any((parent / MANIFEST).exists() for parent in path.parents if parent.is_relative_to(folder)):
            continue
        if path.is_dir():
            found[name] = _values(path) if (path / MANIFEST).exists() else "folder"
        else:
            found[name] = hashlib.sha256(_TIMES.sub(b"", path.read_bytes())).hexdigest()
    return found


def _values(folder: pathlib.Path) -> str:
    """Digest of the arrays that lie in a folder of Orbax's."""
    from elm_jax.runtime import tree_files, trees

    total = hashlib.sha256()
    try:
        for path, leaf in sorted(trees.flatten(tree_files.restore_tree(folder)).items()):
            array = np.asarray(leaf)
            total.update(repr((path, array.dtype, array.shape)).encode())
            total.update(str(leaf).encode() if array.dtype == object else array.tobytes())
    except InputError as error:
        return f"no whole tree: {error}"
    return total.hexdigest()


def _mixed(folder: pathlib.Path, start: int) -> list[str]:
    """Trees of arrays with files from before a moment and from after it: they began in another's remains."""
    files = {path.parent: [file for file in path.parent.rglob("*") if file.is_file()]
             for path in folder.rglob(MANIFEST)}
    return [str(place) for place, found in files.items()
            if len({file.stat().st_mtime_ns < start for file in found}) > 1]


def _differences(found: Any, expected: Any) -> Any:
    if not isinstance(found, dict):
        return found, expected
    return {name: (found.get(name), expected.get(name)) for name in sorted(found.keys() | expected.keys())
            if found.get(name) != expected.get(name)}


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Makes `target` a copy of `source`; other threads may take files away meanwhile."""
    shutil.rmtree(target, ignore_errors=True)
    if source.exists():
        with contextlib.suppress(shutil.Error):
            shutil.copytree(source, target, symlinks=True)
    else:
        target.mkdir(parents=True)


def _digest(folder: pathlib.Path) -> str:
    """Of names and contents."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        total.update(str(path.relative_to(folder)).encode() + b"\0")
        total.update(b"folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _between(states: list[pathlib.Path]) -> Iterator[pathlib.Path]:
    """States between two others: each file that came is cut off at its half, those before it are whole."""
    for number, (first, second) in enumerate(itertools.pairwise(states)):
        held = {path.read_bytes() for path in first.rglob("*") if path.is_file()}
        new = [path for path in second.rglob("*") if path.is_file() and path.read_bytes() not in held]
        new.sort(key=lambda path: path.stat().st_mtime_ns)
        for count in sorted({0, len(new) // 2, len(new) - 1}) if new else ():
            place = second.parent / f"{number:04}-{count:04}"
            _copy(first, place)
            for path in new[:count + 1]:
                target = place / path.relative_to(second)
                content, old = path.read_bytes(), target.read_bytes() if target.is_file() else b""
                start = len(old) if content.startswith(old) else 0
                cut = len(content) if path is not new[count] else start + (len(content) - start) // 2
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content[:cut])
            yield place


def main(work: pathlib.Path, stride: int, words: list[str]) -> None:
    """Kills at every `stride`-th change; prints the number of kills."""
    from elm_jax.cli import convert, execution, library, tasks  # noqa: F401  once for all children
    from elm_jax.cli import main as cli

    scratch = work.with_name(f"{work.name}-before")
    _copy(work, scratch)

    def run(last: int | None) -> int:
        """Runs the verb in a child, which kills itself before change `last`; returns the child's status."""
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seen = [0]

        def count() -> None:
            seen[0] += 1
            if seen[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)

        with watch(work, count):
            status = cli.main(words)
        sys.stdout.flush()
        os._exit(status)

    assert run(None) == 0
    expected = _tree_in_child(work)
    number, killed = 1, 0
    while True:
        _copy(scratch, work)
        status = run(number)
        if status != -signal.SIGKILL:
            assert status == 0
            break
        left = sorted(os.listdir(work))
        if _tree_in_child(work) != expected:  # else it was killed when all was done
            assert run(None) == 0, left
            found = _tree_in_child(work)
            assert found == expected, (number, left, found, expected)
        number, killed = number + stride, killed + 1
    shutil.rmtree(scratch)
    print(json.dumps({"kills": killed}))


def _tree_in_child(folder: pathlib.Path) -> Any:
    """`tree`, in a child: reading arrays starts threads, which later forks would lack."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        with open(writer, "w") as file:
            json.dump(tree(folder), file)
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        found = json.load(file)
    os.wait()
    return found


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
