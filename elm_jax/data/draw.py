"""Draws rows without replacement, by a seed; the same on every machine.

Caps, the S keys of an expert, the Q queries of a task, the 300 instances of an evaluation and few-shot
exemplars are all drawn here. `taken` keeps draws apart: an exemplar is never the row itself, a query from a
training split is never a key of the library.
"""

from collections.abc import Collection, Sequence

import numpy as np

from elm_jax.errors import InputError, describe


def draw_rows(num_rows: int, count: int, seed: int | Sequence[int], *,
              taken: Collection[int] = (), one_by_one: bool = False) -> np.ndarray:
    """Draws at most `count` of `num_rows` rows: i64[n], in the order of the draw.

    Args:
        num_rows: how many there are.
        count: how many are wanted; all that are left if there are fewer.
        seed: of the draw, a number or several.
        taken: rows that must not be drawn.
        one_by_one: draws without permuting all rows, which is faster for a few of many rows. It gives other
            rows, and its first rows are not those of a smaller draw.

    Raises:
        InputError: a negative number of rows.
    """
    if num_rows < 0 or count < 0:
        raise InputError(describe("Rows are drawn by numbers of rows", got=f"{count} of {num_rows}",
                                  expected="0 or more"))
    words = seed if isinstance(seed, int) else [word % 2**63 for word in seed]
    draw, most = np.random.default_rng(words), count + len(taken)
    if one_by_one and most <= num_rows:
        order = draw.choice(num_rows, most, replace=False)
    else:
        order = draw.permutation(num_rows)
    if taken:
        order = order[~np.isin(order, list(taken))]
    return order[:count]
