"""ROUGE-L of two texts, from 0 to 1; and the metrics of SeqIO's tasks, in percent.

ROUGE-L is that of rouge_score where a text's letters are those of ASCII. Other texts are split by their
script (`script_words`), which results name.
"""

import functools
import string
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from elm_jax.evaluation.script_words import composed, has_words, is_plain, words_of

BY_SCRIPT = "script"
"""Name of the tokenizer that is not rouge_score's, in results."""


def rouge_l(prediction: str, target: str) -> float:
    """ROUGE-L F1 with Porter stemming; a language without spaces is compared by its characters.

    Where the letters are those of ASCII this is the value of the package rouge_score. Otherwise words are
    whole letters with their marks (`script_words.words_of`), of which those in ASCII are stemmed. Of a target
    without any letter or digit, such as brackets or emoji, the characters are compared.

    Source: Lin 2004, https://aclanthology.org/W04-1013.
    """
    scorer = _scorers()["words" if has_words(target) else "signs"]
    return float(scorer.score(target, prediction)["rougeL"].fmeasure)


def rouge_tokenizer(predictions: Iterable[str], targets: Iterable[str]) -> str | None:
    """Name of the tokenizer of ROUGE-L on some texts; None for rouge_score's own."""
    english = all(map(is_plain, predictions)) and all(
        is_plain(target) and has_words(target) for target in targets if target.strip())
    return None if english else BY_SCRIPT


Targets = Sequence[str | Sequence[str]]
"""Of each row the right text, or all of several."""


def text_accuracy(targets: Targets, predictions: Sequence[str]) -> dict[str, float]:
    """Percentage of predictions that equal a right text of their row, ignoring case and punctuation."""
    hits = [any(_plain(target) == _plain(prediction) for target in _right(own))
            for own, prediction in zip(targets, predictions, strict=True)]
    return {"accuracy": 100.0 * float(np.mean(hits))}


def text_rouge_l(targets: Targets, predictions: Sequence[str]) -> dict[str, float]:
    """Mean in percent of the best `rouge_l` with a right text of the row."""
    scores = [max(rouge_l(prediction, target) for target in _right(own))
              for own, prediction in zip(targets, predictions, strict=True)]
    return {"rouge_l": 100.0 * float(np.mean(scores))}


TEXT_METRICS = {"rank": text_accuracy, "generation": text_rouge_l}
"""By kind of task, the metric of predicted texts in SeqIO's terms: ``(targets, predictions)``, in percent."""


def _right(own: str | Sequence[str]) -> Sequence[str]:
    return (own,) if isinstance(own, str) else own


def without_punctuation(text: str) -> str:
    """A text in lower case without the punctuation of any script."""
    return "".join(char for char in composed(text.lower())
                   if char not in string.punctuation and unicodedata.category(char)[0] != "P")


def _plain(text: str) -> str:
    """Removes case, punctuation and repeated white space; of punctuation alone nothing is removed."""
    return " ".join(without_punctuation(text).split() or text.split())


class _Words:
    """The words of rouge_score, and those of other scripts."""

    def __init__(self) -> None:
        from rouge_score import tokenizers

        self._english = tokenizers.DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        if is_plain(text):
            return self._english.tokenize(text)
        return [token for word in words_of(text)
                for token in (self._english.tokenize(word) if word.isascii() else [word])]


class _Signs:
    """The characters of a text, without white space."""

    def tokenize(self, text: str) -> list[str]:
        return [char for char in text if not char.isspace()]


@functools.lru_cache(maxsize=1)
def _scorers() -> dict[str, Any]:
    from rouge_score import rouge_scorer  # late: brings nltk and absl with it

    return {name: rouge_scorer.RougeScorer(["rougeL"], tokenizer=tokenizer)
            for name, tokenizer in (("words", _Words()), ("signs", _Signs()))}
