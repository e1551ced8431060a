"""What every network promises (`models.network.Network`), over every row of `FAMILIES` and of the tests.

Each promise is a property that one function of a network has to another, or to itself under a change that
must not matter; what T5 computes is compared with transformers and T5X elsewhere.
"""

import dataclasses
import functools

import family_rows as made
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elm_jax.data.arrays.batch_forms import form_of
from elm_jax.experts.base import load_base, save_base
from elm_jax.experts.overlay import trained_leaves
from elm_jax.models import families
from elm_jax.models.adapters import stacked
from elm_jax.models.decode import greedy
from elm_jax.models.network import (
    ADAPTER,
    BODY,
    GATE,
    NORM,
    ROLES,
    Network,
    NetworkConfig,
    has_expert_axis,
    is_multiplied,
)
from elm_jax.runtime import sharding, trees
from elm_jax.types import Padded
from elm_jax.workflows.convert.convert_model import ConvertConfig, convert

FAMILIES = list(made.CONFIGS)
LENGTHS = {"inputs": 10, "targets": 7}
every_family = pytest.mark.parametrize("name", FAMILIES)
every_family_in_time = pytest.mark.parametrize("name", [  # T5 1.1 stands for T5 where much is compiled
    pytest.param(name, marks=[pytest.mark.slow] * (name == "t5 1.0, tied")) for name in FAMILIES])
with_adapters = pytest.mark.parametrize(("name", "adapter"), made.PAIRS)
with_adapters_in_time = pytest.mark.parametrize(("name", "adapter"), [
    pytest.param(*pair, marks=[pytest.mark.slow] * (pair[0] == "t5 1.0, tied")) for pair in made.PAIRS])


@functools.partial(jax.jit, static_argnums=0)
def log_probs_of(network, params, inputs, targets):
    return network.target_log_probs(params, inputs, targets)


@functools.partial(jax.jit, static_argnums=0)
def loss_of(network, params, batch):
    return network.loss(params, batch, None)


def rows_of(name: str, batch: int = 4, count: int = 3):
    config = made.CONFIGS[name]
    return made.rows(config, (batch,), 8), made.choices(config, batch, count, 6)


def test_every_row_of_the_table_is_here():
    assert {config.family for config in made.CONFIGS.values()} == set(families.FAMILIES)


@every_family
def test_a_network_is_what_the_door_says(name):
    network, _ = made.network_and_params(name)
    assert isinstance(network, Network) and isinstance(network.config, NetworkConfig)
    assert isinstance(stacked.GroupedNetwork(network, 2), Network)
    again = families.network_of(made.CONFIGS[name])
    assert again == network and hash(again) == hash(network)


@with_adapters
def test_a_config_is_read_as_it_was_written(name, adapter):
    config = made.network_and_params(name, adapter)[0].config
    assert families.config_of(config.to_dict()) == config
    assert dataclasses.replace(config, dtype="bfloat16").activation_dtype == jnp.bfloat16


@with_adapters_in_time
def test_cached_steps_are_the_scores_of_the_whole(name, adapter):
    """Teacher forcing: the token of each place, given to `step`, has the log-probability of one pass."""
    network, params = made.network_and_params(name, adapter)
    inputs, targets = rows_of(name, count=1)
    whole = np.asarray(log_probs_of(network, params, inputs, targets))[:, 0]
    length = targets.tokens.shape[-1]
    cache, token = jax.jit(network.start, static_argnums=2)(params, inputs, length + 3)  # longer than needed
    step = jax.jit(network.step)
    for place in range(length):
        logits, cache = step(params, cache, token)
        token = targets.tokens[:, 0, place]
        found = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(token)), token]
        counted = place < targets.lengths[:, 0]
        np.testing.assert_allclose(found[counted], whole[counted, place], rtol=0, atol=1e-5)
        assert not whole[~counted, place].any()


@every_family
def test_choices_together_are_choices_alone(name):
    network, params = made.network_and_params(name, "bottleneck")
    inputs, targets = rows_of(name)
    together = np.asarray(log_probs_of(network, params, inputs, targets))
    for choice in range(3):
        own = Padded(targets.tokens[:, [choice]], targets.lengths[:, [choice]])
        alone = np.asarray(log_probs_of(network, params, inputs, own))
        np.testing.assert_allclose(together[:, [choice]], alone, rtol=0, atol=1e-5)
    order = [2, 0, 1]
    moved = Padded(targets.tokens[:, order], targets.lengths[:, order])
    permuted = log_probs_of(network, params, inputs, moved)
    np.testing.assert_allclose(permuted, together[:, order], rtol=0, atol=1e-5)


