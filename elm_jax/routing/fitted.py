"""What is fitted on a library's own tables, kept as numbers: weights of the router `fitted`, and a threshold.

Both are made from a `RoutedLibrary` (`routers/by_fit.py`, `none_of_these.py`) and written as JSON.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from elm_jax.errors import InputError, describe

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Ridge strengths to choose from, in parts of each feature's mean square; the last gives the usual."""


@dataclasses.dataclass(frozen=True, eq=False)
class FittedRouter:
    """A ridge regression of normal scores without weights below 0, as the sums that it is solved from.

    It departs from usual weights, up to a factor, as far as the tasks tell. The sums are kept by family of
    tasks, and once for each family that may be left out: nothing that a target's family says, be it as score
    or by way of priors, is in the weights for it. Features and scores are centred within each task, and data
    sets weigh equally.

    Attributes:
        features: p names.
        usual: p weights, none below 0, that the fit departs from.
        families: F names of the families of the tasks that it was fitted on.
        grams: f64[F + 1, F, p, p], sums of products of features; first the family that is left out (the last
            row: none), then the family of the tasks.
        moments: f64[F + 1, F, p], sums of products of features and scores.
        squares: f64[F + 1, F], sums of squared scores.
    """

    features: tuple[str, ...]
    usual: tuple[float, ...]
    families: tuple[str, ...]
    grams: np.ndarray
    moments: np.ndarray
    squares: np.ndarray

    def __post_init__(self) -> None:
        """Raises InputError if the sums are not of these features and families, or are no numbers."""
        p, number = len(self.features), len(self.families)
        if len(self.usual) != p or not min(self.usual, default=0.0) >= 0:
            raise InputError(describe("A fit needs a usual weight for each of its features", got=self.usual,
                                      cure="run `elm library calibrate` again"))
        shapes = {"grams": (number + 1, number, p, p), "moments": (number + 1, number, p),
                  "squares": (number + 1, number)}
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value.shape != shape or not np.isfinite(value).all():
                raise InputError(describe(
                    "The sums of a fit are not those of its features and families", where=name,
                    got=f"shape {value.shape}", expected=f"numbers of shape {shape}",
                    cure="run `elm library calibrate` again"))

    def weights(self, family: str | None = None) -> np.ndarray:
        """Weights f64[p] for a target, its family left out.

        The strength is that of the least squared error on families left out in turn; the largest where there
        are not two.

        Raises:
            InputError: it was fitted on no other family.
        """
        out = self.families.index(family) if family in self.families else len(self.families)
        kept = [place for place in range(len(self.families)) if place != out and self.squares[out, place] > 0]
        if not kept:
            raise InputError(describe(
                "The router fitted knows no family of tasks but the target's", got=family,
                cure="calibrate on more data sets, or take --router prior+nearest"))
        strength = STRENGTHS[-1] if len(kept) < 2 else min(
            STRENGTHS, key=lambda one: sum(self._error(out, kept, place, one) for place in kept))
        return self._solved(out, kept, strength)

    def by_feature(self, family: str | None = None) -> dict[str, float]:
        """What `weights` gives, by feature."""
        return dict(zip(self.features, self.weights(family).tolist(), strict=True))

    def _error(self, out: int, kept: list[int], place: int, strength: float) -> float:
        """Squared error on one family of weights that are fitted on the others."""
        found = self._solved(out, [other for other in kept if other != place], strength)
        return float(self.squares[out, place] - 2 * found @ self.moments[out, place]
                     + found @ self.grams[out, place] @ found)

    def _solved(self, out: int, families: list[int], strength: float) -> np.ndarray:
        return ridge(self.grams[out, families].sum(axis=0), self.moments[out, families].sum(axis=0),
                     np.array(self.usual), strength)

    def to_dict(self) -> dict[str, Any]:
        """The fit as a JSON-ready dictionary."""
        return {"features": list(self.features), "usual": list(self.usual), "families": list(self.families),
                **{name: getattr(self, name).tolist() for name in ("grams", "moments", "squares")}}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "FittedRouter":
        """Reads what `to_dict` gives; raises InputError if it is damaged."""
        try:
            return cls(tuple(map(str, value["features"])), tuple(map(float, value["usual"])),
                       tuple(map(str, value["families"])),
                       *(np.array(value[name], np.float64) for name in ("grams", "moments", "squares")))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(describe("A fit of the router cannot be read", got=error,
                                      cure="run `elm library calibrate` again")) from error


def ridge(gram: np.ndarray, moment: np.ndarray, usual: np.ndarray, strength: float) -> np.ndarray:
    """Weights f64[p], none below 0, that minimise squared error plus a penalty on what is not usual.

    The usual weights are taken times the factor that alone fits best, as scores have another scale.

    Args:
        gram: f64[p, p], sums of products of features.
        moment: f64[p], sums of products of features and what is predicted.
        usual: f64[p], weights that cost nothing, up to a factor.
        strength: of the penalty, in parts of each feature's sum of squares; a feature without any has
            weight 0.
    """
    from scipy.optimize import nnls  # late: half a second of start-up

    scale = np.sqrt(np.diag(gram))
    some = scale > 1e-12 * scale.max(initial=0.0)
    weights, spread = np.zeros(len(gram)), usual @ gram @ usual
    near = usual * max(0.0, usual @ moment / spread) if spread > 0 else np.zeros(len(gram))
    if some.any():
        own = scale[some]
        unit = gram[np.ix_(some, some)] / np.outer(own, own)
        lower = np.linalg.cholesky(unit + strength * np.eye(len(own)))
        pull = moment[some] / own + strength * near[some] * own
        weights[some] = nnls(lower.T, np.linalg.solve(lower, pull))[0] / own
    return weights


@dataclasses.dataclass(frozen=True)
class Threshold:
    """From which similarity on a library has an expert for a task, by number of queries.

    Attributes:
        num_queries: numbers of queries that it was fitted at, rising.
        values: mean similarity with the nearest expert's keys, one a number of queries.
        balanced_accuracies: mean of the parts that are right of tasks that the library has and has not; of
            a threshold that is fitted on every other expert, on the rest, both ways.
    """

    num_queries: tuple[int, ...]
    values: tuple[float, ...]
    balanced_accuracies: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises InputError if the fields do not fit each other."""
        lengths = {len(self.num_queries), len(self.values), len(self.balanced_accuracies)}
        if lengths == {0} or len(lengths) > 1 or not np.isfinite(self.values).all() or min(
                np.diff([0, *self.num_queries])) <= 0:
            raise InputError(describe("A threshold needs a value for each number of queries", got=self))

    def at(self, queries: int) -> float:
        """The value for a number of queries: between those known, by its logarithm."""
        return float(np.interp(np.log(queries), np.log(self.num_queries), self.values))

    def to_dict(self) -> dict[str, Any]:
        """The threshold as a JSON-ready dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Threshold":
        """Reads what `to_dict` gives; raises InputError if it is damaged."""
        try:
            return cls(tuple(map(int, value["num_queries"])), tuple(map(float, value["values"])),
                       tuple(map(float, value["balanced_accuracies"])))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(describe("A threshold cannot be read", got=error,
                                      cure="run `elm library calibrate` again")) from error
