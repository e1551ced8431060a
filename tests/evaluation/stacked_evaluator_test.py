"""Many experts in one program score as each does alone, whoever shares the batch."""


import jax
import numpy as np
import pytest
import t5_rows
import tiny_model as tiny

from elm_jax.errors import InputError
from elm_jax.evaluation import rank, stacked_evaluator
from elm_jax.evaluation.evaluator import EvaluationSettings, Scoring, evaluate_task
from elm_jax.models.adapters import stacked as many
from elm_jax.models.decode import greedy
from elm_jax.runtime import sharding, trees
from elm_jax.types import Padded

NETWORK = tiny.network()
SIZE = 3
SETTINGS = EvaluationSettings(source_length=24, max_new_tokens=6, tokens_per_batch=800, source_buckets=(24,),
                              target_buckets=(16,))


def is_prompt_leaf(path: str) -> bool:
    return "_adapter/" in path or path.endswith("scale")


def overlays() -> list[dict]:
    return [trees.split(tiny.parameters(NETWORK, 10 + number), is_prompt_leaf)[0] for number in range(SIZE)]


def params_of(number: int) -> dict:
    return trees.merge(tiny.parameters(NETWORK), overlays()[number])


def put(mesh=None) -> many.Many:
    return stacked_evaluator.put_stack(NETWORK, tiny.parameters(NETWORK), overlays(),
                                       mesh or sharding.make_mesh(1, 1))


def split(kind: str):
    return tiny.split_of(tiny.rank_rows(16) if kind == "rank" else tiny.generation_rows(8), kind)


def scoring(mesh=None) -> Scoring:
    mesh = mesh or sharding.make_mesh(1, 1)
    return Scoring(SETTINGS, tiny.vocabulary(), mesh, base="sha256:abc", max_rows=16)


def alone(number: int, kind: str):
    return evaluate_task(NETWORK, params_of(number), split(kind), scoring(), f"e{number}")


def assert_same(found, expected) -> None:
    """Rows equal but for seconds; predictions to the bit but for scores, which are near."""
    left, right = ({name: value for name, value in one.rows[0].items() if name != "seconds"}
                   for one in (found, expected))
    assert left == right
    for own, other in zip(found.predictions, expected.predictions, strict=True):
        assert {**own, "scores": None} == {**other, "scores": None}
        np.testing.assert_allclose(own.get("scores", []), other.get("scores", []), atol=1e-5, rtol=1e-6)


@pytest.fixture(scope="module")
def solo():
    return {(number, kind): alone(number, kind) for number in range(SIZE) for kind in ("rank", "generation")}


@pytest.mark.parametrize("kind", ["rank", "generation"])
def test_a_stack_gives_every_experts_rows(kind, solo):
    found = stacked_evaluator.evaluate_task_stacked(
        NETWORK, put(), split(kind), scoring(), ["e0", "e1", "e2"])
    for number, result in enumerate(found):
        assert_same(result, solo[number, kind])
    predictions = [[one["prediction"] for one in result.predictions] for result in found]
    assert predictions[0] != predictions[1] != predictions[2]


def test_a_mesh_with_an_expert_axis_gives_the_same(solo):
    mesh = sharding.make_mesh(2, 2, 2)
    four = [*overlays(), overlays()[0]]
    params = stacked_evaluator.put_stack(NETWORK, tiny.parameters(NETWORK), four, mesh)
    found = stacked_evaluator.evaluate_task_stacked(
        NETWORK, params, split("rank"), scoring(mesh), ["e0", "e1", "e2", "e0"])
    for number, result in zip((0, 1, 2, 0), found, strict=True):
        assert_same(result, solo[number, "rank"])


@pytest.mark.parametrize("kind", ["rank", "generation"])
def test_each_instance_by_its_own_expert(kind, solo):
    rows = split(kind)
    index = np.random.default_rng(0).integers(0, SIZE, len(rows))
    assert len(set(index)) == SIZE
    found = stacked_evaluator.evaluate_task_mixed(NETWORK, put(), rows, index, scoring(), "router")
    for number, (one, chosen) in enumerate(zip(found.predictions, index, strict=True)):
        expected = solo[int(chosen), kind].predictions[number]
        assert {**one, "scores": None} == {**expected, "scores": None}
        np.testing.assert_allclose(one.get("scores", []), expected.get("scores", []), atol=1e-5)
    assert found.rows[0]["expert"] == "router"


