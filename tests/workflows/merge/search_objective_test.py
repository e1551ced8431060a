"""The objective of a search for merge weights: its value, its gradient, and what it reads."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model as tiny
from t5_rows import FORM, rows

from elm_jax.data.arrays.batches import pad, padded, trim
from elm_jax.errors import InputError
from elm_jax.evaluation import rank
from elm_jax.evaluation.evaluator import EvaluationSettings
from elm_jax.merging import weight_search
from elm_jax.merging.methods import method_table
from elm_jax.runtime import sharding, trees
from elm_jax.workflows.merge import search_objective
from elm_jax.workflows.merge.search_objective import MergeObjective

NETWORK = tiny.network()
SETTINGS = EvaluationSettings(source_length=24, max_new_tokens=6, tokens_per_batch=2000,
                              source_buckets=(24,), target_buckets=(16,))
WEIGHTS = np.asarray([0.5, 0.2, 0.3], np.float32)
ROWS = (0, 2, 3, 5, 8, 9, 10)
CASES = [("rank", True), ("rank", False), ("generation", True)]


def is_prompt_leaf(path: str) -> bool:
    return "_adapter/" in path or path.endswith("scale")


def overlays() -> list[dict]:
    return [trees.split(tiny.parameters(NETWORK, 10 + number), is_prompt_leaf)[0] for number in range(3)]


def split(kind: str):
    return tiny.split_of(tiny.rank_rows(16) if kind == "rank" else tiny.generation_rows(12), kind)


def batches(kind: str, labelled: bool, data_axis: int = 1, source=None):
    return search_objective.make_batches(source or split(kind), ROWS, labelled=labelled, settings=SETTINGS,
                                         form=FORM,
                                         data_axis=data_axis)


def placed(kind: str, labelled: bool = True, mesh=None, source=None):
    mesh = mesh or sharding.make_mesh(1, 1)
    rows = batches(kind, labelled, mesh.shape["data"], source)
    return search_objective.make_data(NETWORK, tiny.parameters(NETWORK), overlays(), rows, mesh)


def objective(kind: str, labelled: bool = True, **changes) -> MergeObjective:
    return MergeObjective(NETWORK, "mean", kind, labelled, **changes)


def merged_params() -> dict:
    """The merge, in float64 by numpy."""
    flat = [trees.flatten(overlay) for overlay in overlays()]
    merged = {path: sum(float(weight) * one[path].astype(np.float64)
                        for weight, one in zip(WEIGHTS, flat, strict=True)).astype(np.float32)
              for path in flat[0]}
    return trees.merge(tiny.parameters(NETWORK), trees.unflatten(merged))


log_probs_of = jax.jit(NETWORK.target_log_probs)
value_of = jax.jit(lambda function, weights, data: function(weights, data), static_argnums=0)


def row_log_probs(kind: str, row: int, params: dict) -> list[np.ndarray]:
    """Log-probabilities of a row's choices, or target, token by token; one row and one choice at a time."""
    own = split(kind)
    inputs = rows(pad([trim(own.inputs(row), 24, 1)], 24, 0))
    choices = own.choices(row) if kind == "rank" else [own.targets(row)]
    return [np.asarray(log_probs_of(params, inputs, rows(pad([choice], 16, 0)[:, None])))[0, 0, :len(choice)]
            for choice in choices]


def by_hand(kind: str, labelled: bool) -> float:
    params = merged_params()
    found = {row: row_log_probs(kind, row, params) for row in ROWS}
    if kind == "generation":
        return -sum(one[0].sum() for one in found.values()) / sum(one[0].size for one in found.values())
    losses = []
    for row, log_probs in found.items():
        scores = np.asarray([tokens.sum() for tokens in log_probs], np.float64)
        shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        losses.append(-np.log(shares[split(kind).label(row)]) if labelled
                      else -(shares * np.log(np.maximum(shares, 1e-300))).sum())
    return float(np.mean(losses))