@every_family
def test_what_stands_behind_the_ends_changes_nothing(name):
    """Wider rows, and real tokens in place of padding: lengths alone say what counts."""
    network, params = made.network_and_params(name)
    inputs, targets = rows_of(name)
    expected = np.asarray(log_probs_of(network, params, inputs, targets))

    def littered(rows: Padded, more: int) -> Padded:
        wide = np.pad(rows.tokens, [(0, 0)] * (rows.tokens.ndim - 1) + [(0, more)], constant_values=7)
        behind = np.arange(wide.shape[-1]) >= rows.lengths[..., None]
        return Padded(np.where(behind, 5 + np.arange(wide.shape[-1]), wide).astype(np.int32), rows.lengths)

    found = np.asarray(log_probs_of(network, params, littered(inputs, 3), littered(targets, 2)))
    np.testing.assert_allclose(found[..., :6], expected, rtol=0, atol=1e-5)
    assert not found[..., 6:].any()
    whole = greedy(network, params, inputs, max_length=5)
    np.testing.assert_array_equal(greedy(network, params, littered(inputs, 3), max_length=5), whole)


@every_family
def test_a_row_s_company_and_place_change_nothing(name):
    network, params = made.network_and_params(name)
    inputs, targets = rows_of(name)
    expected = np.asarray(log_probs_of(network, params, inputs, targets))
    order = [3, 1, 0, 2]
    moved = jax.tree.map(lambda array: array[order], (inputs, targets))
    np.testing.assert_allclose(log_probs_of(network, params, *moved), expected[order], rtol=0, atol=1e-5)
    alone = jax.tree.map(lambda array: array[:1], (inputs, targets))
    np.testing.assert_allclose(log_probs_of(network, params, *alone), expected[:1], rtol=0, atol=1e-5)


@every_family
def test_no_token_looks_ahead(name):
    network, params = made.network_and_params(name)
    inputs, targets = rows_of(name)
    targets = Padded(targets.tokens, np.full_like(targets.lengths, 6))
    changed = targets.tokens.copy()
    changed[..., 3:] = (changed[..., 3:] + 5) % made.VOCAB_SIZE
    left, right = (np.asarray(log_probs_of(network, params, inputs, Padded(tokens, targets.lengths)))
                   for tokens in (targets.tokens, changed))
    np.testing.assert_allclose(left[..., :3], right[..., :3], rtol=0, atol=1e-6)
    assert np.abs(left[..., 4:] - right[..., 4:]).max() > 1e-3
    other = inputs.tokens.copy()
    other[:, 0] = (other[:, 0] + 5) % made.VOCAB_SIZE
    assert np.abs(left - log_probs_of(network, params, Padded(other, inputs.lengths), targets)).max() > 1e-3


@with_adapters_in_time
def test_the_loss_of_a_batch_is_what_scoring_says_of_its_targets(name, adapter):
    network, params = made.network_and_params(name, adapter)
    form, config = form_of(network), network.config
    pairs = made.examples(config, 5)
    prompts = [form.prompt(inputs, LENGTHS["inputs"]) for inputs, _ in pairs]

    def padded(lists, length):
        lengths = np.asarray(list(map(len, lists)), np.int32)
        tokens = np.full((len(lists), length), config.pad_id, np.int32)
        for row, own in zip(tokens, lists, strict=True):
            row[:len(own)] = own
        return Padded(tokens, lengths)

    targets = padded([target for _, target in pairs], LENGTHS["targets"])
    scores = log_probs_of(network, params, padded(prompts, LENGTHS["inputs"]),
                          Padded(targets.tokens[:, None], targets.lengths[:, None]))
    sums = loss_of(network, params, form.make(pairs, LENGTHS, 6))  # one row of it is padding
    assert float(sums.weight) == targets.lengths.sum()
    assert float(sums.loss) == pytest.approx(-float(scores.sum()), rel=1e-5)


@every_family
def test_packed_examples_do_not_see_each_other(name):
    network, params = made.network_and_params(name)
    form, pairs = form_of(network), made.examples(network.config, 12)
    sizes = ((len(inputs), len(targets)) for inputs, targets in pairs)
    room = {"inputs": 24, "targets": 16}
    packed = [[pairs[number] for number in row] for row in form.pack(sizes, room)]
    assert len(packed) < len(pairs) / 2
    left = loss_of(network, params, form.make_packed(packed, room, len(packed)))
    right = loss_of(network, params, form.make(pairs, LENGTHS, len(pairs)))
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