def batch(rows: int = 8) -> tuple[Padded, Padded]:
    rng = np.random.default_rng(3)
    inputs = rng.integers(2, tiny.VOCAB_SIZE, (rows, 10)).astype(np.int32)
    choices = rng.integers(2, tiny.VOCAB_SIZE, (rows, 3, 4)).astype(np.int32)
    inputs[:, 7:] *= (np.arange(rows) % 2)[:, None]
    return t5_rows.rows(inputs), t5_rows.rows(choices)


def test_mixed_scores_permute_with_the_rows_and_ignore_their_company():
    params, (inputs, choices) = put(), batch()
    index = np.array([0, 1, 2, 0, 1, 2, 2, 1], np.int32)
    scores = np.asarray(stacked_evaluator.score_mixed(NETWORK, params, index, inputs, choices))
    order = np.random.default_rng(1).permutation(8)
    permuted = stacked_evaluator.score_mixed(NETWORK, params, index[order], *(
        Padded(each.tokens[order], each.lengths[order]) for each in (inputs, choices)))
    np.testing.assert_allclose(permuted, scores[order], atol=1e-5, rtol=0)
    company = index.copy()
    company[1:] = (index[1:] + 1) % SIZE
    other = np.asarray(stacked_evaluator.score_mixed(NETWORK, params, company, inputs, choices))
    np.testing.assert_allclose(other[0], scores[0], atol=1e-5, rtol=0)
    assert np.abs(other[1:] - scores[1:]).min(axis=1).max() > 1e-3
    for number in range(SIZE):
        own = np.asarray(rank.score_choices(NETWORK, params_of(number), inputs, choices))
        np.testing.assert_allclose(scores[index == number], own[index == number], atol=1e-5, rtol=0)


def test_mixed_decoding_is_each_experts_own():
    params, (inputs, _) = put(), batch()
    index = np.array([0, 1, 2, 0, 1, 2, 2, 1], np.int32)
    tokens = np.asarray(stacked_evaluator.greedy_mixed(NETWORK, params, index, inputs, max_length=6))
    for number in range(SIZE):
        own = np.asarray(greedy(NETWORK, params_of(number), inputs, max_length=6))
        np.testing.assert_array_equal(tokens[index == number], own[index == number])


def test_dataset_experts_stack_and_mix_too():
    net = tiny.network(adapter=False)
    experts = [tiny.parameters(net, number) for number in range(2)]
    params, (inputs, choices) = ({}, many.stack(experts)), batch(4)
    index = np.array([1, 0, 0, 1], np.int32)
    scores = np.asarray(stacked_evaluator.score_mixed(net, params, index, inputs, choices))
    tokens = np.asarray(stacked_evaluator.greedy_mixed(net, params, index, inputs, max_length=4))
    for number, expert in enumerate(experts):
        own = np.asarray(rank.score_choices(net, expert, inputs, choices))
        np.testing.assert_allclose(scores[index == number], own[index == number], atol=1e-4, rtol=0)
        decoded = np.asarray(greedy(net, expert, inputs, max_length=4))
        np.testing.assert_array_equal(tokens[index == number], decoded[index == number])


def test_the_base_is_not_repeated_for_the_rows():
    """Base products of a mixed batch have the rows of all instances, and its weights no axis B."""
    params, (inputs, choices) = put(), batch()
    index = np.zeros(8, np.int32)
    text = stacked_evaluator.score_mixed.lower(NETWORK, params, index, inputs, choices).compile().as_text()
    assert "f32[8,32,64]" not in text  # a feed-forward kernel a row
    alone_flops = rank.score_choices.lower(NETWORK, params_of(0), inputs, choices).compile().cost_analysis()
    mixed = stacked_evaluator.score_mixed.lower(NETWORK, params, index, inputs,
                                                choices).compile().cost_analysis()
    assert mixed["flops"] == pytest.approx(alone_flops["flops"], rel=0.05)


def test_what_does_not_fit_is_an_input_error():
    bad = [overlays()[0], {"decoder": overlays()[1]["decoder"]}]
    with pytest.raises(InputError, match=r"one shape stack[\s\S]*expert 1"):
        stacked_evaluator.put_stack(NETWORK, tiny.parameters(NETWORK), bad, sharding.make_mesh(1, 1))
    with pytest.raises(InputError, match=r"multiple of 2"):
        put(sharding.make_mesh(1, 1, 2))
    with pytest.raises(InputError, match="from 0 to 2"):
        stacked_evaluator.check_index(np.array([0, 3]), SIZE)
    with pytest.raises(InputError, match="15 experts for 16 rows"):
        stacked_evaluator.evaluate_task_mixed(NETWORK, put(), split("rank"), [0] * 15, scoring(), "router")
    assert jax.tree.leaves(put()[1])[0].shape[0] == SIZE