@pytest.mark.parametrize(("kind", "labelled"), CASES)
def test_the_value_is_the_loss_of_each_row_by_hand(kind, labelled):
    found = float(value_of(objective(kind, labelled), WEIGHTS, placed(kind, labelled)))
    assert found == pytest.approx(by_hand(kind, labelled), rel=1e-5)


@pytest.mark.parametrize(("kind", "labelled"), [
    CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:3])])
def test_the_gradient_is_that_of_finite_differences(kind, labelled):
    data, function = placed(kind, labelled), objective(kind, labelled, l1=0.1)
    gradient = np.asarray(jax.jit(jax.grad(function))(jnp.asarray(WEIGHTS), data))
    step = 4e-3
    for place in range(3):
        shift = step * np.eye(3, dtype=np.float32)[place]
        slope = (float(value_of(function, WEIGHTS + shift, data))
                 - float(value_of(function, WEIGHTS - shift, data))) / (2 * step)
        assert gradient[place] == pytest.approx(slope, rel=0.02, abs=5e-3)
    assert np.abs(gradient).max() > 0.05  # or this would show nothing


@pytest.mark.parametrize(("kind", "labelled"), CASES)
def test_a_population_in_one_program_scores_as_each_does_alone(kind, labelled):
    data, function = placed(kind, labelled), objective(kind, labelled)
    population = np.asarray(jax.nn.softmax(jax.random.normal(jax.random.key(0), (6, 3))))
    alone = [float(value_of(function, weights, data)) for weights in population]
    for at_once in (None, 2):
        found = weight_search.score_population(function, population, data, at_once)
        np.testing.assert_allclose(found, alone, rtol=1e-5)


@pytest.mark.parametrize(("kind", "labelled"), [
    ("rank", True), pytest.param("generation", True, marks=pytest.mark.slow)])
