"""Plans of decoder-only networks: Llama 3.2 1B in small on simulated devices, and whole for chips of TPUs."""

import importlib.util
import json

import pytest
from checkout import ROOT

from elm_jax.cli import gin_config as config_lib
from elm_jax.cli import main
from elm_jax.models.families import network_of
from elm_jax.planning import chips
from elm_jax.runtime import trees
from elm_jax.workflows.plan.step_plan import plan_run, split_leaves

GIN, SCALE = ROOT / "gin", "llama_1b_lora_v5e4.gin"
PARAMETERS = 1_235_814_400
"""As transformers counts those of Llama 3.2 1B."""
UPDATES = 16 * 8 * (2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192))
"""Sixteen layers of low-rank updates, rank 8: queries and outputs, keys and values, three of the MLP."""


def config_of(*bindings: str):
    config_lib.parse([str(GIN / "scale" / SCALE)],
                     ["MODEL_DIR='run'", "INITIAL_CHECKPOINT_PATH='base'", "TASK='task'", *bindings])
    return config_lib.build("train")


def test_a_plan_of_a_decoder_counts_its_real_leaves_and_compiles_a_small_one(capsys):
    """FSDP over eight simulated devices: a row sends prompt and target through the layers once."""
    config = config_of()
    overlay, frozen = split_leaves(config, config.network)
    assert (trees.count(overlay), trees.count(frozen)) == (UPDATES, PARAMETERS)

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
@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_the_real_sizes_of_a_decoder_fit_chips_of_tpu_and_send_what_they_must(kind):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: no compiler for TPUs (pip install libtpu==0.0.51, 205 MB)")
    config = config_of(*(["train.lora_rank=None", "train.lora_alpha=None", "train.lora_targets=None",
                          "train.train_norms=True"] if kind == "prompt" else []))
    found = plan_run(config, config.network, chips.parse("v5e:2x2"))
    assert found.compiled_for == "tpu" and found.num_chips == 4
    assert found.parameters - found.trained == PARAMETERS - (kind == "prompt") * (2 * 16 + 1) * 2048
    assert found.total < found.capacity
    # One pass over all tokens, and one back to the inputs, and the layers' once more.
    tokens = 16 * (256 + 128)
    assert 0.9 < found.flops / (2 * tokens * (3 * PARAMETERS - 128256 * 2048)) < 1.3
    assert 0.8 < found.asked_ratio < 1.2
