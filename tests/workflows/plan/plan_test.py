"""Plans: of small runs on simulated devices; of XL and XXL on slices where TPUs' compiler is installed."""

import dataclasses
import importlib.util
import json
import math

import numpy as np
import pytest
import tiny_study as tiny
import weights
from checkout import HELPERS, ROOT

from elm_jax.cli import gin_config as config_lib
from elm_jax.cli import main
from elm_jax.cli import plan as plan_commands
from elm_jax.experts.base import Base
from elm_jax.experts.overlay import initial_overlay
from elm_jax.models.families import network_of
from elm_jax.models.t5.network import T5Network
from elm_jax.planning import chips
from elm_jax.runtime import trees
from elm_jax.workflows.plan.step_plan import plan_run, split_leaves
from elm_jax.workflows.train.train_config import TrainConfig

GIN = ROOT / "gin"
SMALL = ["--gin.VOCAB_SIZE=128", "--gin.T5Config.num_encoder_layers=1", "--gin.T5Config.num_decoder_layers=1",
         "--gin.T5Config.mlp_dim=128", "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 8}"]
SCALE = [("xl_prompt_v5e16", "v5e:4x4"), ("xl_dataset_v5e16", "v5e:4x4"), ("xxl_prompt_v4_16", "v4:2x2x4"),
         ("xxl_dataset_v4_16", "v4:2x2x4")]

LLAMA = "scale/llama_1b_lora_v5e4.gin"
LLAMA_PARAMETERS = 1_235_814_400
"""As transformers counts those of Llama 3.2 1B."""
LLAMA_UPDATES = 16 * 8 * (2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192))
"""Sixteen layers of low-rank updates, rank 8: queries and outputs, keys and values, three of the MLP."""


