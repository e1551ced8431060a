"""Statistics of answers alone: a task's most frequent right answer, and whether a model always says the same.

If all rows offer the same choices, such as ``Yes`` and ``No``, an answer is its text. If each row has its own
choices, such as the endings of a story, texts do not repeat, and an answer is a position. Of a row with
several right choices each counts with its credit.
"""

import collections
import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from elm_jax.evaluation import rank


@dataclasses.dataclass(frozen=True)
class Answers:
    """Statistics of one model's answers on one task.

    Attributes:
        majority: f64[n], the credit of the most frequent right answer of these very rows; None for
            generations, and where old results do not tell the position of the right choice.
        by_position: whether an answer is the position of a choice, not its text.
        top_share: share of the rows on which the model gave its most frequent answer, and how many rows.
    """

    majority: np.ndarray | None
    by_position: bool
    top_share: tuple[float, int]

    @property
    def constant(self) -> bool:
        """Whether the model gave one and the same answer on all rows, of which there are several."""
        return is_constant(*self.top_share)


def is_constant(top_share: float | None, num_rows: int) -> bool:
    """Whether this share of the rows with the most frequent answer is all of them; None is not known."""
    return top_share == 1 and num_rows > 1


def read_answers(predictions: Sequence[Mapping[str, Any]]) -> Answers:
    """Computes the statistics from the stored predictions of one model on one task, at least one."""
    if "scores" not in predictions[0]:
        return Answers(None, False, _top_share([found["prediction"] for found in predictions]))
    # Choices that all rows share give no more unlike right answers than there are choices.
    by_position = (len({found["target"] for found in predictions if found["target"]})
                   > max(len(found["scores"]) for found in predictions))
    given = [_choice(found) if by_position else found["prediction"] for found in predictions]
    return Answers(_majority([_right(found, by_position) for found in predictions]), by_position,
                   _top_share(given))


def _right(found: Mapping[str, Any], by_position: bool) -> dict[Hashable, float] | None:
    """Credit of each right answer of a row; None where old results do not tell it."""
    if "credits" in found:
        places = {place: credit for place, credit in enumerate(found["credits"]) if credit}
        return places if by_position else dict(zip(found["right"], places.values(), strict=True))
    answer = _label(found) if by_position else found["target"]
    return None if answer is None else {answer: 1.0}


def _majority(right: Sequence[Mapping[Hashable, float] | None]) -> np.ndarray | None:
    if None in right:
        return None
    total: collections.Counter[Hashable] = collections.Counter()
    for row in right:
        total.update(row)
    answer = total.most_common(1)[0][0] if total else None
    return np.asarray([row.get(answer, 0.0) for row in right], np.float64)


def _top_share(answers: Sequence[Hashable]) -> tuple[float, int]:
    return collections.Counter(answers).most_common(1)[0][1] / len(answers), len(answers)


def _choice(found: Mapping[str, Any]) -> int:
    if "place" in found:
        return found["place"]
    return int(rank.predict(np.asarray([found["scores"]]), np.asarray([len(found["scores"])]))[0])


def _label(found: Mapping[str, Any]) -> int | None:
    if "label" in found:
        return found["label"]
    # Schema version 1 tells whether the choice was right, and so the right one if it was, or of two.
    if found["correct"]:
        return _choice(found)
    return 1 - _choice(found) if len(found["scores"]) == 2 else None
