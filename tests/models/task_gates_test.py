"""Gates that read tasks, in whole networks: the experts they choose, and that rows keep to their own task."""

import dataclasses
import functools

import family_rows as made
import jax
import numpy as np
import pytest
import sparse_networks

from elm_jax.data.arrays.batch_forms import form_of
from elm_jax.errors import InputError
from elm_jax.models.adapters.stacked import GroupedNetwork
from elm_jax.models.layers.gate_tasks import NO_TASK
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.models.network import GATE, TASK_TABLE, is_multiplied
from elm_jax.runtime import trees

TASKS = ("anli", "rte", "trec")
IDS = [0, 2, 1, 0, 2, 1, 1]
LENGTHS = sparse_networks.LENGTHS
both_families = pytest.mark.parametrize("name", sparse_networks.CONFIGS)
log_probs_of = jax.jit(lambda network, *arguments: network.target_log_probs(*arguments), static_argnums=0)
logits_of = jax.jit(lambda network, *arguments: network.logits(*arguments), static_argnums=0)
loss_of = jax.jit(lambda network, *arguments: network.loss(*arguments), static_argnums=0)
step_of = jax.jit(lambda network, *arguments: network.step(*arguments), static_argnums=0)


def network_of(name: str, gate: str = "both", **settings):
    named = {"tasks": TASKS, "task_dim": 5} if gate != "token" else {}
    return sparse_networks.network(name, gate=gate, capacity_factor=None, **named, **settings)


@functools.cache
def case(name: str, gate: str = "both"):
    network = network_of(name, gate)
    return network, sparse_networks.parameters(network)


def changed(params, change):
    """Parameters with some leaves replaced: `change` gives a leaf of a path's, or None."""
    flat = trees.flatten(params)
    found = {path: change(path, leaf) for path, leaf in flat.items()}
    return trees.unflatten({path: flat[path] if leaf is None else leaf for path, leaf in found.items()})


def scored(network, tasks, seed: int = 3):
    rows = len(tasks)
    inputs = made.rows(network.config, (rows,), 8, seed)
    return inputs._replace(tasks=np.asarray(tasks, np.int32)), made.choices(network.config, rows, 2, 5, seed)


def test_the_table_is_a_leaf_of_gates_that_is_never_cast():
    network, params = case("t5")
    assert params["task_embedder"]["embedding"].shape == (3, 5)
    assert network.role_of(TASK_TABLE) == GATE and not is_multiplied(TASK_TABLE)
    assert tuple(network.axes_of(TASK_TABLE)) == (None, None)
    fresh = trees.flatten(network.init(jax.random.key(0)))
    weights = [leaf for path, leaf in fresh.items() if "task_weights" in path]
    assert len(weights) == 2 and not any(map(np.any, weights)) and np.std(fresh[TASK_TABLE]) > 0.3


@both_families
def test_without_weights_of_tasks_both_is_token_to_the_bit(name):
    network, params = case(name)
    plain = network_of(name, "token")
    params = changed(params, lambda path, leaf: np.zeros_like(leaf) if "task_weights" in path else None)
    alone = trees.split(params, lambda path: "task_weights" in path or path == TASK_TABLE)[1]
    inputs, targets = scored(network, IDS)
    np.testing.assert_array_equal(log_probs_of(network, params, inputs, targets),
                                  log_probs_of(plain, alone, inputs._replace(tasks=None), targets))


@both_families
def test_rows_of_one_task_share_experts_if_the_gate_reads_tasks_alone(name):
    """Every token chooses its task's K experts; counts by task are those of a batch of that task alone."""
    network, params = case(name, "task")
    form, examples = form_of(network), made.examples(network.config, 7)
    reports = loss_of(network, params, form.make(examples, LENGTHS, 8, IDS)).router
    for layer, sums in reports.items():
        for task in range(3):
            own = np.asarray(sums.by_task[task])
            assert np.count_nonzero(own) == 2 and own.max() * 2 == own.sum() > 0, layer
            alone = [each for each, its in zip(examples, IDS, strict=True) if its == task]
            found = loss_of(network, params, form.make(alone, LENGTHS, 8, [task] * len(alone))).router[layer]
            np.testing.assert_array_equal(own, found.choices)
        np.testing.assert_array_equal(sums.by_task.sum(axis=0), sums.choices)
    chosen = {tuple(np.flatnonzero(own)) for sums in reports.values() for own in sums.by_task}
    assert len(chosen) > 1


