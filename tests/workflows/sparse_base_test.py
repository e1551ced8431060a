"""A sparse base is a base: pretraining, experts, merging, a library and evaluation by the ordinary verbs."""

import json

import numpy as np
import pytest
import tiny_study as tiny

from elm_jax.cli.main import main
from elm_jax.errors import InputError
from elm_jax.experts.base import load_base
from elm_jax.experts.overlay import load_expert, resolve
from elm_jax.models.losses import LossConfig
from elm_jax.runtime import trees

SPARSE = ["--gin.T5Config.sparse=@SparseConfig()", "--gin.SparseConfig.num_experts=4",
          "--gin.SparseConfig.step=1", "--gin.LossConfig.balance_loss=0.01",
          "--gin.LossConfig.router_z_loss=1e-3"]
SIZES = ["--gin.T5Config.emb_dim=16", "--gin.T5Config.num_heads=2", "--gin.T5Config.head_dim=8",
         "--gin.T5Config.mlp_dim=32", "--gin.T5Config.num_encoder_layers=1",
         "--gin.T5Config.num_decoder_layers=1", "--gin.VOCAB_SIZE=1152"]
RUN = ["--gin.MESH_DATA=1", "--gin.train.tensorboard=False", "--gin.train.log_period=1"]
SHORT = ["--steps", "3", "--learning_rate", "1e-2", "--batch_size", "4", "--source_length", "64",
         "--target_length", "16"]
MODULE = ["--module", "elm_jax.tasks.embedded"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sparse base that `elm pretrain` made, and experts of it: adapters, and every leaf but the routers."""
    folder = tmp_path_factory.mktemp("sparse")
    assert main(["pretrain", "--passages", "elm_jax.tasks.embedded:passages", "--output", str(folder / "pre"),
                 "--gin.pretrain.vocab_pieces=1000", "--gin.pretrain.tensorboard=False",
                 "--gin.pretrain.mesh_data=1", "--gin.pretrain.log_period=1", *SHORT, *SIZES, *SPARSE]) == 0
    for name, kind, task, *more in (
            ("topic", "prompt", tiny.TOPIC), ("review", "prompt", tiny.REVIEW),
            ("whole", "dataset", "mini_topic", "--gin.FREEZE='gate'", "--gin.LossConfig.balance_loss=0.01"),
            ("all", "dataset", "mini_topic")):
        assert main(["train", "--kind", kind, "--task", task, "--base", str(folder / "pre" / "base"),
                     "--output", str(folder / name), "--prepared", str(folder / "prepared"),
                     f"--gin.train.expert_id='{name}'", *RUN, *SHORT, *MODULE, *more]) == 0
    return folder


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_pretraining_logs_its_losses_and_keeps_its_settings(folder):
    base = load_base(folder / "pre" / "base")
    assert base.config.sparse.num_experts == 4
    assert all(row["balance_loss"] > 0 and row["router_z_loss"] > 0 for row in rows_of(folder / "pre"))


@pytest.mark.slow
def test_experts_train_what_they_should(folder):
    base, topic, whole = load_base(folder / "pre" / "base"), *(
        load_expert(folder / name) for name in ("topic", "whole"))
    start = trees.flatten(base.params)
    overlay = trees.flatten(topic.overlay)
    assert not [path for path in overlay if "/router/" in path or "/expert/" in path]
    assert {path for path in overlay if "mlp_adapter" in path}
    leaves = trees.flatten(whole.overlay)
    assert leaves.keys() == start.keys()  # a full expert is whole, frozen leaves too
    same = {path for path, leaf in leaves.items() if np.array_equal(leaf, start[path])}
    assert same == {path for path in start if "/router/" in path}
    assert all("balance_loss" in row for row in rows_of(folder / "whole"))
    assert not any("balance_loss" in row for row in rows_of(folder / "topic"))
    for expert in (topic, whole):
        network, params = resolve(base, expert)
        assert trees.first_difference(params, network.abstract_params()) is None


@pytest.mark.slow
@pytest.mark.parametrize("names", [("topic", "review"), ("whole", "all")])
def test_experts_of_one_sparse_base_merge(folder, names):
    target, experts = folder / "-".join(names), [str(folder / name / "expert") for name in names]
    assert main(["merge", "--output", str(target), *experts]) == 0
    first, second = (trees.flatten(load_expert(expert).overlay) for expert in experts)
    for path, leaf in trees.flatten(load_expert(target).overlay).items():
        np.testing.assert_allclose(leaf, (first[path] + second[path]) / 2, rtol=0, atol=1e-6)
    ties = folder / f"{target.name}-ties"
    assert main(["merge", "--method", "ties", "--base", str(folder / "pre" / "base"), "--output", str(ties),
                 *experts]) == 0
    network, params = resolve(load_base(folder / "pre" / "base"), load_expert(ties))
    assert trees.first_difference(params, network.abstract_params()) is None


@pytest.mark.slow
def test_a_library_routes_and_evaluation_scores(folder, capsys):
    base, prepared = str(folder / "pre" / "base"), str(folder / "prepared")
    experts = [str(folder / name / "expert") for name in ("topic", "review")]
    assert main(["library", "build", "--library", str(folder / "lib"), "--base", base, "--encoder", "tfidf",
                 "--instances", "20", "--prepared", prepared, *MODULE, *experts]) == 0
    capsys.readouterr()
    assert main(["route", "--library", str(folder / "lib"), "--task", tiny.TOPIC, "--queries", "8", "--json",
                 "--top_k", "1", *MODULE]) == 0
    assert json.loads(capsys.readouterr().out)["ranking"][0]["expert"] == "topic"
    output = folder / "results" / "results.jsonl"
    words = ["evaluate", "--base", base, "--task", tiny.TOPIC, "--max_rows", "6", "--output", str(output),
             "--source_length", "48", "--max_new_tokens", "6", "--prepared", prepared, *MODULE]
    for name in ("topic", "review", "whole"):
        words += ["--expert", str(folder / name / "expert")]
    assert main(words) == 0
    assert {json.loads(line)["expert"] for line in output.read_text().splitlines()} == {
        "topic", "review", "whole"}


def test_a_loss_of_routers_on_a_dense_base_is_refused_before_anything_is_written(world, tmp_path):
    with pytest.raises(InputError, match="no layer is sparse"):
        tiny.make_expert(world.base, tmp_path / "run", kind="dataset", adapter_bottleneck=None,
                         loss=LossConfig(balance_loss=0.01))
    with pytest.raises(InputError, match="nothing to freeze"):
        tiny.make_expert(world.base, tmp_path / "run", kind="dataset", adapter_bottleneck=None,
                         freeze="experts")
    assert not (tmp_path / "run").exists()
