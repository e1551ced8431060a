"""Upcycling in memory and in folders: which leaves, what they compute, what is refused."""

import dataclasses
import json

import family_rows
import jax
import numpy as np
import pytest
import tiny_study as tiny

import elm_jax as elm
from elm_jax.cli import main
from elm_jax.errors import InputError
from elm_jax.experts.base import Base, load_base, load_vocabulary
from elm_jax.experts.overlay import Expert, resolve, save_expert
from elm_jax.formats import detect
from elm_jax.formats.elm import elm_folders
from elm_jax.formats.tensors.streaming import CastTensors
from elm_jax.models.blocks.feed_forward import Mlp
from elm_jax.models.blocks.sparse_mlp import SparseMlp
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.models.t5 import hf_names as t5_names
from elm_jax.runtime import trees
from elm_jax.workflows.upcycle.upcycle_base import UpcycleConfig, upcycle, upcycle_folders

SPARSE = SparseConfig(4, experts_per_token=2, capacity_factor=None)
NORMALISED = dataclasses.replace(SPARSE, normalize_gates=True)
EVERY = dataclasses.replace(NORMALISED, step=1)
EXPERT, DENSE = "/mlp/expert/", "/mlp/"
FAMILIES = ["t5 1.0, tied", "t5 1.1", "llama"]
MODULE = ["--module", "elm_jax.tasks.embedded"]


def dense(name: str) -> Base:
    network, params = family_rows.network_and_params(name)
    return Base(name, params, network.config, trees.fingerprint(params))


def log_probs(base: Base) -> np.ndarray:
    network, params = resolve(base, None)
    inputs = family_rows.rows(base.config, (3,), 9)
    return np.asarray(jax.jit(network.target_log_probs)(
        params, inputs, family_rows.choices(base.config, 3, 2, 5)))