@with_adapters
def test_every_leaf_has_axes_and_a_role(name, adapter):
    network, _ = made.network_and_params(name, adapter)
    leaves, rules = trees.flatten(network.abstract_params()), dict(sharding.DEFAULT_RULES)
    axes = trees.flatten(network.logical_axes())
    for path, leaf in leaves.items():
        assert network.axes_of(path) == axes[path] and len(axes[path]) == len(leaf.shape), path
        assert set(axes[path]) <= {*rules, None} and network.role_of(path) in ROLES, path
    assert network.axes_of("no/such/leaf") is None
    roles = {role: {path for path in leaves if network.role_of(path) == role} for role in ROLES}
    bare = set(trees.flatten(families.network_of(network.config.with_adapter(None)).abstract_params()))
    assert roles[ADAPTER] == leaves.keys() - bare and bool(roles[ADAPTER]) == (adapter != "none")
    # A norm, scale or bias, is a vector; every matrix is the body's or an adapter's.
    assert roles[NORM] and all(len(leaves[path].shape) == 1 for path in roles[NORM])
    assert all(is_multiplied(path) == (len(leaves[path].shape) > 1) for path in roles[BODY] - {
        path for path in roles[BODY] if path.endswith("rel_embedding")})
    # A router computes in float32, and is no leaf of an expert with adapters.
    assert bool(roles[GATE]) == (network.config.sparse is not None)
    assert not any(map(is_multiplied, roles[GATE]))
    experts = {path for path in leaves if axes[path][:1] == ("expert",)}
    assert experts == set(filter(has_expert_axis, leaves)) <= roles[BODY]
    trains = trained_leaves(network.role_of, "adapter", train_norms=False)
    assert {path for path in leaves if trains(path)} == roles[ADAPTER]


@every_family_in_time
@pytest.mark.parametrize("shape", [(8, 1), (2, 4)], ids=str)
def test_a_mesh_changes_nothing(name, shape):
    network, params = made.network_and_params(name, "bottleneck")
    inputs, targets = rows_of(name, batch=8)
    batch = form_of(network).make(made.examples(network.config, 8), LENGTHS, 8)
    expected = log_probs_of(network, params, inputs, targets), loss_of(network, params, batch)
    mesh = sharding.make_mesh(*shape)
    split = sharding.put_tree(params, sharding.tree_shardings(network.logical_axes(), params, mesh))
    rows = {"inputs": inputs.tokens, "input_lengths": inputs.lengths, "targets": targets.tokens,
            "target_lengths": targets.lengths}
    placed = sharding.put_batch(rows, mesh)
    with sharding.placed(mesh, sharding.DEFAULT_RULES):
        found = jax.jit(network.target_log_probs)(
            split, Padded(placed["inputs"], placed["input_lengths"]),
            Padded(placed["targets"], placed["target_lengths"]))
        sums = jax.jit(lambda params, batch: network.loss(params, batch, None))(
            split, sharding.put_batch(batch, mesh))
    np.testing.assert_allclose(found, expected[0], rtol=0, atol=1e-5)
    assert float(sums.loss) == pytest.approx(float(expected[1].loss), rel=1e-5)


@every_family_in_time
def test_greedy_takes_the_best_continuation_of_all(name):
    """Each token against the scores of every token of the vocabulary as the next one."""
    network, params = made.network_and_params(name)
    inputs = made.rows(network.config, (3,), 8)
    tokens = np.asarray(greedy(network, params, inputs, max_length=4, eos_id=-1))
    for row in range(3):
        prompt = jax.tree.map(lambda array: array[row:row + 1], inputs)  # noqa: B023
        for place in range(4):
            tried = np.tile(tokens[row, :place + 1], (made.VOCAB_SIZE, 1))
            tried[:, place] = np.arange(made.VOCAB_SIZE)
            every = Padded(tried[None], np.full((1, made.VOCAB_SIZE), place + 1, np.int32))
            scores = np.asarray(log_probs_of(network, params, prompt, every))[0, :, place]
            assert scores[tokens[row, place]] >= scores.max() - 1e-5


@every_family
def test_decoding_ends_with_the_family_s_own_eos_and_padding(name):
    network, params = made.network_and_params(name)
    inputs = made.rows(network.config, (6,), 8)
    free = np.asarray(greedy(network, params, inputs, max_length=6, eos_id=-1))
    ends = np.asarray(greedy(network, params, inputs, max_length=6, eos_id=int(free[0, 1])))
    first = int(np.argmax(free[0] == free[0, 1]))
    np.testing.assert_array_equal(ends[0, :first + 1], free[0, :first + 1])
    assert (ends[0, first + 1:] == network.config.pad_id).all()


