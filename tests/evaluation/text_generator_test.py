"""Texts for batches of unequal prompts: those of one prompt alone, in any order, whole or piece by piece."""

import collections
import dataclasses

import numpy as np
import pytest
import small_decoder
import tiny_model
import weights
from scipy import stats

from elm_jax.errors import InputError
from elm_jax.evaluation import text_generator
from elm_jax.evaluation.answer_text import Answer
from elm_jax.evaluation.generation_settings import GenerationSettings
from elm_jax.evaluation.text_generator import TextGenerator, width_of
from elm_jax.experts.card import PLAIN
from elm_jax.models.decode import greedy
from elm_jax.models.decoder.config import DecoderConfig
from elm_jax.models.decoder.network import DecoderNetwork
from elm_jax.routing.text import RoutingInstance
from elm_jax.types import Padded
from elm_jax.vocabularies.vocabulary import Vocabulary
from elm_jax.workflows.generate import Question, prompt_of

TEXTS = ["red dog", "the bird sings", "blue", "now a green cat runs fast and slow and sleeps now and runs",
         "cat", "red bird", "dog dog dog dog"]
SAMPLED = GenerationSettings(max_new_tokens=9, temperature=0.8, top_k=20, top_p=0.95, seed=5)
GREEDY = GenerationSettings(max_new_tokens=9)


def t5() -> TextGenerator:
    network = tiny_model.network(adapter=False)
    return TextGenerator(network, tiny_model.parameters(network), tiny_model.vocabulary())


def decoder() -> TextGenerator:
    """With a vocabulary of bytes, whose end is 2 and whose padding is 3."""
    network = DecoderNetwork(DecoderConfig(258, 16, 2, 1, 8, 32, 2, max_length=128, pad_id=3, eos_id=2))
    return TextGenerator(network, weights.drawn(network), Vocabulary.from_bytes(small_decoder.tokenizer()))


@pytest.fixture(scope="module", params=[t5, decoder], ids=["t5", "decoder"])
def generator(request):
    return request.param()


@pytest.mark.parametrize("settings", [pytest.param(GREEDY, marks=pytest.mark.slow), SAMPLED],
                         ids=["greedy", "sampled"])
def test_a_text_does_not_depend_on_its_batch(generator, settings, monkeypatch):
    prompts = [generator.prompt(text) for text in TEXTS]
    together = generator.answer(prompts, settings)
    assert len({answer.text for answer in together}) > 3, "else any text would do"
    assert generator.answer(prompts[::-1], settings) == together[::-1]
    assert [generator.answer([prompt], settings)[0] for prompt in prompts[:2]] == together[:2]
    monkeypatch.setattr(text_generator, "MOST_ROWS", 4)
    assert generator.answer(prompts, settings) == together


