"""Merging low-rank updates (LoRA) through their products.

An update is ``scale * down @ up``. The average of two updates is not the product of the averaged factors, so
the updates themselves are merged. A weighted sum of updates is again low-rank, of the sum of the ranks, and
its factors are exact; any other merge is computed in full and factorised.
"""

from collections.abc import Sequence

import numpy as np

_FULL_SVD = 512
"""Matrices with a smaller side are decomposed in full; larger ones by random projections."""


def stack_factors(downs: Sequence[np.ndarray], ups: Sequence[np.ndarray],
                  factors: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenates factors: the exact factors of ``sum_i f_i down_i @ up_i``.

    Args:
        downs: f[D, R_i].
        ups: f[R_i, F].
        factors: f_i, the updates' own scales included.

    Returns:
        (f32[D, sum R_i], f32[sum R_i, F]).
    """
    down = np.concatenate([np.asarray(each, np.float32) for each in downs], axis=1)
    up = np.concatenate([np.float32(factor) * np.asarray(each, np.float32)
                         for factor, each in zip(factors, ups, strict=True)], axis=0)
    return down, up


def without_gaps(downs: Sequence[np.ndarray | None], ups: Sequence[np.ndarray | None]
                 ) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Puts factors of rank 0, whose product is zero, where an expert has no update; at least one has it."""
    inner = next(each for each in downs if each is not None).shape[0]
    outer = next(each for each in ups if each is not None).shape[1]
    return ([np.zeros((inner, 0), np.float32) if each is None else each for each in downs],
            [np.zeros((0, outer), np.float32) if each is None else each for each in ups])


def side_by_side(downs: Sequence[np.ndarray], ups: Sequence[np.ndarray], scales: Sequence[float]
                 ) -> tuple[np.ndarray, list[np.ndarray]]:
    """Writes E updates with one common down factor, so that weighted sums are sums of up factors.

    Args:
        downs: f[D, R_i].
        ups: f[R_i, F].
        scales: the updates' own.

    Returns:
        A down f32[D, R] of all, R the sum of the ranks, and E ups f32[R, F], each with zeros in the rows of
        the others: ``down @ (sum_i w_i up_i) = sum_i w_i scale_i down_i @ up_i``, exactly.
    """
    down, up = stack_factors(downs, ups, scales)
    owner = np.repeat(np.arange(len(ups)), [each.shape[0] for each in ups])
    return down, [np.where((owner == number)[:, None], up, np.float32(0)) for number in range(len(ups))]


def factorise(update: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Factorises an update to a given rank (truncated SVD); also returns the relative error.

    Args:
        update: f32[D, F].
        rank: of the result, at most; smaller for a smaller matrix.

    Returns:
        (f32[D, R], f32[R, F], relative error in the Frobenius norm). If R exceeds the update's rank, the rest
        of the factors is zero.

    Source: Eckart and Young, https://doi.org/10.1007/BF02288367.
    """
    from sklearn.utils.extmath import randomized_svd  # late: it takes a second to import

    rank = min(rank, *update.shape)
    if min(update.shape) <= max(_FULL_SVD, rank):
        left, sizes, right = np.linalg.svd(update.astype(np.float32), full_matrices=False)
        left, sizes, right = left[:, :rank], sizes[:rank], right[:rank]
    else:
        left, sizes, right = randomized_svd(update, rank, n_iter=4, random_state=0)
    roots = np.sqrt(sizes)
    down, up = (left * roots).astype(np.float32), (roots[:, None] * right).astype(np.float32)
    norm = float(np.linalg.norm(update))
    return down, up, float(np.linalg.norm(update - down @ up)) / norm if norm else 0.0