def run(capsys, *words):
    status = main.main(["upcycle", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("name", ["t5 1.1", "llama"])
def test_gates_of_both_are_those_of_tokens_at_the_start(name):
    base = dense(name)
    token, both = (upcycle(base, dataclasses.replace(EVERY, **tasks)) for tasks in (
        {}, {"gate": "both", "tasks": ("a", "b"), "task_dim": 3}))
    found, wanted = (trees.flatten(each.params) for each in (both, token))
    assert all(np.array_equal(found[path], leaf) for path, leaf in wanted.items())
    assert {path.split("/")[-3] for path in found.keys() - wanted.keys() if "task_weights" in path} == {
        "task_weights"} and np.std(found["task_embedder/embedding"]) > 0.3
    network, _ = resolve(both, None)
    inputs = family_rows.rows(base.config, (3,), 9)._replace(tasks=np.array([0, 1, 1], np.int32))
    np.testing.assert_array_equal(log_probs(token), jax.jit(network.target_log_probs)(
        both.params, inputs, family_rows.choices(base.config, 3, 2, 5)))


def test_the_verb_makes_gates_that_read_tasks(world, tmp_path, capsys):
    words = ["--base", world.base.path, "--num_experts", "2", "--step", "1", *MODULE]
    status, _, _ = run(capsys, *words, "--output", tmp_path / "new", "--gate", "task", "--tasks",
                       "mini_topic", tiny.REVIEW, "--task_dim", "3")
    sparse = load_base(tmp_path / "new").config.sparse
    assert (status, sparse.gate, sparse.task_dim) == (0, "task", 3)
    assert sparse.tasks == ("mini_topic__which_section", tiny.TOPIC, tiny.REVIEW)
    for more, message in ((["--tasks", tiny.TOPIC], "--gate both"), (["--gate", "both"], "names of tasks"),
                          (["--gate", "both", "--tasks", "mini_topi"], "nearest: mini_topic")):
        status, _, error = run(capsys, *words, "--output", tmp_path / "no", *more)
        assert status == 2 and message in error


@pytest.mark.parametrize("name", FAMILIES)
def test_every_expert_is_the_dense_feed_forward_and_all_else_is_as_it_was(name):
    base = dense(name)
    before, after = (trees.flatten(each.params) for each in (base, upcycle(base, SPARSE)))
    experts = {path for path in after if EXPERT in path}
    routers = {path for path in after if "/mlp/router/" in path}
    layers = {path.split("/mlp/")[0] for path in experts}
    assert layers == {path.split("/mlp/")[0] for path in routers} and all("layers_1" in own for own in layers)
    assert set(after) - experts - routers == {
        path for path in before if not path.startswith(tuple(f"{own}/mlp/" for own in layers))}
    for path, leaf in after.items():
        if path in routers:
            assert leaf.shape == (base.config.emb_dim, 4) and leaf.dtype == np.float32
        elif path in experts:
            assert leaf.shape == (4, *before[path.replace(EXPERT, DENSE)].shape)
            assert all(np.array_equal(own, before[path.replace(EXPERT, DENSE)]) for own in leaf)
        else:
            assert np.array_equal(leaf, before[path])


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_experts_with_normalised_gates_compute_what_the_dense_base_does(name):
    base = dense(name)
    wanted, found = log_probs(base), log_probs(upcycle(base, EVERY, seed=3))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    raw = log_probs(upcycle(base, dataclasses.replace(EVERY, normalize_gates=False), seed=3))
    assert np.abs(raw - wanted).max() > 1e-2  # raw gates jump


@pytest.mark.parametrize("name", FAMILIES)
def test_a_raw_layer_gives_the_sum_of_the_largest_probabilities_times_the_dense_one(name):
    base = dense(name)
    config, sparse = base.config, upcycle(base, SPARSE)
    layer = next(path.split("/mlp/")[0] for path in trees.flatten(sparse.params) if EXPERT in path)
    mine, theirs = (_at(each.params, f"{layer}/mlp") for each in (sparse, base))
    x = np.random.default_rng(0).normal(size=(2, 7, config.emb_dim)).astype(np.float32)
    size = (config.emb_dim, config.mlp_dim, config.mlp_activations, 0.0, np.dtype("float32"))
    found = SparseMlp(*size, SPARSE).apply({"params": mine}, x, True)
    wanted = np.asarray(Mlp(*size).apply({"params": theirs}, x, True), np.float64)
    logits = np.einsum("bld,de->ble", x.astype(np.float64), mine["router"]["router_weights"]["w"]["kernel"])
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    gate = np.sort(probs)[..., -2:].sum(-1, keepdims=True)
    np.testing.assert_allclose(found, gate * wanted, atol=1e-5 * np.abs(wanted).max())


def _at(params, path):
    for name in path.split("/"):
        params = params[name]
    return params


def test_routers_are_small_and_of_the_seed_alone():
    base = dense("llama")
    of = {seed: {path: leaf for path, leaf in trees.flatten(upcycle(base, EVERY, seed=seed).params).items()
                 if "/router/" in path} for seed in (0, 1)}
    again = trees.flatten(upcycle(base, EVERY).params)
    assert all(np.array_equal(leaf, again[path]) for path, leaf in of[0].items())
    leaves = [*of[0].values(), *of[1].values()]
    assert not any(np.array_equal(leaf, other) for number, leaf in enumerate(leaves)
                   for other in leaves[:number])
    assert np.std(np.stack(leaves)) == pytest.approx(0.02, rel=0.15)


def test_noise_is_a_share_of_a_kernel_s_size_and_tells_the_copies_apart():
    base = dense("t5 1.1")
    before, after = trees.flatten(base.params), trees.flatten(upcycle(base, EVERY, noise=0.1).params)
    assert np.array_equal(after["decoder/layers_0/mlp/expert/wo/kernel"], trees.flatten(
        upcycle(base, EVERY, noise=0.1).params)["decoder/layers_0/mlp/expert/wo/kernel"])
    for path in (path for path in after if EXPERT in path):
        kernel = before[path.replace(EXPERT, DENSE)].astype(np.float64)
        added = after[path] - kernel
        share = np.sqrt(np.square(added).mean((1, 2)) / np.square(kernel).mean())
        np.testing.assert_allclose(share, 0.1, rtol=0.15)
        assert abs(np.corrcoef(added[0].ravel(), added[1].ravel())[0, 1]) < 0.15


def test_a_dense_sub_layer_behind_a_sparse_one_adds_nothing_at_first():
    base = dense("t5 1.1")
    sparse = upcycle(base, dataclasses.replace(EVERY, dense_sublayer=True))
    fresh = set(trees.flatten(sparse.params)) - set(trees.flatten(upcycle(base, EVERY).params))
    assert any(path.endswith("/wo/kernel") for path in fresh)
    np.testing.assert_allclose(log_probs(sparse), log_probs(base), atol=1e-5)


@pytest.fixture(scope="module")
def experts(world, tmp_path_factory):
    """Three full experts of the world's base: the trained one, and two that differ in every leaf."""
    folder, made = tmp_path_factory.mktemp("experts"), [world.dataset]
    for seed in (1, 2):
        draw = np.random.default_rng(seed)
        overlay = trees.unflatten({
            path: np.asarray(leaf) + draw.normal(0, 0.1, leaf.shape).astype(np.float32)
            for path, leaf in trees.flatten(world.base.params).items()})
        made.append(Expert(dataclasses.replace(world.dataset.card, id=f"other-{seed}"), overlay))
        save_expert(folder / f"other-{seed}", made[-1])
    return [folder / "other-2", world.folder / "dataset" / "expert", folder / "other-1"], [
        made[2], made[0], made[1]]


@pytest.mark.parametrize("rest", [None, "mean", "base"])
def test_full_experts_become_the_experts_in_their_order(world, experts, tmp_path, rest):
    folders, parents = experts
    sparse = dataclasses.replace(EVERY, num_experts=3)
    report = upcycle_folders(UpcycleConfig(world.base.path, tmp_path / "out", sparse, tuple(folders), rest))
    found = load_base(tmp_path / "out")
    leaves, base = trees.flatten(found.params), trees.flatten(world.base.params)
    own = [trees.flatten(each.overlay) for each in parents]
    for path, leaf in leaves.items():
        if EXPERT in path:
            for number, each in enumerate(own):
                assert np.array_equal(leaf[number], each[path.replace(EXPERT, DENSE)])
        elif "/router/" not in path:
            mean = np.mean([each[path] for each in own], axis=0, dtype=np.float64)
            assert np.array_equal(leaf, base[path] if rest == "base" else mean.astype(np.float32))
    made = report["upcycled"]
    assert [each["id"] for each in made["experts"]] == ["other-2", "topic-de", "other-1"]
    assert [each["fingerprint"] for each in made["experts"]] == [
        trees.fingerprint(each.overlay) for each in parents]
    assert made["method"] == "experts" and made["rest"] == (rest or "mean")
    in_memory = upcycle(world.base, sparse, parents, rest=rest)
    assert in_memory.fingerprint == found.fingerprint == report["fingerprint"]


def test_the_folder_is_a_base_like_any_other(world, tmp_path):
    report = upcycle_folders(UpcycleConfig(world.base.path, tmp_path / "out", EVERY))
    found = load_base(tmp_path / "out")
    assert found.config == dataclasses.replace(world.base.config, sparse=EVERY)
    assert found.fingerprint == trees.fingerprint(found.params) == upcycle(world.base, EVERY).fingerprint
    assert found.vocabulary.contents == world.base.vocabulary.contents
    assert load_vocabulary(tmp_path / "out")[1] is not None
    stored = json.loads((tmp_path / "out" / "base.json").read_text())
    assert stored["training"]["upcycled"] == report["upcycled"] == {
        "method": "copies", "base": world.base.reference(), "noise": 0.0, "seed": 0}
    assert report["sparse_layers"] == {"encoder": [0], "decoder": [0]}
    assert report["num_parameters"] == trees.count(found.params)
    kernels = 3 * 16 * 32 * 2  # of the feed-forwards of both layers
    assert report["dense_parameters"] == trees.count(world.base.params)
    assert report["num_parameters"] - report["dense_parameters"] == 3 * kernels + 2 * 16 * 4
    assert report["active_parameters"] == report["num_parameters"] - 2 * kernels


def test_an_expert_is_trained_on_a_sparse_base_and_scored(world, tmp_path):
    upcycle_folders(UpcycleConfig(world.base.path, tmp_path / "out", EVERY))
    base = load_base(tmp_path / "out")
    expert = tiny.make_expert(base, tmp_path / "run", train_steps=1,
                              prepared_dir=str(world.folder / "prepared"))
    assert expert.card.base["fingerprint"] == base.fingerprint
    for model in (None, expert):
        rows = elm.evaluate(base, model, [tiny.TOPIC], data=world.data, max_rows=4)
        assert rows[0]["num_instances"] == 4


def test_types_on_disk_stay_and_routers_are_float32(world, tmp_path):
    model = detect.open_model(world.base.path)
    elm_folders.write_elm(tmp_path / "half", dataclasses.replace(
        model, tensors=CastTensors(model.tensors, "bfloat16", "here"), facts={}))
    upcycle_folders(UpcycleConfig(tmp_path / "half", tmp_path / "out", EVERY, noise=0.01))
    types = {path: spec.dtype for path, spec in detect.open_model(tmp_path / "out").tensors.specs.items()}
    assert {types[path] for path in types if "/router/" in path} == {"float32"}
    assert {types[path] for path in types if "/router/" not in path} == {"bfloat16"}
    load_base(tmp_path / "out")


def test_the_loss_before_and_after_is_told_on_request(world, tmp_path, capsys):
    loss_on = ("--step", 1, "--loss_on", tiny.TOPIC, "--rows", 8, *MODULE)
    status, out, err = run(capsys, "--base", world.base.path, "--output", tmp_path / "o", "--num_experts", 4,
                           "--json", *loss_on)
    assert status == 0, err
    loss = json.loads(out)["loss"]
    nats = loss["nats_per_token"]
    assert loss["rows"] == 8 and loss["gates"] == "raw" and "All 4 experts are equal" in loss["why"]
    assert nats["normalised"] == pytest.approx(nats["dense"], abs=1e-5)
    assert abs(nats["raw"] - nats["dense"]) > 1e-3
    assert loss["jump"]["raw"] == pytest.approx(nats["raw"] - nats["dense"])
    status, out, err = run(capsys, "--base", world.base.path, "--output", tmp_path / "again",
                           "--num_experts", 4, "--normalize_gates", *loss_on)
    assert status == 0 and "4 experts, 2 a token, in layers 0 of the encoder; 0 of the decoder" in out
    assert f"{nats['raw']:.4f}" in out and out.splitlines()[-1] == str(tmp_path / "again")
    assert load_base(tmp_path / "again").config.sparse.normalize_gates


def test_the_dense_base_s_files_of_a_tokenizer_stay_and_its_config_json_does_not(world, tmp_path):
    model = detect.open_model(world.base.path)
    kept = {"tokenizer": {"tokenizer_config.json": {"chat_template": "{{ messages }}"}},
            "config": t5_names.config_to_hf(model.config), "generation_config": {"num_beams": 1}}
    elm_folders.write_elm(tmp_path / "base", dataclasses.replace(model, facts={"hf": kept}))
    upcycle_folders(UpcycleConfig(tmp_path / "base", tmp_path / "out", EVERY))
    facts = json.loads((tmp_path / "out" / "base.json").read_text())["facts"]
    assert facts == {"hf": {name: kept[name] for name in ("tokenizer", "generation_config")}}
    assert load_base(tmp_path / "out").chat_template is not None


def test_what_cannot_be_made_sparse_is_refused(world):
    with pytest.raises(InputError, match=r"have biases(.|\n)*cure: take a base of the Llama type"):
        upcycle(dense("gpt2"), EVERY)
    with pytest.raises(InputError, match=r"sparse already(.|\n)*4 experts"):
        upcycle(upcycle(dense("llama"), EVERY), EVERY)
    with pytest.raises(InputError, match=r"[Nn]o layer (.|\n)*step=9"):
        upcycle(dense("llama"), dataclasses.replace(SPARSE, step=9))
    with pytest.raises(InputError, match="may not depend on later tokens"):
        upcycle(dense("llama"), SparseConfig(4, choice="experts", eval_capacity_factor=2.0))


def test_experts_that_do_not_fit_are_refused_and_nothing_is_written(world, experts, tmp_path):
    full = world.folder / "dataset" / "expert"

    def refused(pattern, folders, base=world.base, **changes):
        sparse = dataclasses.replace(EVERY, num_experts=changes.pop("num_experts", len(folders)))
        with pytest.raises(InputError, match=pattern):
            upcycle_folders(UpcycleConfig(base.path, tmp_path / "out", sparse, tuple(folders), **changes))
        assert list(tmp_path.iterdir()) == []

    refused(r"no feed-forwards of its own(.|\n)*prompt expert(.|\n)*--kind dataset",
            [full, world.folder / "topic"])
    refused("belongs to another base", [full, full], base=world.other_base)
    refused("Each full expert becomes one", [full, full], num_experts=4)
    refused("differ already", [full, full], noise=0.1)
    refused("Unknown rest", [full, full], rest="all")
    with pytest.raises(InputError, match="all other leaves are the base's"):
        upcycle(world.base, EVERY, rest="base")
    with pytest.raises(InputError, match="belongs to another base"):
        upcycle(world.other_base, dataclasses.replace(EVERY, num_experts=2), [world.dataset] * 2)


def test_a_value_that_is_not_finite_and_a_changed_base_leave_nothing(world, tmp_path):
    broken = trees.flatten(world.dataset.overlay)
    name = "encoder/layers_0/mlp/wo/kernel"
    broken[name] = np.full_like(broken[name], np.nan)
    save_expert(tmp_path / "nan", dataclasses.replace(world.dataset, overlay=trees.unflatten(broken)))
    sparse = dataclasses.replace(EVERY, num_experts=2)
    with pytest.raises(InputError, match=rf"not finite(.|\n)*{name}"):
        upcycle_folders(UpcycleConfig(world.base.path, tmp_path / "out", sparse, (tmp_path / "nan",) * 2))
    changed = detect.open_model(world.base.path)
    elm_folders.write_elm(tmp_path / "changed", changed)
    facts = json.loads((tmp_path / "changed" / "base.json").read_text())
    (tmp_path / "changed" / "base.json").write_text(
        json.dumps({**facts, "fingerprint": world.other_base.fingerprint}))
    with pytest.raises(InputError, match="not those that were written"):
        upcycle_folders(UpcycleConfig(tmp_path / "changed", tmp_path / "out", EVERY))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed", "nan"]


@pytest.mark.parametrize(("words", "message"), [
    ("", "needs a number of experts"),
    ("--num_experts 2 --experts_per_token 3", "more experts than there are"),
    ("--num_experts 4 --step 5", "--step|step=5"),
    ("--num_experts 4 --offset t5y", "t5x"),
    ("--num_experts 4 --rows 3", "--loss_on"),
    ("--num_experts 4 --module my_tasks", "--loss_on"),
    ("--num_experts 4 --step 1 --loss_on mini_topic__about_wat", "mini_topic__about_what"),
    ("--num_experts 4 --step 1 --loss_on mini_topic", "one task"),
    ("--num_experts 4 --step 1 --noise -1", "noise"),
])
def test_wrong_flags_are_status_2_with_one_message(world, tmp_path, capsys, words, message):
    status, _, err = run(capsys, "--base", world.base.path, "--output", tmp_path / "out", *words.split())
    assert status == 2 and "Traceback" not in err and message.split("|")[-1] in err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_taken_is_refused(world, tmp_path, capsys):
    (tmp_path / "own.txt").write_text("mine")
    status, _, err = run(capsys, "--base", world.base.path, "--output", tmp_path, "--num_experts", 4)
    assert status == 2 and "exists already" in err and (tmp_path / "own.txt").read_text() == "mine"