@every_family
def test_the_end_of_a_text_is_the_family_s_own(name):
    """Among random networks some text ends: what follows is padding, and nothing else ends one."""
    ended = []
    for seed in range(3, 30):
        if seed > 5 and any(ended):
            break
        network, params = made.network_and_params(name, seed=seed)
        inputs = made.rows(network.config, (16,), 8, seed)
        tokens = np.asarray(greedy(network, params, inputs, max_length=8))
        for row, free in zip(tokens, np.asarray(greedy(network, params, inputs, max_length=8, eos_id=-1)),
                             strict=True):
            end = int(np.argmax(free == network.config.eos_id)) if network.config.eos_id in free else 8
            np.testing.assert_array_equal(row[:end + 1], free[:end + 1])
            assert (row[end + 1:] == network.config.pad_id).all()
            ended.append(end < 7)
    assert any(ended)


@every_family_in_time
def test_many_experts_are_a_network_like_any_other(name):
    """Scores, texts and losses of grouped rows are those of each expert alone."""
    network, params = made.network_and_params(name, "bottleneck")
    trains = trained_leaves(network.role_of, "adapter")
    base, _ = trees.split(params, lambda path: not trains(path))
    others = (made.network_and_params(name, "bottleneck", seed)[1] for seed in (3, 5))
    overlays = [trees.split(other, trains)[0] for other in others]
    grouped, many = stacked.GroupedNetwork(network, 2), (base, stacked.stack(overlays))
    inputs, targets = rows_of(name)
    twice = jax.tree.map(lambda array: np.concatenate([array, array]), (inputs, targets))
    batch = form_of(network).make(made.examples(network.config, 4), LENGTHS, 4)
    scores = np.asarray(log_probs_of(grouped, many, *twice))
    texts = np.asarray(greedy(grouped, many, twice[0], max_length=5))
    sums = loss_of(grouped, many, {key: np.concatenate([array, array]) for key, array in batch.items()})
    total = 0.0
    for number, overlay in enumerate(overlays):
        own, part = trees.merge(base, overlay), slice(4 * number, 4 * number + 4)
        alone = log_probs_of(network, own, inputs, targets)
        np.testing.assert_allclose(scores[part], alone, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(texts[part], greedy(network, own, inputs, max_length=5))
        total += float(loss_of(network, own, batch).loss)
    assert float(sums.loss) == pytest.approx(total, rel=1e-5)
    shapes = {path: (2, *leaf.shape) for path, leaf in trees.flatten(network.abstract_params()).items()}
    assert {path: leaf.shape for path, leaf in trees.flatten(grouped.abstract_params()[1]).items()} == shapes
    axes = {path: ("experts", *own) for path, own in trees.flatten(network.logical_axes()).items()}
    assert {path: tuple(own) for path, own in trees.flatten(grouped.logical_axes()[1]).items()} == axes
    assert {path: tuple(grouped.axes_of(path)) for path in axes} == axes and grouped.axes_of("none") is None


@every_family_in_time
def test_dropout_draws_only_with_a_key(name):
    network, params = made.network_and_params(name)
    dropping = families.network_of(dataclasses.replace(network.config, dropout_rate=0.5))
    batch = form_of(network).make(made.examples(network.config, 4), LENGTHS, 4)
    loss = jax.jit(lambda rng: dropping.loss(params, batch, rng).loss)
    assert float(loss_of(dropping, params, batch).loss) == pytest.approx(
        float(loss_of(network, params, batch).loss), rel=1e-6)
    draws = {float(loss(jax.random.key(seed))) for seed in (0, 0, 1)}
    assert len(draws) == 2


FORMS = {"t5": ("elm", "hf", "t5x"), "decoder": ("elm", "hf")}
"""Kinds of folders that a base of each family is converted to."""


@every_family
def test_a_base_survives_each_other_form_of_its_family(name, tmp_path):
    """From this program's folder to another kind and back: the same config and the same bits."""
    network, params = made.network_and_params(name)
    save_base(tmp_path / "elm", params, network.config, None, {})
    before = load_base(tmp_path / "elm")
    assert set(FORMS) == set(families.FAMILIES), "a new family says here what it is converted to"
    for kind in FORMS[network.config.family] if network.config.sparse is None else ("elm",):
        there, back = tmp_path / f"{kind} there", tmp_path / f"{kind} back"
        convert(ConvertConfig(tmp_path / "elm", "elm", there, kind))
        convert(ConvertConfig(there, kind, back, "elm"))
        after = load_base(back)
        assert after.config == before.config
        assert after.fingerprint == before.fingerprint == trees.fingerprint(after.params)


@every_family
def test_a_base_is_read_as_it_was_written(name, tmp_path):
    network, params = made.network_and_params(name)
    save_base(tmp_path / "base", params, network.config, None, {})
    base = load_base(tmp_path / "base")
    assert base.config == network.config
    assert trees.fingerprint(base.params) == trees.fingerprint(jax.tree.map(np.asarray, params))
    split = load_base(tmp_path / "base", mesh=sharding.make_mesh(2, 4))
    assert trees.fingerprint(jax.tree.map(np.asarray, split.params)) == base.fingerprint
