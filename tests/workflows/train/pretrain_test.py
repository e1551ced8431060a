"""Pretraining on passages: a T5 of gin/models/tiny.gin, and a decoder from nothing to every verb's base."""

import json
import shutil

import numpy as np
import pytest
import small_decoder
from safetensors.numpy import load_file

from elm_jax.cli import gin_config
from elm_jax.cli.main import main
from elm_jax.errors import InputError
from elm_jax.experts.base import load_base
from elm_jax.runtime import trees
from elm_jax.vocabularies import tokenizer_json
from elm_jax.workflows.convert.convert_model import ConvertConfig, convert
from elm_jax.workflows.train.pretrain import make_vocabulary, pretrain

MODELS = ("gpt2", "llama_tiny", "smollm2_135m", "llama_1b")
TINY = ("emb_dim=24", "num_heads=6", "head_dim=4", "mlp_dim=32", "num_layers=1")


def losses(folder, dtype: str) -> np.ndarray:
    """Of 200 steps by the shipped gin files. AdamW at a small rate: a loss that no rounding can toss."""
    gin_config.parse(["gin/runs/pretrain.gin"], [
        f"MODEL_DIR='{folder / dtype}'", f"pretrain.dtype='{dtype}'", "VOCAB_SIZE=1664",
        "PASSAGES=('elm_jax.tasks.embedded:passages',)", "pretrain.vocab_pieces=1500",
        "pretrain.character_coverage=1.0", "TRAIN_STEPS=200", "BATCH_SIZE=8",
        "TASK_FEATURE_LENGTHS={'inputs': 96, 'targets': 64}", "pretrain.chunk_length=64",
        "OptimizerConfig.name='adamw'", "LEARNING_RATE=1e-3", "OptimizerConfig.schedule='constant'",
        "pretrain.log_period=1", "pretrain.tensorboard=False"])
    pretrain(gin_config.build("pretrain"))
    rows = (folder / dtype / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(row)["loss"] for row in rows])


@pytest.mark.slow
def test_bfloat16_activations_of_the_tiny_model_end_within_two_percent(tmp_path):
    wide, narrow = (losses(tmp_path, dtype) for dtype in ("float32", "bfloat16"))
    assert len(narrow) == 200 and np.isfinite(narrow).all()
    assert wide[-20:].mean() < 0.6 * wide[0]  # it learned: a flat loss would agree too
    np.testing.assert_allclose(narrow[-20:].mean(), wide[-20:].mean(), rtol=0.02)
    assert (narrow != wide).any()  # the setting reached the network


def chosen(*files: str, **macros: object):
    gin_config.parse(["gin/runs/pretrain.gin", *(f"gin/models/{name}.gin" for name in files)],
                     ["MODEL_DIR='run'", "PASSAGES=('corpus.txt',)",
                      *(f"{name.replace('__', '.')}={value!r}" for name, value in macros.items())])
    return gin_config.build("pretrain")


def test_a_file_of_sizes_chooses_the_network():
    assert chosen().network == chosen("tiny", VOCAB_SIZE=8192).network
    assert (chosen().chunk_length, chosen().prefix_lm_share) == (128, 0.5)
    for name in MODELS:
        config = chosen(name)
        assert config.network.family == "decoder" and config.chunk_length is config.prefix_lm_share is None
    assert chosen("small").network == chosen(T5Config__emb_dim=512, VOCAB_SIZE=32128, T5Config__num_heads=6,
                                             T5Config__head_dim=64, T5Config__mlp_dim=1024,
                                             T5Config__num_encoder_layers=8,
                                             T5Config__num_decoder_layers=8).network
    for changes in ({"prefix_lm_share": 0.5}, {"chunk_length": 300}):
        with pytest.raises(InputError, match=r"prefix_lm_share|does not fit into a row"):
            chosen("gpt2", **{f"pretrain__{name}": value for name, value in changes.items()})


def test_the_sizes_of_two_networks_are_refused():
    for names in (("tiny", "llama_tiny"), ("llama_tiny", "tiny")):
        with pytest.raises(InputError, match=r"sizes of several networks(.|\n)*T5Config(.|\n)*one file"):
            chosen(*names)


def test_a_decoder_with_special_ids_of_its_own_needs_its_vocabulary():
    with pytest.raises(InputError, match=r"padding = 50256, EOS = 50256(.|\n)*pretrain.vocabulary = 'FILE'"):
        make_vocabulary(chosen("gpt2"), ["a passage"])


def pretrained(folder, *more: str):
    """The base of a Llama type from nothing, in 30 steps on three short passages, by the verb."""
    (folder / "corpus.txt").write_text("the cat sat on the mat\na dog ran after the cat\nthe dog sat\n")
    vocabulary = folder / "given.json"
    vocabulary.write_bytes(tokenizer_json.with_ids(small_decoder.tokenizer(), pad_id=2, eos_id=2))
    words = ["pretrain", "--gin_file", "gin/runs/pretrain.gin", "--gin_file", "gin/models/llama_tiny.gin",
             f"--gin.MODEL_DIR='{folder / 'run'}'", f"--gin.PASSAGES=('{folder / 'corpus.txt'}',)",
             f"--gin.pretrain.vocabulary='{vocabulary}'", "--gin.VOCAB_SIZE=258", "--gin.TRAIN_STEPS=30",
             "--gin.BATCH_SIZE=2", "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 32}",
             "--gin.pretrain.log_period=1", "--gin.pretrain.mesh_data=1", "--gin.pretrain.tensorboard=False",
             "--gin.DecoderConfig.pad_id=2", "--gin.DecoderConfig.eos_id=2",
             "--gin.OptimizerConfig.name='adamw'", "--gin.LEARNING_RATE=1e-2",
             "--gin.OptimizerConfig.warmup_steps=0", *(f"--gin.DecoderConfig.{size}" for size in TINY), *more]
    assert main(words) == 0
    return load_base(folder / "run" / "base")


def test_a_decoder_is_pretrained_from_nothing_and_becomes_a_llama(tmp_path):
    base = pretrained(tmp_path)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(row)["loss"] for row in rows]
    assert len(losses) == 30 and losses[-1] < 0.6 * losses[0] and losses[0] < 1.3 * np.log(258)
    convert(ConvertConfig(base.path, "elm", str(tmp_path / "hf"), "hf"))
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert values["model_type"] == "llama" and values["num_key_value_heads"] == 2
    written, leaves = load_file(tmp_path / "hf" / "model.safetensors"), trees.flatten(base.params)
    np.testing.assert_array_equal(written["model.layers.0.mlp.down_proj.weight"],
                                  leaves["decoder/layers_0/mlp/wo/kernel"].T)


def test_a_killed_pretraining_of_a_decoder_ends_with_the_same_bits(tmp_path):
    period = "--gin.pretrain.checkpoint_period=20"
    base = pretrained(tmp_path, period)
    shutil.rmtree(tmp_path / "run" / "base")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "30")
    assert pretrained(tmp_path, period).fingerprint == base.fingerprint
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 30  # the last ten steps were run again
