"""Which code generator of XLA compiles the tests' programs for CPUs (see `conftest.py`)."""

import os

OLDER_GENERATOR = "--xla_cpu_use_fusion_emitters=false"


def is_older() -> bool:
    """Whether the quicker, older one compiles: two programs of equal sums may then differ in last bits."""
    return OLDER_GENERATOR in os.environ.get("XLA_FLAGS", "").split()
