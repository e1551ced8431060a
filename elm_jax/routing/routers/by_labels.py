"""Router `labelled`: the likely experts scored on labelled rows, the worse half left out again and again.

Source: sequential halving, Karnin et al. 2013, https://proceedings.mlr.press/v28/karnin13.html; with scores
kept from round to round as Jamieson & Talwalkar 2016, https://arxiv.org/abs/1502.07943.
"""

import math

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.routing.cases import RoutingCase, RowScorer
from elm_jax.routing.ranking import ranked_by_score
from elm_jax.routing.routers.by_shortlist import candidates


def labelled_scores(case: RoutingCase) -> np.ndarray:
    """Places f64[1, E] of the candidates as parts of their number, 1 the best; -inf for the others.

    A place and not the accuracy, as an expert that was left out early may have done better on its few rows.
    """
    order = halved(candidates(case), case.scorer, case.settings.budget)
    scores = np.full(case.evidence.votes.shape, -np.inf)
    scores[0, order] = np.arange(len(order), 0, -1) / len(order)
    return scores


def halved(experts: np.ndarray, scorer: RowScorer, budget: int | None = None) -> np.ndarray:
    """Orders experts by their scores on rows, best first, with at most `budget` rows scored over all.

    Each round scores those who are left on further rows, the same for all, and leaves out the worse half. As
    soon as the budget pays for all rows of all who are left, they are scored on them, and that is the order.

    Args:
        experts: i64[n], the likeliest first: an earlier one wins a tie.
        scorer: scores experts on rows with labels.
        budget: by default all rows of all experts.

    Raises:
        InputError: a row has no label.
    """
    left, out = np.arange(len(experts)), np.zeros(0, np.int64)
    sums, seen = np.zeros(len(experts)), 0
    budget = len(experts) * scorer.num_rows if budget is None else budget
    for rounds in range(math.ceil(math.log2(len(experts))), 0, -1):
        unseen = scorer.num_rows - seen
        pays_for_all = budget >= len(left) * unseen
        rows = unseen if pays_for_all else min(unseen, budget // (len(left) * rounds))
        if rows:
            sums[left] += _correct(scorer, experts[left], seen, seen + rows).sum(axis=1)
            seen, budget = seen + rows, budget - rows * len(left)
        left = np.array(ranked_by_score(sums / max(seen, 1), left))
        if pays_for_all:
            break
        left, worse = np.split(left, [math.ceil(len(left) / 2)])
        out = np.concatenate([worse, out])
    return experts[np.concatenate([left, out])]


def _correct(scorer: RowScorer, experts: np.ndarray, start: int, end: int) -> np.ndarray:
    """Scores f64[n, rows]; raises InputError for a row without a label."""
    correct = scorer(experts, start, end)
    missing = np.flatnonzero(np.isnan(correct).any(axis=0))
    if len(missing):
        raise InputError(describe("The router labelled needs rows with labels",
                                  where=f"row {start + missing[0]}, counted from 0", got="no label",
                                  cure="give rows that have one"))
    return correct
