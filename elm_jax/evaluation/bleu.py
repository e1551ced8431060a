"""BLEU of a corpus, by the package sacrebleu.

Where a text is of a script without spaces, whose words sacrebleu's default tokenizer does not find, its
tokenizer ``char`` is used for all texts, and named.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.evaluation.intervals import Estimate, effective_count, wilson
from elm_jax.evaluation.script_words import ALONE, kind_of_character

BY_CHARACTER = "char"


def require_sacrebleu(where: str) -> None:
    """Raises InputError if sacrebleu is not installed."""
    if importlib.util.find_spec("sacrebleu") is None:
        raise InputError(describe("BLEU needs the package sacrebleu, which is not installed", where=where,
                                  cure="pip install 'elm_jax[bleu]'"))


def corpus_bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]
                ) -> tuple[Estimate, dict[str, Any]]:
    """BLEU from 0 to 1 of predictions, each against one or more right texts, with Wilson's interval.

    The counts of n-grams of all rows are added before BLEU is computed; its variance is the jackknife's over
    the rows.

    Args:
        predictions: at least one.
        references: of each prediction at least one.

    Returns:
        The estimate; and ``{"sacrebleu": its version, "tokenizer": name}``, the second only if it is not the
        default one, 13a.

    Raises:
        InputError: sacrebleu is not installed.
    """
    require_sacrebleu("bleu")
    import sacrebleu  # late: an extra
    from sacrebleu.metrics import BLEU

    by_character = any(kind_of_character(char) == ALONE
                       for texts in (predictions, *references) for text in texts for char in text)
    tokenizer = {"tokenize": BY_CHARACTER} if by_character else {}
    sentence = BLEU(effective_order=True, **tokenizer)
    counts = []
    for prediction, right in zip(predictions, references, strict=True):
        found = sentence.sentence_score(prediction, list(right))
        counts.append([*found.counts, *found.totals, found.sys_len, found.ref_len])

    def value_of(total: np.ndarray) -> float:
        numbers = [int(number) for number in total]
        score = BLEU.compute_bleu(numbers[:4], numbers[4:8], *numbers[8:], smooth_method="exp").score
        return min(1.0, score / 100)

    table, count = np.asarray(counts, np.int64), len(counts)
    total = table.sum(axis=0)
    value, variance = value_of(total), 0.0
    if count > 1:
        others = np.asarray([value_of(total - own) for own in table])
        variance = float((count - 1) * others.var())
    low, high = wilson(value, effective_count(value, variance, count))
    facts = {"sacrebleu": sacrebleu.__version__} | ({"tokenizer": BY_CHARACTER} if by_character else {})
    return Estimate(value, low, high, count), facts
