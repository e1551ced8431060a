"""Metrics that a task names: against SQuAD's rules in plain Python, and against sacrebleu."""

import collections
import re
import string

import numpy as np
import pytest

from elm_jax.errors import InputError
from elm_jax.evaluation import bleu, task_metrics
from elm_jax.evaluation.evaluation_settings import (
    KNOWN_METRICS,
    MORE_METRICS,
    EvaluationSettings,
    wanted_metrics,
)
from elm_jax.evaluation.script_words import words_of

ENGLISH = ("The cat sat on the mat.", "a cat sat", "U.S.A. won $5 (five)", "it's one; a 'test'", "", "the",
           "don't  stop", "Denver Broncos", "the Denver Broncos!")


def squad_words(text: str) -> list[str]:
    """As SQuAD's evaluation script normalises an answer: case, punctuation, articles, white space."""
    plain = "".join(char for char in text.lower() if char not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


@pytest.mark.parametrize("prediction", ENGLISH)
def test_squad_metrics_follow_its_rules(prediction: str) -> None:
    for target in ENGLISH:
        found, wanted = squad_words(prediction), squad_words(target)
        common = sum((collections.Counter(found) & collections.Counter(wanted)).values())
        f1 = float(found == wanted) if not found or not wanted else 0.0 if not common else (
            2 * (common / len(found)) * (common / len(wanted)) / (common / len(found) + common / len(wanted)))
        assert task_metrics.squad_f1(prediction, target) == pytest.approx(f1)
        assert task_metrics.squad_em(prediction, target) == float(found == wanted)


def test_texts_of_other_scripts_and_several_right_ones() -> None:
    assert task_metrics.squad_f1("東京です。", "東京") == pytest.approx(2 * 2 / (4 + 2))
    assert task_metrics.squad_em("«Москва»", "москва") == 1.0
    assert task_metrics.squad_f1("5€", "5 €") < 1  # as for dollars: a sign belongs to its word
    found = task_metrics.text_values(("exact_match", "squad_f1", "bleu"), "-12", ["12", " -12"])
    assert found == {"exact_match": 1.0, "squad_f1": 1.0}
    assert task_metrics.exact_match("-12", "12") == 0.0 and task_metrics.squad_em("-12", "12") == 1.0


def test_metrics_are_those_of_the_kind_of_task() -> None:
    assert wanted_metrics("rank", ("acc_norm",), ("bleu", "acc_norm_tokens"), "t") == (
        "accuracy", "acc_norm", "acc_norm_tokens")
    assert wanted_metrics("generation", (), ("bleu",), "t") == ("rouge_l", "bleu")
    with pytest.raises(InputError, match=r"metric of a rank task(.|\n)*task t"):
        wanted_metrics("rank", ("squad_f1",), (), "task t")
    with pytest.raises(InputError, match=r"acc_norms(.|\n)*acc_norm"):
        EvaluationSettings(metrics=("acc_norms",))
    assert set(MORE_METRICS) == {name for own in KNOWN_METRICS.values() for name in own} - {
        "accuracy", "rouge_l"}


PAIRS = [("the cat sat on the mat today", ["the cat sat on a mat", "a cat is on the mat today"]),
         ("he went home", ["he went home early .", "she went home"]), ("good", ["very good indeed", "good"]),
         ("two dogs ran across the wide green field", ["two dogs ran over the green field", "dogs ran"])]


def test_bleu_is_sacrebleus_of_the_corpus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    predictions, references = [one for one, _ in PAIRS], [right for _, right in PAIRS]
    found, facts = bleu.corpus_bleu(predictions, references)
    streams = [[right[number] for right in references] for number in range(2)]
    assert 100 * found.value == pytest.approx(sacrebleu.corpus_bleu(predictions, streams).score, abs=1e-9)
    assert 0 <= found.low < found.value < found.high <= 1 and found.n == len(PAIRS)
    assert facts == {"sacrebleu": sacrebleu.__version__}
    whole, _ = bleu.corpus_bleu(predictions, [[one] for one in predictions])
    assert whole.value == pytest.approx(1) and whole.low < 0.9  # certain of nothing


def test_bleu_of_a_script_without_spaces_counts_characters() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    predictions, references = ["猫坐在垫子上面"], ["猫坐在垫子上"]
    found, facts = bleu.corpus_bleu(predictions, [references])
    assert facts["tokenizer"] == "char" and len(words_of(predictions[0])) == 7
    assert 100 * found.value == pytest.approx(
        sacrebleu.corpus_bleu(predictions, [references], tokenize="char").score)


def test_bleu_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"sacrebleu(.|\n)*elm_jax\[bleu\]"):
        bleu.corpus_bleu(["a"], [["a"]])


def test_the_tokenizer_is_named_where_it_is_not_the_english_one() -> None:
    rows = [{"prediction": "고양이", "target": "고양이", "rouge_l": 1.0},
            {"prediction": "x", "target": "y", "references": ["y", "z"], "rouge_l": 0.0}]
    found, facts = task_metrics.estimate("rouge_l", rows)
    assert (found.value, facts) == (0.5, {"tokenizer": "script"})
    assert task_metrics.estimate("rouge_l", rows[1:])[1] == {}
    assert np.isclose(task_metrics.estimate("exact_match", [{"exact_match": 1.0}])[0].low, 0.2065, atol=1e-3)