@both_families
def test_the_order_of_the_table_means_nothing(name):
    network, params = case(name)
    inputs, targets = scored(network, IDS)
    order = np.array([2, 0, 1])
    other = changed(params, lambda path, leaf: leaf[order] if path == TASK_TABLE else None)
    moved = inputs._replace(tasks=np.argsort(order)[inputs.tasks].astype(np.int32))
    found = log_probs_of(network, params, inputs, targets)
    np.testing.assert_array_equal(found, log_probs_of(network, other, moved, targets))
    assert np.abs(found - log_probs_of(network, params, moved, targets)).max() > 1e-4


@both_families
def test_packed_rows_of_several_tasks_are_as_if_alone(name):
    network, params = case(name)
    form, examples = form_of(network), made.examples(network.config, 7)
    alone = form.make(examples, LENGTHS, 8, IDS)
    groups = [[0, 3, 5], [1, 2], [4, 6]]
    rows, ids = ([[values[number] for number in group] for group in groups] for values in (examples, IDS))
    packed = form.make_packed(rows, {"inputs": 24, "targets": 18}, 4, ids)
    side = "decoder_" if name == "t5" else ""
    apart, together = (np.asarray(logits_of(network, params, batch)) for batch in (alone, packed))
    segments = packed[f"{side}segment_ids"]
    for row, group in enumerate(groups):
        for segment, number in enumerate(group, start=1):
            places = np.flatnonzero(segments[row] == segment)
            np.testing.assert_allclose(together[row, places], apart[number, :len(places)], rtol=0, atol=2e-5)
    wrong = {key: (value + 1) % 3 if "task_ids" in key else value for key, value in packed.items()}
    assert np.abs(np.asarray(logits_of(network, params, wrong)) - together).max() > 1e-3


@both_families
def test_decoding_with_the_cache_reads_the_task(name):
    """Steps of forced tokens against whole rows; rows of tasks differ, and so do their caches."""
    network, params = case(name)
    inputs, targets = scored(network, IDS)
    wanted = np.asarray(log_probs_of(network, params, inputs, targets))[:, 0]
    cache, token = jax.jit(lambda params, inputs: network.start(params, inputs, 5))(params, inputs)
    for place in range(targets.tokens.shape[2]):
        logits, cache = step_of(network, params, cache, token)
        token = np.asarray(targets.tokens[:, 0, place])
        found = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), token[:, None], axis=1)[:, 0]
        real = place < targets.lengths[:, 0]
        np.testing.assert_allclose(found[real], wanted[real, place], rtol=0, atol=2e-5)


@both_families
def test_a_row_does_not_see_other_rows_tasks(name):
    network, params = case(name)
    inputs, targets = scored(network, IDS)
    other = inputs._replace(tasks=np.array([0, *(1 if each != 1 else 2 for each in IDS[1:])], np.int32))
    first, second = (np.asarray(log_probs_of(network, params, each, targets)) for each in (inputs, other))
    np.testing.assert_array_equal(first[0], second[0])
    assert (np.abs(first[1:] - second[1:]).max(axis=(1, 2)) > 0).all()


@both_families
def test_experts_in_one_program_read_the_tasks_of_their_rows(name):
    network, params = case(name)
    shift = changed(params, lambda path, leaf: leaf[::-1] if path == TASK_TABLE else None)
    shared = trees.split(params, lambda path: path != TASK_TABLE)[0]
    own = {"task_embedder": {"embedding": np.stack([tree["task_embedder"]["embedding"]
                                                    for tree in (params, shift)])}}
    inputs, targets = scored(network, IDS[:3])
    twice = [type(each)(*(None if part is None else np.concatenate([part, part]) for part in each))
             for each in (inputs, targets)]
    found = np.asarray(log_probs_of(GroupedNetwork(network, 2), (shared, own), *twice))
    for number, tree in enumerate((params, shift)):
        np.testing.assert_allclose(found[3 * number:3 * number + 3],
                                   log_probs_of(network, tree, inputs, targets), rtol=0, atol=2e-5)
    cache, token = jax.jit(lambda params, inputs: GroupedNetwork(network, 2).start(params, inputs, 3))(
        (shared, own), twice[0])
    logits, _ = step_of(GroupedNetwork(network, 2), (shared, own), cache, token)
    solo = jax.jit(lambda params, inputs: network.start(params, inputs, 3))(shift, inputs)
    np.testing.assert_allclose(logits[3:], step_of(network, shift, *solo)[0], rtol=0, atol=2e-5)