def test_greedy_texts_are_those_of_greedy_decoding(generator):
    prompts = [generator.prompt(text) for text in TEXTS[:4]]
    width = max(map(len, prompts))
    tokens = np.full((4, width), generator.network.config.pad_id, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[:len(prompt)] = prompt
    inputs = Padded(tokens, np.asarray([len(prompt) for prompt in prompts], np.int32))
    found = greedy(generator.network, generator.params, inputs, max_length=9)
    expected = [generator.vocabulary.decode(row) for row in np.asarray(found)]
    assert [answer.text for answer in generator.answer(prompts, GREEDY)] == expected


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_streamed_text_is_the_whole_one(generator, settings):
    prompt = generator.prompt(TEXTS[1])
    stream, pieces = generator.stream(prompt, settings), []
    try:
        while True:
            pieces.append(next(stream))
    except StopIteration as end:
        answer = end.value
    assert answer == generator.answer([prompt], settings)[0] and "".join(pieces) == answer.text
    assert answer.tokens == 9 or answer.finish == "eos"


def test_a_prompt_that_is_streamed_again_is_drawn_as_beside_itself(generator):
    prompt = generator.prompt(TEXTS[1])
    twice = generator.answer([prompt, prompt], SAMPLED)
    assert twice[0].text != twice[1].text
    for before, answer in enumerate(twice):
        assert "".join(generator.stream(prompt, SAMPLED, before)) == answer.text


def test_what_stands_in_front_of_a_target_is_left_out(generator):
    prompt = generator.prompt(TEXTS[1])
    whole = generator.answer([prompt], SAMPLED)[0].text
    front = whole[:2]
    assert len(whole) > 2 and generator.answer([prompt], SAMPLED, front)[0].text == whole[2:]
    assert "".join(generator.stream(prompt, SAMPLED, front=front)) == whole[2:]
    assert generator.answer([prompt], SAMPLED, "no such text")[0].text == whole


def test_a_text_stops_at_a_string_of_several_tokens(generator):
    prompts = [generator.prompt(text) for text in TEXTS[:5]]
    whole = generator.answer(prompts, SAMPLED)
    longest = max(whole, key=lambda answer: len(answer.text)).text
    stop = longest[2:5]
    settings = GenerationSettings(9, 0.8, 20, 0.95, 5, (stop, "\N{SNOWMAN}"))
    found = generator.answer(prompts, settings)
    assert [answer.text for answer in found] == [answer.text.partition(stop)[0] for answer in whole]
    assert [answer.finish == "stop" for answer in found] == [stop in answer.text for answer in whole]


def test_a_seed_gives_the_same_texts_again_and_another_gives_others(generator):
    prompts = [generator.prompt(text) for text in TEXTS[:4]]
    found = [generator.answer(prompts, GenerationSettings(9, 2.0, seed=seed)) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def test_one_prompt_asked_again_has_other_draws(monkeypatch):
    """Their frequencies are those of the network's own probabilities at the first step."""
    monkeypatch.setattr(text_generator, "MOST_ROWS", 1024)
    generator = t5()
    prompt = generator.prompt("red dog")
    answers = generator.answer([prompt] * 600, GenerationSettings(1, temperature=1.5))
    state = generator.network.start(generator.params, Padded(prompt[None], np.asarray([len(prompt)])), 1)
    logits = generator.network.step(generator.params, state.cache, state.token)[0][0]
    chances = np.exp(np.asarray(logits, np.float64) / 1.5)
    chances /= chances.sum()
    expected = collections.Counter()
    for token, chance in enumerate(chances):
        expected[generator.vocabulary.decode([token])] += chance
    counts = collections.Counter(answer.text for answer in answers)
    common = [text for text, chance in expected.items() if 600 * chance > 5]
    seen = [counts[text] for text in common] + [600 - sum(counts[text] for text in common)]
    chance = [600 * expected[text] for text in common]
    assert stats.chisquare(seen, [*chance, 600 - sum(chance)]).pvalue > 1e-3


def test_the_context_bounds_a_text():
    """Beside others and alone: a long prompt gets what fits, a longer one is refused."""
    generator = decoder()
    long, short = generator.prompt("a" * 124), generator.prompt("b")
    found = generator.answer([long, short], GREEDY)
    assert found[0] == Answer(found[0].text, 4, "context") and found[1].finish != "context"
    assert found[1] == generator.answer([short], GREEDY)[0]
    assert len(generator.prompt("a" * 127)) == 127
    with pytest.raises(InputError, match="longer than the network's context\n  where: text 2\n  got: 128"):
        generator.prompt("a" * 128, "text 2")


def test_a_task_that_cuts_on_the_left_keeps_the_end_that_fits_beside_new_tokens():
    generator, text = decoder(), "".join(map(chr, np.random.default_rng(0).integers(97, 123, 200)))
    question = Question(text, "row 3", RoutingInstance(text), is_free=False, keeps_end=True)
    found = prompt_of(generator, None, question, PLAIN, room=28)
    assert found.tolist() == generator.vocabulary.encode(text)[-100:]
    assert generator.prompt(text[:99], room=28).tolist() == generator.vocabulary.encode(text[:99])
    with pytest.raises(InputError, match="context\n  where: row 3"):
        prompt_of(generator, None, dataclasses.replace(question, keeps_end=False), PLAIN, room=28)


def test_widths_are_few():
    assert [width_of(length) for length in (1, 16, 17, 24, 25, 33, 48, 49, 96, 97, 128, 129)] == [
        16, 16, 24, 24, 32, 48, 48, 64, 96, 128, 128, 192]
    assert len({width_of(length) for length in range(1, 2049)}) == 15
