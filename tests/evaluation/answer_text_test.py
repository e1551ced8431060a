"""Texts from tokens that come one by one: cut at stop strings wherever the pieces end; no half letters."""

import numpy as np
import pytest

from elm_jax.evaluation.answer_text import Answer, AnswerText
from elm_jax.vocabularies.vocabulary import ByteVocabulary

BYTES = ByteVocabulary(0)
"""A token a byte: every stop string spans tokens, and letters that are not ASCII do."""
END, OTHER_END = BYTES.eos_id, 2


def told(text, stop=(), limit=100, sizes=(1,), ends=(END, OTHER_END), more=()):
    """The answer, and the pieces that were told; `sizes` are the numbers of tokens that come together."""
    tokens = [*BYTES.encode(text), *more]
    answer, pieces, count = AnswerText(BYTES, ends, stop, (limit, "length")), [], 0
    while answer.answer is None:
        assert count < len(tokens), "it does not end"
        count += sizes[len(pieces) % len(sizes)]
        pieces.append(answer.add(tokens[:count]))
    return answer.answer, pieces


@pytest.mark.parametrize("sizes", [(1,), (3,), (1, 2, 4, 8), (100,)])
@pytest.mark.parametrize(("text", "stop", "expected"), [
    ("one\n\ntwo", ("\n\n",), "one"), ("abcabd!", ("abd",), "abc"), ("aab", ("ab",), "a"),
    ("xabcdef", ("abcdef", "cd"), "xab"), ("xabcd", ("cd", "bcd"), "xa"), ("Grüße, Jürgen", ("ü",), "Gr"),
    ("stop at once", ("stop",), ""),
])
def test_a_text_ends_before_its_first_stop_string(text, stop, expected, sizes):
    answer, pieces = told(text, stop, sizes=sizes)
    ends = [text.find(each) + len(each) for each in stop if each in text]
    assert answer == Answer(expected, len(BYTES.encode(text[:min(ends)])), "stop")
    assert "".join(pieces) == expected


@pytest.mark.parametrize("end", [END, OTHER_END])
def test_every_end_token_ends_a_text_and_is_not_told(end):
    answer, pieces = told("Grüße 🙂", stop=("never",), more=(end, *BYTES.encode("more")))
    assert answer == Answer("Grüße 🙂", len(BYTES.encode("Grüße 🙂")) + 1, "eos")
    assert "".join(pieces) == "Grüße 🙂" and not any("\ufffd" in piece for piece in pieces)


def test_a_text_of_all_its_tokens_is_told_whole():
    answer, pieces = told("no no", stop=("no one",), limit=5)
    assert answer == Answer("no no", 5, "length")
    assert pieces == ["", "", "", "no ", "no"], "what may begin a stop string is held back"


def test_half_a_letter_at_the_end_is_told_as_the_vocabulary_tells_it():
    half = BYTES.encode("ü")[:1]
    answer, pieces = told("a", limit=2, more=half)
    assert answer.text == BYTES.decode(np.asarray([*BYTES.encode("a"), *half])) == "".join(pieces)