def plan(capsys, *arguments):
    status = main.main(["train", "--plan", *arguments, *SMALL, "--gin_file", "models/tiny.gin"])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_a_plan_of_a_run_needs_no_base_and_no_data(capsys, monkeypatch):
    """A dataset expert: parameters and AdamW's moments in eighths; and what is too much is told."""
    arguments = ["--topology", "cpu:8", "--gin_file", "experts/dataset.gin", "--gin_file",
                 "sharding/fsdp.gin", "--gin.OptimizerConfig.name='adamw'", "--gin.BATCH_SIZE=16"]
    made = []
    monkeypatch.setattr(plan_commands, "plan_run", lambda *a: made.append(plan_run(*a)) or made[0])
    status, out, _ = plan(capsys, *arguments, "--json")
    found = json.loads(out)
    assert status == 0 and found["fits"] and found["mesh"] == {"data": 8, "experts": 1, "model": 1}
    network = config_lib.build("train").network
    count = trees.count(T5Network(network).abstract_params())
    assert found["parameters"] == found["trained"] == count
    whole = 2 * 4 * 32  # relative positions have no embed dimension
    assert found["memory"]["overlay"] == 4 * ((count - whole) // 8 + whole)
    assert found["memory"]["optimiser state"] == 2 * found["memory"]["overlay"] + 8
    assert found["steps"] == math.ceil(5 * 100000 / 16) and found["compiled_for"] == "cpu"
    assert found["total"] == sum(found["memory"].values()) > 3 * found["memory"]["overlay"]
    assert 0.9 < found["flops"] / (3 * 2 * 16 * _products(network)) < 1.2
    assert "all-gather" in found["collectives"] and 0.5 < found["ratio"] < 3

    made[0] = dataclasses.replace(made[0], capacity=made[0].total)
    monkeypatch.setattr(plan_commands, "plan_run", lambda *a: made[0])
    status, out, _ = plan(capsys, *arguments)
    assert status == 1 and "DOES NOT FIT" in out and "No compiler for cpu:8" in out


@pytest.mark.parametrize("changes", [{}, {"adapter_bottleneck": 3}, {"lora_rank": 4}, {"train_norms": False},
                                     {"kind": "dataset"}], ids=str)
def test_what_is_planned_is_what_trains(changes):
    """The leaves that training really starts from, of every kind of expert."""
    config = TrainConfig(model_dir="x", task="t", initial_checkpoint_path="b", train_steps=1, **changes)
    base = Base("b", weights.drawn(T5Network(tiny.NETWORK)), tiny.NETWORK, "sha256:0")
    form = "full" if config.kind == "dataset" else "adapter"
    _, overlay, frozen = initial_overlay(base, form, adapter=config.adapter(), train_norms=config.train_norms,
                                         seed=0)
    planned = split_leaves(config, tiny.NETWORK)
    assert trees.first_difference(planned[0], overlay) is None
    assert trees.first_difference(planned[1], frozen) is None


def _products(network):
    """Multiplications a row, by hand: every kernel on its side's tokens, attention left out."""
    flat = trees.flatten(T5Network(network).abstract_params())
    tokens = {path: 16 if path.startswith("encoder") or "decoder_attention/key" in path
              or "decoder_attention/value" in path else 8 for path in flat if path.endswith("/kernel")}
    return sum(count * int(np.prod(flat[path].shape)) for path, count in tokens.items())


@pytest.mark.parametrize(("arguments", "message"), [
    (["--gin_file", "experts/prompt.gin"], "A plan needs chips"),
    (["--topology", "v9:4", "--gin_file", "experts/prompt.gin"], "Unknown chip 'v9'"),
    (["--topology", "cpu:8", "--gin_file", "experts/prompt_stack.gin"], "A plan is of one expert's step"),
    (["--topology", "cpu:8", "--gin_file", "experts/prompt.gin", "--gin.MESH_DATA=3"], "Batch size does not"),
    (["--topology", "cpu:8", "--gin_file", "experts/prompt.gin", "--gin.MESH_DATA=16"], "Mesh is larger"),
    (["--topology", "cpu:8", "--gin_file", "experts/prompt.gin", "--gin.MESH_EXPERTS=2"], "splits nothing")])
def test_what_cannot_be_planned_is_an_input_error(capsys, arguments, message):
    status, _, err = plan(capsys, *arguments)
    assert status == 2 and message in err


def test_a_plan_without_dimensions_says_where_they_come_from(capsys):
    status = main.main(["train", "--plan", "--topology", "cpu:8", "--gin_file", "experts/prompt.gin"])
    assert status == 2 and "gin/models/xl.gin" in capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_of_a_study_adds_up(capsys):
    status = main.main([
        "study", "--plan", "--topology", "cpu:2", "--json", "--gin_file",
        str(HELPERS / "tiny_study.gin")])
    found = json.loads(capsys.readouterr().out)
    assert status == 0 and len(found["plans"]) == 3
    for stage, one in zip(found["stages"][:3], found["plans"], strict=True):
        hours = one["steps"] * one["step_seconds"][1] * one["num_chips"] / 3600
        assert stage["chip_hours"][1] == pytest.approx(stage["runs"] * hours)
    assert found["chip_hours"][0] == pytest.approx(sum(stage["chip_hours"][0] for stage in found["stages"]))
    prompts = found["stages"][0]["runs"]
    assert found["disk"]["prompt experts"] == 4 * prompts * found["plans"][0]["trained"]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "topology"), SCALE)
def test_the_real_sizes_fit_the_real_chips_and_send_what_they_must(file, topology):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: no compiler for TPUs (pip install libtpu==0.0.51, 205 MB)")
    config_lib.parse([str(GIN / "scale" / f"{file}.gin")],
                     ["MODEL_DIR='run'", "INITIAL_CHECKPOINT_PATH='base'", "TASK='task'"])
    config = config_lib.build("train")
    found = plan_run(config, config.network, chips.parse(topology))
    assert found.compiled_for == "tpu" and found.num_chips == 16
    assert found.parameters > (11e9 if "xxl" in file else 2.8e9)
    assert found.total < found.capacity
    assert 0.8 < found.asked_ratio < 1.2
    # On these slices the compiler sums split gradients by all-reduces, whatever the program says.
    assert found.ratio < (1.5 if found.cut_all_reduce else 1.2)
    assert (found.cut_all_reduce > 0) == ("dataset" in file)