@both_families
def test_texts_of_no_task_are_routed_by_their_tokens_alone(name):
    network, params = case(name)
    inputs, targets = scored(network, [NO_TASK] * 7)
    plain = network_of(name, "token")
    alone = trees.split(params, lambda path: "task_weights" in path or path == TASK_TABLE)[1]
    np.testing.assert_array_equal(log_probs_of(network, params, inputs, targets),
                                  log_probs_of(plain, alone, inputs._replace(tasks=None), targets))


@both_families
def test_gates_of_tokens_count_by_task_what_they_choose(name):
    """Names of tasks change no output where the gate reads none, and every choice is its task's."""
    network, params = case(name, "token")
    counting = dataclasses.replace(network, config=dataclasses.replace(
        network.config, sparse=dataclasses.replace(network.config.sparse, tasks=TASKS)))
    form, examples = form_of(counting), made.examples(network.config, 7)
    batch = form.make(examples, LENGTHS, 8, [*IDS[:-1], NO_TASK])
    plain = {key: value for key, value in batch.items() if key != "task_ids"}
    sums, before = loss_of(counting, params, batch), loss_of(network, params, plain)
    np.testing.assert_array_equal(sums.loss, before.loss)
    for layer, report in sums.router.items():
        assert before.router[layer].by_task is None
        without = form.make(examples[:-1], LENGTHS, 8, IDS[:-1])
        del without["task_ids"]
        np.testing.assert_array_equal(report.by_task.sum(axis=0),
                                      loss_of(network, params, without).router[layer].choices)


def test_counts_by_task_hold_for_the_choice_by_experts():
    network = sparse_networks.network("t5", choice="experts", capacity_factor=1.0, eval_capacity_factor=1.0,
                                      tasks=TASKS, experts_per_token=1, group_rows=3)
    params, form = sparse_networks.parameters(network), form_of(network)
    batch = form.make(made.examples(network.config, 7), LENGTHS, 8, IDS)
    for sums in loss_of(network, params, batch).router.values():
        np.testing.assert_array_equal(sums.by_task.sum(axis=0), sums.choices)
        assert (np.asarray(sums.by_task).sum(axis=1) > 0).all()


@both_families
def test_states_that_are_kept_end_below_the_first_gate_that_reads_tasks(name):
    network, _ = case(name)
    assert network.deepest_trunk == network.depth_of(TASK_TABLE) == 1
    assert network_of(name, "token").deepest_trunk > 1


@both_families
def test_rows_without_a_task_are_refused(name):
    network, params = case(name)
    form, examples = form_of(network), made.examples(network.config, 7)
    with pytest.raises(InputError, match=r"gates read the task(?s:.*)SparseConfig\.tasks"):
        form.make(examples, LENGTHS, 8)
    with pytest.raises(InputError, match=r"number of its task(?s:.*)6 of 7"):
        form.make(examples, LENGTHS, 8, IDS[:6])
    batch = form.make(examples, LENGTHS, 8, IDS)
    del batch["task_ids"]
    with pytest.raises(InputError, match="gates read the task"):
        network.loss(params, batch)
    inputs, targets = scored(network, IDS)
    with pytest.raises(InputError, match="gates read the task"):
        network.target_log_probs(params, inputs._replace(tasks=None), targets)
    with pytest.raises(InputError, match="gates read the task"):
        network.start(params, inputs._replace(tasks=None), 4)


def test_dense_and_plain_sparse_networks_get_no_task():
    for network in (network_of("t5", "token"), network_of("decoder", "token")):
        form, examples = form_of(network), made.examples(network.config, 3)
        for batch in (form.make(examples, LENGTHS, 3, [0, 1, 2]),
                      form.make_packed([examples[:1]], LENGTHS, 1, [[2]])):
            assert not [key for key in batch if "task" in key]


@pytest.mark.parametrize(("settings", "message"), [
    ({"gate": "both", "task_dim": 4}, r"names of tasks, for gate='both'"),
    ({"gate": "task", "tasks": TASKS}, r"SparseConfig\.task_dim"),
    ({"task_dim": 4}, r"no effect(?s:.*)task_dim"),
    ({"gate": "both", "task_dim": 4, "tasks": ("a", "a")}, "each name once"),
])
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        SparseConfig(4, **settings)
