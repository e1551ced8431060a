"""All task registries but the embedded one: importing this package registers facts, and reads nothing.

A module of tasks of one's own may be named beside it wherever task modules are asked for.
"""

from elm_jax.tasks import (
    bbh,
    bigbench,
    compositional,
    generative,
    origins,
    t0_eval,
    t0_train,
    tfds_names,
)

__all__ = ["bbh", "bigbench", "compositional", "generative", "origins", "t0_eval", "t0_train", "tfds_names"]
