"""Exemplars stand before the input, come from train, and stay within the length."""

import numpy as np
import pytest

from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.preparing.few_shot import with_exemplars
from elm_jax.errors import InputError
from elm_jax.vocabularies.vocabulary import Vocabulary, train_vocabulary

WORDS = ["red", "green", "bright", "house", "river", "stands", "near", "old"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Vocabulary:
    path = tmp_path_factory.mktemp("few") / "v.model"
    train_vocabulary([" ".join(WORDS) + " yes no 0 1 2 3 4 5 6 7 8 9 \n"] * 20, path, 34, seed=0)
    return Vocabulary.load(path)


def make_split(vocabulary: Vocabulary, name: str, count: int) -> PreparedSplit:
    def tokens(text: str) -> list[int]:
        return [*vocabulary.encode(text), 1]

    draw = np.random.default_rng(len(name))
    rows = []
    for number in range(count):
        inputs = f"{name} {number} " + " ".join(draw.permutation(WORDS)[:3])
        choices = ["yes", "no"]
        rows.append({"inputs": tokens(inputs), "targets": tokens(choices[number % 2]),
                     "choices": [tokens(choice) for choice in choices],
                     "text": {"inputs": inputs, "targets": choices[number % 2], "choices": choices,
                              "index": number}})
    return PreparedSplit.from_rows("toys__ask", name, {"kind": "rank"}, rows)


def exemplars_of(inputs: str, own: str) -> list[str]:
    assert inputs.endswith(own)
    return [shot for shot in inputs.removesuffix(own).split("\n\n") if shot]


def test_exemplars_of_train_stand_before_the_input(vocabulary):
    train, held = make_split(vocabulary, "train", 20), make_split(vocabulary, "validation", 6)
    made = with_exemplars(held, train, vocabulary, few_shot=3, max_length=10_000)
    known = {f"{train.text(row)['inputs']}\n{train.text(row)['targets']}" for row in range(20)}
    seen = []
    for row in range(6):
        text, own = made.text(row), held.text(row)
        shots = exemplars_of(text["inputs"], own["inputs"])
        assert len(set(shots)) == 3 and set(shots) <= known
        assert made.inputs(row).tolist() == [*vocabulary.encode(text["inputs"]), 1]
        assert {**text, "inputs": None} == {**own, "inputs": None}
        assert made.label(row) == held.label(row) and made.targets(row).tolist() == held.targets(row).tolist()
        assert [choice.tolist() for choice in made.choices(row)] == [
            choice.tolist() for choice in held.choices(row)]
        seen.append(tuple(shots))
    assert len(set(seen)) == 6  # each row has its own
    assert made.info["few_shot"] == 3 and made.info["few_shot_taken"] == 18
    assert held.info == {"kind": "rank"}


def test_the_seed_decides(vocabulary):
    train, held = make_split(vocabulary, "train", 20), make_split(vocabulary, "validation", 4)

    def texts(seed: int) -> list[str]:
        made = with_exemplars(held, train, vocabulary, few_shot=2, max_length=10_000, seed=seed)
        return [made.text(row)["inputs"] for row in range(4)]

    assert texts(0) == texts(0) != texts(1)


def test_a_training_row_is_never_its_own_exemplar(vocabulary):
    train = make_split(vocabulary, "train", 4)
    for seed in range(20):
        made = with_exemplars(train, train, vocabulary, few_shot=3, max_length=10_000, seed=seed)
        for row in range(4):
            own = train.text(row)["inputs"]
            shots = exemplars_of(made.text(row)["inputs"], own)
            assert len(shots) == 3 and not any(shot.startswith(own + "\n") for shot in shots)


@pytest.mark.parametrize("max_length", [8, 24, 40, 64, 90])
def test_no_more_exemplars_than_fit(vocabulary, max_length):
    train, held = make_split(vocabulary, "train", 20), make_split(vocabulary, "validation", 6)
    most = with_exemplars(held, train, vocabulary, few_shot=4, max_length=10_000)
    made = with_exemplars(held, train, vocabulary, few_shot=4, max_length=max_length)
    for row in range(6):
        own = held.text(row)["inputs"]
        shots = exemplars_of(made.text(row)["inputs"], own)
        whole = exemplars_of(most.text(row)["inputs"], own)
        assert shots == whole[:len(shots)]
        assert len(made.inputs(row)) <= max_length or shots == []
        if len(shots) < 4:  # one more would not fit
            longer = "".join(f"{shot}\n\n" for shot in whole[:len(shots) + 1]) + own
            assert len(vocabulary.encode(longer)) + 1 > max_length


def test_too_few_rows_are_refused(vocabulary):
    train, held = make_split(vocabulary, "train", 3), make_split(vocabulary, "validation", 2)
    assert len(with_exemplars(held, train, vocabulary, few_shot=3, max_length=99)) == 2
    for split, count in ((held, 4), (train, 3), (held, 0)):
        with pytest.raises(InputError, match=rf"(?s)not enough rows.*train.*3 rows.*few_shot = {count}"):
            with_exemplars(split, train, vocabulary, few_shot=count, max_length=99)
