"""Damaged files of every kind: one error that names file and field; no traceback, no hang, no write."""

import damaged_files
import pytest
from damaged_kinds import KINDS

QUICK = [kind for kind in KINDS.values() if kind.quick]


def test_a_few_damages_of_every_kind(tmp_path):
    """Sixty and some; a fault is shown with the seed that makes it again."""
    found = damaged_files.faults(QUICK, lambda kind: range(3), tmp_path)
    assert list(map(str, found)) == [] and 3 * len(QUICK) >= 60


@pytest.mark.slow
def test_many_damages_of_every_kind(tmp_path):
    found = damaged_files.faults(KINDS.values(), lambda kind: range(1000, 1100), tmp_path)
    assert list(map(str, found)) == [] and 100 * len(KINDS) >= 2000
