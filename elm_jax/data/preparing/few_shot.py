"""Few-shot inputs: rows with their answers (exemplars) are put before each row's own input.

Exemplars come from the train split. For a task without one (unseen tasks, BIG-bench) they are other rows of
the split itself. A row of which no choice is right shows nothing, and is left out where it is drawn.
"""

from collections.abc import Iterator
from typing import Any

from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.draw import draw_rows
from elm_jax.errors import InputError, describe
from elm_jax.vocabularies.vocabulary import Vocabulary

FORM = "{inputs}\n{targets}\n\n"
"""Format of one exemplar."""


def with_exemplars(split: PreparedSplit, train: PreparedSplit, vocabulary: Vocabulary, *, few_shot: int,
                   max_length: int, seed: int = 0) -> PreparedSplit:
    """Puts exemplars before the inputs of a split, from its train split or from its own other rows.

    Each row draws its own exemplars, by the seed and its index in the source; a row never draws itself. It
    takes as many of them as fit: the whole input has at most `max_length` tokens, unless the row's own input
    alone has more.

    Args:
        split: the rows.
        train: the split of the exemplars, which may be `split` itself, or the whole that it is a subset of.
        vocabulary: of both.
        few_shot: exemplars of each row.
        max_length: tokens of an input, EOS among them.
        seed: of the draws.

    Returns:
        The same rows in the same order; ``info`` says `few_shot`, `few_shot_length`, `few_shot_seed`, and
        ``few_shot_taken``, how many exemplars there are in all rows.

    Raises:
        InputError: no exemplar is asked for, or the train split has too few rows.
    """
    own = 1 if train.split == split.split else 0
    if few_shot < 1 or len(train) < few_shot + own:
        raise InputError(describe("There are not enough rows to draw exemplars from",
                                  where=f"{train.name} {train.split}", got=f"{len(train)} rows",
                                  expected=f"more than few_shot = {few_shot}, which is 1 or more"))
    taken = [0]

    def rows() -> Iterator[dict[str, Any]]:
        numbers = {train.text(number)["index"]: number for number in range(len(train))} if own else {}
        for index in range(len(split)):
            text = split.text(index)
            same = numbers.get(text["index"])
            drawn = draw_rows(len(train), few_shot, (seed, text["index"]),
                              taken=() if same is None else (same,), one_by_one=True)
            inputs, tokens, count = _fitting(text["inputs"], [train.text(int(row)) for row in drawn],
                                             vocabulary, max_length)
            taken[0] += count
            yield {"inputs": tokens, "targets": split.targets(index), "choices": split.choices(index),
                   "label": split.label(index), "text": {**text, "inputs": inputs}}

    made = PreparedSplit.from_rows(split.name, split.split, split.info, rows())
    made.info.update(few_shot=few_shot, few_shot_length=max_length, few_shot_seed=seed,
                     few_shot_taken=taken[0])
    return made


def _fitting(own: str, exemplars: list[dict[str, Any]], vocabulary: Vocabulary,
             max_length: int) -> tuple[str, list[int], int]:
    """Text and tokens with as many exemplars as fit, and the number of these."""
    shots = [FORM.format(inputs=text["inputs"], targets=text["targets"]) for text in exemplars
             if text["targets"]]
    for count in range(len(shots), -1, -1):
        inputs = "".join(shots[:count]) + own
        tokens = [*vocabulary.encode(inputs), vocabulary.eos_id]
        if len(tokens) <= max_length or count == 0:
            return inputs, tokens, count
    raise AssertionError("not reached: no exemplar always fits")
