"""Names that are imported when they are asked for: start-up pays for what is used, and for nothing else."""

import contextlib
import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def exports(package: str, table: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's ``__getattr__`` and ``__dir__`` (PEP 562) for names that its submodules define.

    Args:
        package: its ``__name__``.
        table: for each public name, the module that defines it.

    Returns:
        The two functions. The first imports the name's module, and keeps what it found in the package;
        another name is an AttributeError, as of any module.
    """
    def find(name: str) -> Any:
        if name not in table:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(table[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *table})

    return find, names


def resolve(place: str) -> Any:
    """What ``module:name`` stands for."""
    module, name = place.split(":")
    with without_collector():
        return getattr(importlib.import_module(module), name)


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Large imports: they make no garbage, and looking for it takes a tenth of their time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
