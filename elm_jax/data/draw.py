"""The one way in which rows are drawn: without replacement, by a seed, the same on every machine.

Caps, the S keys of an expert, the Q queries of a task, the 300 instances of an evaluation and few-shot
exemplars are all drawn here. Which of them must not meet is said by `taken`: exemplars are never the row
itself, queries from a training split never the library's keys.
"""

from collections.abc import Collection, Sequence

import numpy as np

from elm_jax.errors import InputError, describe


def draw_rows(num_rows: int, count: int, seed: int | Sequence[int], *,
              taken: Collection[int] = (), one_by_one: bool = False) -> np.ndarray:
    """At most `count` of `num_rows` rows, i64[n], in the order of the draw.

    Args:
        num_rows: how many there are.
        count: how many are wanted; all that are left if there are fewer.
        seed: of the draw, a number or several.
        taken: rows that must not be drawn.
        one_by_one: for a few of many, drawn often: another draw, which makes no order of all rows. Its
            first rows are not those of a smaller draw.

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
