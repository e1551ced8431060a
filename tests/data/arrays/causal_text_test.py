"""Causal language modelling over passages: every token of a passage, and its EOS, is predicted once."""

import collections
import dataclasses

import family_rows
import numpy as np
import pytest
import weights

from elm_jax.data.arrays.batch_forms import form_of
from elm_jax.data.arrays.cursor import TrainStream
from elm_jax.data.arrays.objectives import PretrainingSettings, objective_of
from elm_jax.errors import InputError
from elm_jax.models import families

TEXTS = ["a", "the quick brown fox jumps", "", "over", "the lazy dog and runs on until it sleeps", "x y"]
GPT2, LLAMA = family_rows.CONFIGS["gpt2"], dataclasses.replace(family_rows.CONFIGS["llama"], bos_id=5)
ROW = {"inputs": 8, "targets": 16}


class Letters:
    """One id a character, from 6 on; EOS is the network's."""

    def __init__(self, eos_id: int) -> None:
        self.eos_id = eos_id

    def encode(self, text: str) -> list[int]:
        return [6 + ord(letter) % 23 for letter in text]


def examples(config, chunk_length=None):
    settings = PretrainingSettings(ROW, chunk_length, None, 0)
    objective = objective_of(config)
    objective.check(settings, config)
    return objective.examples(TEXTS, Letters(config.eos_id), settings, config)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["without BOS", "with BOS"])
@pytest.mark.parametrize("chunk_length", [None, 7])
def test_every_token_is_predicted_once_from_its_own_passage(config, chunk_length):
    source, lengths = examples(config, chunk_length)
    network = families.network_of(config)
    stream = TrainStream(source, form=form_of(network), batch_size=1, lengths=lengths, seed=3, pack=True)
    letters = Letters(config.eos_id)
    wanted = [[*letters.encode(text), config.eos_id] for text in TEXTS if text]
    front = config.eos_id if config.bos_id is None else config.bos_id
    found, most = collections.Counter(), 0
    for step in range(stream.steps_per_epoch):
        batch = {name: array[0] for name, array in stream.batch(step).items()}
        assert batch["tokens"].shape == (24,)
        most = max(most, batch["segment_ids"].max())
        for segment in range(1, batch["segment_ids"].max() + 1):
            inside = batch["segment_ids"] == segment
            tokens, weighed = batch["tokens"][inside].tolist(), batch["loss_weights"][inside]
            np.testing.assert_array_equal(batch["positions"][inside], np.arange(len(tokens)))
            assert batch["target_tokens"][inside][:-1].tolist() == tokens[1:] and weighed[-1] == 0
            given = len(tokens) - int(weighed.sum())  # in front: BOS, or the token before
            assert weighed[given - 1:-1].all() and tokens[0] in (front, *set().union(*wanted))
            before = tokens[given - 1]
            found[(None if before == front else before, *tokens[given:])] += 1
    size = chunk_length or 24 - (1 if config.bos_id is None else 2)
    chunks = [(None if start == 0 else own[start - 1], *own[start:start + size])
              for own in wanted for start in range(0, len(own), size)]
    assert found == collections.Counter(chunks) and most > 1 and len(chunks) > len(wanted)


def test_the_loss_of_packed_rows_is_that_of_single_rows():
    source, lengths = examples(GPT2, 11)
    network = families.network_of(GPT2)
    params, form = weights.drawn(network), form_of(network)
    each = [source.example(number) for number in range(len(source))]
    rows = form.pack(((len(inputs), len(targets)) for inputs, targets in each), lengths)
    packed = [[each[number] for number in row] for row in rows]
    assert len(packed) < len(each)
    one = network.loss(params, form.make_packed(packed, lengths, len(each)))
    other = network.loss(params, form.make(each, lengths, len(each)))
    tokens = sum(len(text) + 1 for text in TEXTS if text)
    assert (one.weight, other.weight) == (tokens, tokens)
    np.testing.assert_allclose(one.loss / tokens, other.loss / tokens, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("changes", "message"), [
    ({"prefix_lm_share": 0.5}, r"of encoder-decoders' pretraining(.|\n)*leave it out"),
    ({"lengths": {"inputs": 40, "targets": 25}}, r"longer than the network's context(.|\n)*65(.|\n)*64"),
    ({"chunk_length": 24}, r"does not fit into a row(.|\n)*at most 23 tokens"),
    ({"lengths": {"inputs": 1, "targets": 1}}, "does not fit into a row"),
])
def test_settings_that_a_decoder_cannot_take_are_refused(changes, message):
    settings = dataclasses.replace(PretrainingSettings(ROW, None, None, 0), **changes)
    with pytest.raises(InputError, match=message):
        objective_of(GPT2).check(settings, GPT2)


def test_passages_without_a_token_are_refused():
    with pytest.raises(InputError, match="No passage has a token"):
        objective_of(GPT2).examples([""], Letters(2), PretrainingSettings(ROW, None, None, 0), GPT2)
