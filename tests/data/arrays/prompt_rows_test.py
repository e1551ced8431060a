"""Prompts are cut on the side that their task says, with EOS and BOS, and only where they are too long."""

import numpy as np
import pytest

from elm_jax.data.arrays.cursor import TrainStream
from elm_jax.data.arrays.joined import Joined
from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.arrays.prompt_rows import check_context, count_cut, examples_of, prompts_of
from elm_jax.data.arrays.two_sided import TwoSided
from elm_jax.errors import InputError
from elm_jax.types import SpecialIds

EOS, BOS = 1, 7
FORMS = {"two-sided": TwoSided(SpecialIds(0, EOS, 0)), "joined": Joined(SpecialIds(0, EOS, None)),
         "joined, BOS": Joined(SpecialIds(0, EOS, None, BOS))}
SIZES = (0, 1, 4, 5, 6, 7, 20)
LENGTH = 6
every_form = pytest.mark.parametrize("name", FORMS)


def split_of(side: str | None, sizes: tuple[int, ...] = SIZES, target: int = 2) -> PreparedSplit:
    rows = [{"inputs": [*range(10, 10 + size), EOS], "targets": [3] * (target - 1) + [EOS],
             "text": {"inputs": "q", "targets": "a", "choices": [], "index": index}}
            for index, size in enumerate(sizes)]
    own = {} if side is None else {"cut_prompt": side}
    return PreparedSplit.from_rows("toys__ask", "train", {"kind": "generation", **own}, rows)


def expected(name: str, side: str | None, size: int) -> list[int]:
    """The prompt of `size` words, written down by hand: what stands at its ends takes room too."""
    words = list(range(10, 10 + size))
    front = [BOS] if name == "joined, BOS" else [EOS] if name == "joined" and not words else []
    back = [EOS] if name == "two-sided" else []
    room = LENGTH - len(front) - len(back)
    kept = words[max(0, size - room):] if side == "left" else words[:room]
    return [*front, *kept, *back]


@every_form
@pytest.mark.parametrize("side", ["left", "right", None])
def test_a_prompt_keeps_its_ends_and_loses_words_on_one_side(name, side):
    form, split = FORMS[name], split_of(side)
    found = [prompt.tolist() for prompt in prompts_of(split, form, LENGTH)]
    assert found == [expected(name, side, size) for size in SIZES]
    assert max(map(len, found)) == LENGTH
    assert [prompt.tolist() for prompt in prompts_of(split, form, LENGTH, [6, 2])] == [found[6], found[2]]
    whole = [len(prompt) for prompt in prompts_of(split, form, 100)]
    assert [form.prompt_length(size + 1) for size in SIZES] == whole
    assert count_cut(split, form, LENGTH) == sum(size > LENGTH for size in whole) == (
        {"two-sided": 3, "joined": 2, "joined, BOS": 3}[name])


@every_form
@pytest.mark.parametrize("pack", [True, False])
def test_training_sees_the_prompts_of_evaluation(name, pack):
    """One row of a batch for each example, whichever side is cut; packed, their lengths are known before."""
    form, split = FORMS[name], split_of("left")
    source = examples_of(split, form, {"inputs": LENGTH, "targets": 2})
    stream = TrainStream(source, form=form, batch_size=len(SIZES), lengths={"inputs": LENGTH, "targets": 2},
                         seed=0, pack=pack, shuffle=False)
    batch = stream.batch(0)
    tokens = batch["encoder_input_tokens" if name == "two-sided" else "tokens"]
    flat = " ".join(map(str, tokens[tokens != 0]))
    for number, size in enumerate(SIZES):
        assert source.lengths_of(number) == tuple(map(len, source.example(number)))
        assert " ".join(map(str, expected(name, "left", size))) in flat
    assert examples_of(split_of("right"), form, {"inputs": LENGTH, "targets": 2}).example(6)[0].size == 21


def test_a_row_of_training_is_no_wider_than_the_context():
    """Examples that the context holds train though S and T together are more; others are one error."""
    form, lengths = Joined(SpecialIds(0, EOS, None), 24), {"inputs": 20, "targets": 8}
    split = split_of(None, (20, 7, 5, 30), target=4)
    source = examples_of(split, form, lengths)
    sizes = [source.lengths_of(number) for number in range(4)]
    rows = [[source.example(number) for number in row] for row in form.pack(sizes, lengths)]
    batch = form.make_packed(rows, lengths, len(rows))
    assert batch["tokens"].shape == (len(rows), 24) and len(rows) < 4
    assert batch["loss_weights"].sum() == 16  # of every target, whole
    wide = Joined(SpecialIds(0, EOS, None)).make_packed(rows, lengths, len(rows))
    for key, array in batch.items():
        np.testing.assert_array_equal(array, wide[key][:, :24])
    with pytest.raises(InputError, match=r"network's context\n  where: toys__ask train, row 0\n"
                                         r"  got: 20 \+ 5 tokens.*, and 1 more row(.|\n)*at most 24"):
        examples_of(split_of(None, (20, 7, 5, 30), target=5), form, lengths)


def test_rows_to_score_are_checked_with_what_follows():
    form = Joined(SpecialIds(0, EOS, None), 12)
    split = split_of(None, (5, 9, 8))
    prompts = prompts_of(split, form, 100)
    check_context(split, form, prompts, [7, 3, 4])
    with pytest.raises(InputError, match=r"row 8\n  got: 9 \+ 4 tokens of the prompt and behind it\n"):
        check_context(split, form, prompts, [7, 4, 4], rows=[6, 8, 9])
    check_context(split, FORMS["two-sided"], prompts, [99, 99, 99])
