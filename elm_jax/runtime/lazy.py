"""Lazy imports: names that a package imports on first use, so that start-up is fast."""

import contextlib
import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def exports(package: str, table: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Makes a package's ``__getattr__`` and ``__dir__`` (PEP 562) for names that its submodules define.

    Args:
        package: its ``__name__``.
        table: for each public name, the module that defines it.

    Returns:
        The two functions. The first imports the name's module and stores the name in the package; an unknown
        name is an AttributeError, as in any module.
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
    """Imports the object that ``module:name`` names."""
    module, name = place.split(":")
    with without_collector():
        return getattr(importlib.import_module(module), name)


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Switches garbage collection off within a block: it takes a tenth of the time of large imports."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