def test_a_mesh_changes_nothing(kind, labelled):
    function = jax.jit(jax.value_and_grad(objective(kind, labelled)))
    one = function(WEIGHTS, placed(kind, labelled))
    many = function(WEIGHTS, placed(kind, labelled, sharding.make_mesh(4, 2)))
    for left, right in zip(one, many, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


def weights_of(method: str) -> np.ndarray:
    return WEIGHTS[:2] if method == "slerp" else WEIGHTS


@pytest.mark.parametrize("method", [
    pytest.param(method, marks=[pytest.mark.slow] * (method not in ("mean", "task_arithmetic")))
    for method in method_table.METHODS])
def test_every_method_can_be_searched(method):
    function = dataclasses.replace(objective("rank"), method=method)
    data = placed("rank")
    data = data._replace(overlays=data.overlays[:len(weights_of(method))])
    value, gradient = jax.jit(jax.value_and_grad(function))(weights_of(method), data)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 1e-3


def test_task_vectors_of_sum_one_are_the_mean():
    mean, task = (value_of(dataclasses.replace(objective("rank"), method=method), WEIGHTS, placed("rank"))
                  for method in ("mean", "task_arithmetic"))
    assert float(task) == pytest.approx(float(mean), rel=1e-5)


def test_weight_one_on_one_expert_is_that_expert():
    data, params = placed("rank"), trees.merge(tiny.parameters(NETWORK), overlays()[1])
    losses = []
    for number in range(len(data.batches["real"])):
        batch = {name: np.asarray(array[number]) for name, array in data.batches.items()}
        scores = np.asarray(rank.score_choices(NETWORK, params, padded(batch, "inputs"), padded(batch,
                                                                                                "choices")))
        for place in np.flatnonzero(batch["real"]):
            own, right = scores[place][batch["choice_mask"][place]], batch["labels"][place]
            losses.append(np.log(np.exp(own - own[right]).sum()))
    assert len(losses) == len(ROWS)
    found = float(value_of(objective("rank"), np.asarray([0, 1, 0], np.float32), data))
    assert found == pytest.approx(np.mean(losses), rel=1e-5)


def test_without_labels_none_is_read():
    rows = tiny.rank_rows(16)
    permuted = tiny.split_of([{**row, "label": (row["text"]["index"] + 1) % len(row["choices"]),
                               "targets": row["choices"][0]} for row in rows], "rank")
    assert [permuted.label(row) for row in ROWS] != [split("rank").label(row) for row in ROWS]
    left, right = batches("rank", False), batches("rank", False, source=permuted)
    assert left.keys() == right.keys() and "labels" not in left
    for name, array in left.items():
        np.testing.assert_array_equal(array, right[name])
    labelled, other = batches("rank", True), batches("rank", True, source=permuted)
    assert not np.array_equal(labelled["labels"], other["labels"])  # or this would show nothing


def test_several_right_choices_share_the_probability_that_is_raised():
    rows = tiny.rank_rows(16)
    for row in rows:
        scores = [0.0] * len(row["choices"])
        scores[0], scores[-1] = 1.0, 0.25
        row["text"] = {**row["text"], "scores": scores, "targets": row["text"]["choices"][0]}
    made = batches("rank", True, source=tiny.split_of(rows, "rank"))
    batch = {name: array[0] for name, array in made.items()}
    log_probs = np.random.default_rng(0).normal(-3, 1, batch["choices"].shape).astype(np.float32)
    given = types.SimpleNamespace(target_log_probs=lambda *_: log_probs)
    loss, count = search_objective.batch_loss(given, {}, batch, "rank", True)
    expected = 0.0
    for place in np.flatnonzero(batch["real"]):
        odds = np.exp(log_probs[place].sum(-1).astype(np.float64)[batch["choice_mask"][place]])
        expected -= np.log((odds[0] + 0.25 * odds[-1]) / odds.sum())
    assert count == batch["real"].sum() and float(loss) == pytest.approx(expected, rel=1e-5)
    alone = {**batch, "credits": np.eye(batch["choices"].shape[1], dtype=np.float32)[batch["labels"]]}
    without = {name: array for name, array in batch.items() if name != "credits"}
    both = [float(search_objective.batch_loss(given, {}, one, "rank", True)[0]) for one in (alone, without)]
    assert both[0] == pytest.approx(both[1], rel=1e-6)


def test_every_row_comes_once_whatever_the_budget():
    for budget in (1, 700, 2000, 10**6):
        settings = dataclasses.replace(SETTINGS, tokens_per_batch=budget)
        made = search_objective.make_batches(
            split("rank"), ROWS, labelled=True, settings=settings, form=FORM, data_axis=2)
        assert made["real"].shape[1] % 2 == 0 and made["real"].sum() == len(ROWS)
        flat = {name: array.reshape(-1, *array.shape[2:]) for name, array in made.items()}
        for place, row in enumerate(ROWS):
            own = split("rank").choices(row)
            assert flat["labels"][place] == split("rank").label(row)
            assert flat["choice_mask"][place].sum() == len(own)
            for number, choice in enumerate(own):
                np.testing.assert_array_equal(flat["choices"][place, number, :len(choice)], choice)
        assert not flat["choices"][len(ROWS):].any()


def test_the_l1_term_is_the_mean_absolute_weight():
    data, weights = placed("rank"), np.asarray([0.5, -0.25, 1.0], np.float32)
    with_term, without = (value_of(objective("rank", l1=l1), weights, data) for l1 in (2.0, 0.0))
    difference = with_term - without
    assert float(difference) == pytest.approx(2.0 * 1.75 / 3, rel=1e-5)


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(InputError, match=r"(?s)Without labels.*generation"):
        objective("generation", False)
    with pytest.raises(InputError, match="no rows"):
        search_objective.make_batches(split("rank"), (), labelled=True, settings=SETTINGS, form=FORM)
    unanswered = tiny.split_of([{**row, "label": -1} for row in tiny.rank_rows(3)], "rank")
    with pytest.raises(InputError, match="no right choice"):
        search_objective.make_batches(unanswered, (0, 1), labelled=True, settings=SETTINGS, form=FORM)
    unlike = [overlays()[0], tiny.parameters(NETWORK)]
    with pytest.raises(InputError, match="their leaves differ"):
        search_objective.make_data(NETWORK, tiny.parameters(NETWORK), unlike, batches("rank", True),
                                   sharding.make_mesh(1, 1))