@pytest.mark.slow
@pytest.mark.parametrize("experts", [16, 64])
def test_experts_of_a_real_size_send_what_they_must(experts):
    """All-to-alls of the rows, and the gradients of what is whole on every chip."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: no compiler for TPUs (pip install libtpu==0.0.51, 205 MB)")
    config_lib.parse([str(GIN / "scale" / "sparse_dataset_v5e16.gin")],
                     ["MODEL_DIR='run'", "INITIAL_CHECKPOINT_PATH='base'", "TASK='task'",
                      f"NUM_EXPERTS={experts}"])
    config = config_lib.build("train")
    found = plan_run(config, config.network, chips.parse("v5e:4x4"))
    kernels = 24 * 2 * 768 * 3072
    assert found.parameters - found.active == (experts - 1) * kernels
    assert found.total < found.capacity
    assert 0.95 < found.ratio < 1.2
    assert found.collectives["all-to-all"]["count"] == 24 * 6 and "all-gather" not in found.collectives


def decoder_config(*files: str):
    config_lib.parse([str(GIN / file) for file in files],
                     ["MODEL_DIR='run'", "INITIAL_CHECKPOINT_PATH='base'", "TASK='task'",
                      "train.network=@DecoderConfig()"])
    return config_lib.build("train")


def test_a_plan_of_a_decoder_counts_its_real_leaves_and_compiles_a_small_one(capsys):
    """FSDP over eight simulated devices: a row sends prompt and target through the layers once."""
    for files, norms in (([LLAMA], 0), (["experts/prompt.gin", "models/llama_1b.gin"], (2 * 16 + 1) * 2048)):
        config = decoder_config(*files)
        overlay, frozen = split_leaves(config, config.network)
        assert trees.count(frozen) == LLAMA_PARAMETERS - norms
        assert norms or trees.count(overlay) == LLAMA_UPDATES

    small = {"VOCAB_SIZE": 128, "DecoderConfig.emb_dim": 64, "DecoderConfig.num_heads": 8,
             "DecoderConfig.num_kv_heads": 2, "DecoderConfig.head_dim": 8, "DecoderConfig.mlp_dim": 128,
             "DecoderConfig.num_layers": 2, "DecoderConfig.pad_id": 0, "DecoderConfig.eos_id": 1,
             "DecoderConfig.bos_id": 2, "SCAN_LAYERS": True, "BATCH_SIZE": 16,
             "TASK_FEATURE_LENGTHS": {"inputs": 16, "targets": 8}}
    flags = [f"--gin.{name}={value}" for name, value in small.items()]
    files = [f"--gin_file={name}.gin" for name in ("experts/dataset", "models/llama_1b", "sharding/fsdp")]
    status = main.main(["train", "--plan", "--json", "--topology", "cpu:8", *files, *flags])
    found = json.loads(capsys.readouterr().out)
    config = config_lib.build("train")
    params = network_of(config.network).abstract_params()
    leaves = trees.flatten(params)
    assert status == 0 and found["parameters"] == found["trained"] == trees.count(params)
    assert found["memory"]["overlay"] == 4 * found["trained"] // 8  # every leaf has an axis of the width
    products = sum(leaf.size for path, leaf in leaves.items() if path.endswith(("/kernel", "/embedding")))
    assert 0.9 < found["flops"] / (3 * 2 * 16 * 24 * products) < 1.2
    assert 0.5 < found["ratio"] < 3 and found["needed"]


@pytest.mark.slow
def test_the_real_sizes_of_a_decoder_fit_chips_of_tpu_and_send_what_they_must():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: no compiler for TPUs (pip install libtpu==0.0.51, 205 MB)")
    config = decoder_config(LLAMA)
    found = plan_run(config, config.network, chips.parse("v5e:2x2"))
    assert found.compiled_for == "tpu" and found.num_chips == 4
    assert (found.parameters, found.trained) == (LLAMA_PARAMETERS + LLAMA_UPDATES, LLAMA_UPDATES)
    assert found.total < found.capacity
    # All tokens through the network, back to the layers' inputs, and through the layers once more.
    tokens = 16 * (256 + 128)
    assert 0.9 < found.flops / (2 * tokens * (3 * LLAMA_PARAMETERS - 128256 * 2048)) < 1.3
    assert 0.8 < found.asked_ratio < 1.2
