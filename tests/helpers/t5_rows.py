"""Rows and batches under T5's ids, for tests that make their own."""

import numpy as np

from elm_jax.data.arrays.batches import ChoiceShape, make_choice_batch
from elm_jax.data.arrays.two_sided import TwoSided
from elm_jax.models.network import ids_of
from elm_jax.models.t5.config import T5Config
from elm_jax.types import Padded

IDS = ids_of(T5Config)
FORM = TwoSided(IDS)
make_batch, make_packed_batch, shift_right = FORM.make, FORM.make_packed, FORM.shift_right


def rows(tokens) -> Padded:
    """Rows padded with 0 behind their tokens, [..., L], as `Padded`: T5's padding is no token."""
    return Padded(tokens, (np.asarray(tokens) != IDS.pad).sum(axis=-1).astype(np.int32))


def choice_batch(inputs, choices, *, source_length, target_length, num_choices, batch_size):
    """Instances with their choices, inputs cut to `source_length`."""
    shape = ChoiceShape(batch_size, source_length, num_choices, target_length)
    return make_choice_batch([FORM.prompt(tokens, source_length) for tokens in inputs], choices, shape,
                             IDS.pad)
