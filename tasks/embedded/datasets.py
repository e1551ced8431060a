"""The rows of every embedded data set, and the raw passages: pure Python, from fixed seeds."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from elm_jax.tasks.embedded import news, opinions, pairs, raw_text, reading, writing
from elm_jax.tasks.embedded.draw import Draw

from elm_jax.data.arrays.span_corruption import check_overlap
from elm_jax.errors import InputError, describe, unknown_name

Row = dict[str, Any]

NUM_ROWS = {"train": 600, "validation": 150}
NUM_PASSAGES = 4000

TRAIN: dict[str, Callable[[Draw, int], Row]] = {
    "mini_topic": news.topic_row,
    "mini_review": opinions.review_row,
    "mini_question": opinions.question_row,
    "mini_entailment": pairs.entailment_row,
    "mini_reading": reading.reading_row,
    "mini_data_to_text": writing.data_to_text_row,
    "mini_headline": news.headline_row,
    "mini_extraction": reading.extraction_row,
}
"""Data sets that experts are trained on, with what makes a row: a stream of draws and the row's turn,
which goes round the labels."""
UNSEEN: dict[str, Callable[[Draw, int], Row]] = {
    "mini_emotion": opinions.emotion_row,
    "mini_product": opinions.product_row,
    "mini_ending": pairs.ending_row,
    "mini_paraphrase": pairs.paraphrase_row,
    "mini_note": writing.note_row,
}
"""Data sets whose rows are never trained on."""

MAIN_FIELDS = {
    "mini_topic": ("text",), "mini_review": ("review",), "mini_question": ("question",),
    "mini_entailment": ("premise",), "mini_reading": ("passage",), "mini_data_to_text": ("data",),
    "mini_headline": ("text",), "mini_extraction": ("passage",), "mini_emotion": ("message",),
    "mini_product": ("description",), "mini_ending": ("story",), "mini_paraphrase": ("first",),
    "mini_note": ("note",),
}
"""The fields in which no two rows of a data set may agree, whatever else differs."""


@functools.cache
def _all_rows(dataset: str) -> tuple[Row, ...]:
    make = (TRAIN | UNSEEN)[dataset]
    rows: list[Row] = []
    seen = set()
    attempt = 0
    total = sum(NUM_ROWS.values())
    while len(rows) < total:
        row = make(Draw(dataset, attempt), len(rows))
        attempt += 1
        key = tuple(row[field] for field in MAIN_FIELDS[dataset])
        if key not in seen:
            seen.add(key)
            rows.append(row)
    # Labels go round in turn: shuffled within each split, both stay balanced.
    cut = NUM_ROWS["train"]
    draw = Draw(dataset, "order")
    return (*draw.shuffled(rows[:cut]), *draw.shuffled(rows[cut:]))


def rows(dataset: str, split: str) -> list[Row]:
    """The rows of a data set's split, the same in every process.

    Args:
        dataset: one of `TRAIN` or `UNSEEN`.
        split: ``train`` (600 rows) or ``validation`` (150).

    Raises:
        InputError: no such data set or split.
    """
    if dataset not in MAIN_FIELDS:
        raise unknown_name("embedded data set", dataset, MAIN_FIELDS)
    if split not in NUM_ROWS:
        raise InputError(describe(f"Data set {dataset} has no split {split!r}",
                                  expected=f"one of {', '.join(NUM_ROWS)}"))
    cut = NUM_ROWS["train"]
    found = _all_rows(dataset)[:cut] if split == "train" else _all_rows(dataset)[cut:]
    return [dict(row) for row in found]


def sentences(text: str) -> list[str]:
    """The sentences of a text."""
    return [part for part in re.split(r'(?<=[.!?])\s+|(?<=[.!?]")\s+(?=[A-Z])', text.strip()) if part]


def texts(row: Mapping[str, Any]) -> list[str]:
    """The texts of a row: its fields of a sentence's length, not single words or names."""
    found: list[str] = []
    for value in row.values():
        for text in value if isinstance(value, list) else [value]:
            if len(text.split()) > 3:
                found.append(text)
    return found


def held_out() -> list[str]:
    """The texts of every row that anything is evaluated on: validation rows, and all unseen rows."""
    held = [row for name in TRAIN for row in rows(name, "validation")]
    held += [row for name in UNSEEN for split in NUM_ROWS for row in rows(name, split)]
    return [text for row in held for text in texts(row)]


def _holds_one_of(text: str, whole: frozenset[tuple[str, ...]]) -> bool:
    """Whether sentences of a text, one after another, are one of these texts."""
    parts = sentences(text)
    return any(tuple(parts[start:end]) in whole
               for start in range(len(parts)) for end in range(start + 1, len(parts) + 1))


def _passage(draw: Draw) -> str:
    """Text of the same world: text of no data set, a report, a review, a scene, or plain facts."""
    if draw.chance(0.4):
        return raw_text.raw_text(draw)
    source = draw.number(0, 9)
    turn = draw.number(0, 999)
    if source < 4:
        return news.topic_row(draw, turn)["text"]
    if source < 6:
        return opinions.review_row(draw, turn)["review"]
    if source < 9:
        return str(reading.reading_row(draw, turn)["passage"])
    return " ".join((str(pairs.entailment_row(draw, turn)["premise"]),
                     str(pairs.entailment_row(draw, turn)["premise"])))


@functools.cache
def _all_passages() -> tuple[str, ...]:
    # Single sentences without a name or number stand in rows and passages alike, as "It was worth
    # every penny." does in reviews: a passage that has one must stay, or the base never reads reviews.
    whole = frozenset(tuple(sentences(text)) for name in MAIN_FIELDS for split in NUM_ROWS
                      for row in rows(name, split) for text in texts(row))
    drawn = dict.fromkeys(_passage(Draw("passages", attempt)) for attempt in range(2 * NUM_PASSAGES))
    candidates = [text for text in drawn if not _holds_one_of(text, whole)]
    overlaps = check_overlap(candidates, held_out())
    return tuple(text for number, text in enumerate(candidates) if number not in overlaps)[:NUM_PASSAGES]


def passages() -> list[str]:
    """Raw passages for pretraining, from a stream of draws of their own.

    None holds a whole text of any row, and none shares twelve words in a row with a validation row
    or with any row of an unseen data set.
    """
    return list(_all_passages())
