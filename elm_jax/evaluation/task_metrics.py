"""Metrics that a task can be scored by: one of its kind always, and others that it names or that are asked
for.

- accuracy: credit of the choice whose score is highest (`choice_score` says how it is scored).
- acc_norm, acc_norm_tokens: credit of the choice of the highest sum of log-probabilities divided by the
choice's
  number of characters, or of tokens (end token included). Source of acc_norm: lm-evaluation-harness,
  https://github.com/EleutherAI/lm-evaluation-harness (``acc_norm``).
- rouge_l: `metrics.rouge_l`.
- exact_match: the texts are equal, white space aside.
- squad_em, squad_f1: SQuAD's exact match, and F1 of words, without case, punctuation and articles; in scripts
  without spaces a word is a character. Source: Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250.
- bleu: of the whole corpus, by sacrebleu (`bleu`).

Of several right texts the best counts.
"""

import collections
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from elm_jax.evaluation import bleu
from elm_jax.evaluation.intervals import Estimate, mean_with_interval
from elm_jax.evaluation.metrics import rouge_l, rouge_tokenizer, without_punctuation
from elm_jax.evaluation.script_words import BLANK, LETTER, kind_of_character, words_of

FIELDS = {"accuracy": "correct"}
"""A metric's field of a prediction, where it has not the metric's name."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def text_values(names: Iterable[str], prediction: str, references: Sequence[str]) -> dict[str, float]:
    """The values of one generated text by each metric that has one; of several right texts the best."""
    return {name: max(_TEXT_METRICS[name](prediction, target) for target in references)
            for name in names if name in _TEXT_METRICS}


def estimate(name: str, predictions: Sequence[Mapping[str, Any]]) -> tuple[Estimate, dict[str, Any]]:
    """A metric of stored predictions with its interval, and facts on how it was computed."""
    if name == "bleu":
        return bleu.corpus_bleu([found["prediction"] for found in predictions],
                                [references_of(found) for found in predictions])
    facts = {}
    if name == "rouge_l":
        tokenizer = rouge_tokenizer((found["prediction"] for found in predictions),
                                    (text for found in predictions for text in references_of(found)))
        facts = {} if tokenizer is None else {"tokenizer": tokenizer}
    field = FIELDS.get(name, name)
    return mean_with_interval([found[field] for found in predictions]), facts


def references_of(found: Mapping[str, Any]) -> list[str]:
    """All right texts of a stored prediction."""
    return found.get("references") or [found["target"]]


def exact_match(prediction: str, target: str) -> float:
    """1 if two texts are equal, white space aside, else 0."""
    return float(prediction.split() == target.split())


def squad_em(prediction: str, target: str) -> float:
    """SQuAD's exact match of two texts: 1 or 0."""
    return float(_squad_words(prediction) == _squad_words(target))


def squad_f1(prediction: str, target: str) -> float:
    """SQuAD's F1 of two texts' words; 1 for two texts without words."""
    found, wanted = _squad_words(prediction), _squad_words(target)
    if not found or not wanted:
        return float(found == wanted)
    common = sum((collections.Counter(found) & collections.Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def _squad_words(text: str) -> list[str]:
    def kind_of(char: str) -> str:
        kind = kind_of_character(char)  # a sign that is no punctuation, as of a currency, belongs to its word
        return LETTER if kind == BLANK and not char.isspace() else kind

    return words_of(_ARTICLES.sub(" ", without_punctuation(text)), kind_of)


_TEXT_METRICS: Mapping[str, Callable[[str, str], float]] = {
    "rouge_l": rouge_l, "exact_match": exact_match, "squad_em": squad_em, "squad_f1": squad_f1}
