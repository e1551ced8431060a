"""Routers `confidence` and `agreement`: what the likely experts answer to rows without labels."""

import numpy as np

from elm_jax.routing.cases import RoutingCase, RowScores
from elm_jax.routing.routers.by_shortlist import candidates


def confidence_scores(case: RoutingCase) -> np.ndarray:
    """Mean margins f64[1, E] of the candidates' own answers; -inf for the others."""
    chosen, answers = _answers(case)
    return _scores_of(case, chosen, answers.margins.mean(axis=1))


def agreement_scores(case: RoutingCase) -> np.ndarray:
    """Parts f64[1, E] of the rows that a candidate answers as most of the other candidates do."""
    chosen, answers = _answers(case)
    return _scores_of(case, chosen, agreement(answers.predictions))


def agreement(picks: np.ndarray) -> np.ndarray:
    """How far each expert agrees with the others, f64[n] from 0 to 1, from picks i64[n, rows].

    On a row an expert agrees if its pick is the one that most of the others have; where k picks lead among
    them, with 1/k. One alone agrees with nobody: 0.
    """
    number = len(picks)
    same = picks[:, None] == picks[None]
    found = np.zeros(number)
    for one in range(number if number > 1 else 0):
        others = np.arange(number) != one
        support = same[others].sum(axis=0)  # of each expert's pick, among the others
        most = support[others].max(axis=0)
        leading = (support[others] == most).sum(axis=0) / most  # as many experts as `most` share each pick
        found[one] = ((support[one] == most) / leading).mean()
    return found


def _answers(case: RoutingCase) -> tuple[np.ndarray, RowScores]:
    """The candidates i64[n], and what they answer to as many rows as the budget pays for."""
    chosen, budget = candidates(case), case.settings.budget
    if budget is None:
        return chosen, case.scorer(chosen, 0, case.scorer.num_rows)
    chosen = chosen[:budget]
    return chosen, case.scorer(chosen, 0, min(case.scorer.num_rows, budget // len(chosen)))


def _scores_of(case: RoutingCase, experts: np.ndarray, values: np.ndarray) -> np.ndarray:
    scores = np.full(case.evidence.votes.shape, -np.inf)
    scores[0, experts] = values
    return scores
