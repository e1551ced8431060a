"""Metrics of texts against rouge_score, and against what a reader of other scripts would say."""

import random
import unicodedata

import pytest
from rouge_score import rouge_scorer

from elm_jax.evaluation import metrics
from elm_jax.evaluation.script_words import is_plain, words_of

SCORER = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


@pytest.mark.parametrize(("prediction", "target"), [
    ("the cat sat on the mat", "the cats were sitting on a mat"), ("", "something"), ("one", "one"),
    ("Police killed the gunman", "the gunman killed police"), ("a b", "c d"), ("", ""),
    ("“Quoted” – it’s £5, 30 °C…", "Quoted: its 5, 30 C"), ("x² ½ ™", "x 2 1 2 tm"),
])
def test_rouge_l_is_rouge_scores(prediction: str, target: str) -> None:
    assert metrics.rouge_l(prediction, target) == SCORER.score(target, prediction)["rougeL"].fmeasure


def test_texts_of_ascii_letters_keep_every_value() -> None:
    draw = random.Random(0)
    signs = [chr(code) for code in range(32, 127)] + list("\t\n“”’–…€°²™ ") + ["running ", "The ", "cities"]
    for _ in range(200):
        one, two = ("".join(draw.choices(signs, k=40)) for _ in range(2))
        assert is_plain(one) and metrics.rouge_tokenizer([one, "?"], ["x", two + "x"]) is None
        assert metrics.rouge_l(one, two) == SCORER.score(two, one)["rougeL"].fmeasure
        assert [word for word in words_of(one) if len(word) < 4] == [
            word for word in rouge_words(one) if len(word) < 4]


def rouge_words(text: str) -> list[str]:
    return "".join(char if char.isascii() and char.isalnum() else " " for char in text.lower()).split()


def test_rouge_l_by_hand() -> None:
    # Longest common subsequence "cat on the mat": 4 of 5 and of 8 words, stemmed.
    found = metrics.rouge_l("cats sat on the mat", "a big cat is lying on the mat")
    assert found == pytest.approx(2 * (4 / 5) * (4 / 8) / (4 / 5 + 4 / 8))


@pytest.mark.parametrize(("text", "part", "expected"), [
    ("고양이가 매트에 앉았다", "고양이가 나무에 앉았다", 2 / 3),
    ("猫坐在垫子上", "猫坐在树上", 2 * 4 / (6 + 5)), ("ねこはマットの上", "ねこは木の上", 2 * 5 / (8 + 6)),
    ("Кошка сидела на ковре", "Собака сидела на ковре", 3 / 4), ("แมวนั่ง", "แมวนอน", None),
    ("القط جلس على السجادة", "القط جلس على الكرسي", 3 / 4), ("η γάτα κάθισε", "η γάτα έφυγε", 2 / 3),
    ("Der Kater saß über", "Der Kater lag über", 3 / 4), ("l’été à Nîmes", "l’hiver à Nîmes", 3 / 4),
    ("बिल्ली चटाई पर बैठी", "बिल्ली पेड़ पर बैठी", 3 / 4), ("( [ { } ] )", "( [ { ] )", 2 * 5 / 11),
    ("🎬🐟", "🎬🐕", 1 / 2),
])
def test_rouge_l_of_every_script_is_1_for_equal_texts(text: str, part: str, expected: float | None) -> None:
    assert metrics.rouge_l(text, text) == 1.0 and metrics.rouge_l("!? wholly other", text) == 0.0
    assert metrics.rouge_l(unicodedata.normalize("NFD", text), text) == 1.0
    assert 0 < metrics.rouge_l(part, text) < 1
    if expected is not None:
        assert metrics.rouge_l(part, text) == pytest.approx(expected)
    assert metrics.rouge_tokenizer(["plain"], ["plain", text]) == "script"


def test_words_keep_letters_whole_and_one_way_of_writing() -> None:
    assert words_of("L’été, die Straße; naïve İ") == ["l", "été", "die", "straße", "naïve", "i̇"]
    assert words_of("2024年に iPhone を") == ["2024", "年", "に", "iphone", "を"]
    assert words_of("เก้าอี้") == ["เ", "ก้", "า", "อี้"]  # marks stay with their letter
    assert words_of("ＡＢＣ１２ ｶﾞ") == ["abc12", "ガ"]
    assert words_of("می\u200cخواهم") == ["میخواهم"] and words_of("葛\U000e0100") == ["葛"]


def test_english_words_among_others_are_stemmed() -> None:
    assert metrics.rouge_l("running 고양이", "runs 고양이") == 1.0


def test_accuracy_of_texts_ignores_the_punctuation_of_any_script_and_counts_every_right_text() -> None:
    found = metrics.text_accuracy(["答案", "Yes", ["no", "never"], "<="], ["答案。", "“yes”", "Never!", ">="])
    assert found["accuracy"] == 75.0  # of signs alone nothing is taken off
    assert metrics.text_rouge_l(["a b", ["x", "고양이"]], ["a", "고양이"])["rouge_l"] == pytest.approx(
        100 * (2 / 3 + 1) / 2)
