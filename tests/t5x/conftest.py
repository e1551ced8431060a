"""Tests with T5X itself: all are skipped, for one reason, where it cannot be imported."""

import os
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import available


@pytest.fixture(scope="session", autouse=True)
def _t5x() -> None:
    reason = available.why_skipped()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def world(_t5x, tmp_path_factory):
    """Data, base and launches, made once for all tests; see `launches.World`."""
    import launches

    source = launches.real_data()
    if source is None:
        pytest.skip("no data folder: set ELM_DATA_DIR")
    made = launches.World(tmp_path_factory.mktemp("t5x"), source)
    before = {name: os.environ.get(name) for name in ("ELM_DATA_DIR", "ELM_VOCABULARY")}
    os.environ.update(ELM_DATA_DIR=str(made.data), ELM_VOCABULARY=made.base.vocabulary_path)
    yield made
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
