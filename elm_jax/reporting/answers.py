"""Statistics of answers alone: a task's most frequent right answer, and whether a model always says the same.

If all rows offer the same choices, such as ``Yes`` and ``No``, an answer is its text. If each row has its own
choices, such as the endings of a story, texts do not repeat, and an answer is a position.
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
        majority: f64[n], 1 where the most frequent right answer of these very rows is right; None for
            generations, and where old results do not tell the position of the right choice.
        by_position: whether an answer is the position of a choice, not its text.
        constant: whether the model gave one and the same answer on all rows, of which there are several.
    """

    majority: np.ndarray | None
    by_position: bool
    constant: bool


def read_answers(predictions: Sequence[Mapping[str, Any]]) -> Answers:
    """Computes the statistics from the stored predictions of one model on one task, at least one."""
    if "scores" not in predictions[0]:
        return Answers(None, False, _all_equal([found["prediction"] for found in predictions]))
    # Choices that all rows share give no more unlike right answers than there are choices.
    by_position = (len({found["target"] for found in predictions})
                   > max(len(found["scores"]) for found in predictions))
    if by_position:
        right, given = map(_label, predictions), map(_choice, predictions)
    else:
        right, given = ([found[name] for found in predictions] for name in ("target", "prediction"))
    return Answers(_majority(list(right)), by_position, _all_equal(list(given)))


def _majority(right: Sequence[Hashable]) -> np.ndarray | None:
    if None in right:
        return None
    answer = collections.Counter(right).most_common(1)[0][0]
    return np.asarray([one == answer for one in right], np.float64)


def _all_equal(answers: Sequence[Hashable]) -> bool:
    return len(answers) > 1 and len(set(answers)) == 1


def _choice(found: Mapping[str, Any]) -> int:
    return int(rank.predict(np.asarray([found["scores"]]), np.asarray([len(found["scores"])]))[0])


def _label(found: Mapping[str, Any]) -> int | None:
    if "label" in found:
        return found["label"]
    # Schema version 1 tells whether the choice was right, and so the right one if it was, or of two.
    if found["correct"]:
        return _choice(found)
    return 1 - _choice(found) if len(found["scores"]) == 2 else None
