"""Hugging Face folders of decoders: there and back unchanged, tokenizers with them, and faults."""

import json

import hf_decoders
import numpy as np
import pytest
import safetensors.numpy
import small_decoder
from tokenizers import Tokenizer, processors

from elm_jax.errors import InputError
from elm_jax.experts.base import load_base
from elm_jax.formats import detect
from elm_jax.models.decoder import hf_names
from elm_jax.workflows.convert.convert_model import ConvertConfig, convert


def written(folder, name, **changes):
    """A case's folder as transformers writes it, with changes of its config."""
    hf_decoders.model(name).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    return folder


def give_tokenizer(folder, bos):
    """A tokenizer of 61 tokens, which puts `bos` in front of texts, or names it only."""
    values = json.loads(small_decoder.tokenizer())
    values["model"]["vocab"] = {name: number for name, number in values["model"]["vocab"].items()
                                if number < hf_decoders.VOCAB_SIZE}
    tokenizer = Tokenizer.from_str(json.dumps(values))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="t $A", pair="t $A $B", special_tokens=[("t", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "t", "chat_template": "{{ 1 }}"}))


@pytest.mark.parametrize("name", ["llama 3", "gpt2"])
def test_a_model_survives_the_way_there_and_back(name, tmp_path):
    source = written(tmp_path / "hf", name)
    if name == "llama 3":
        give_tokenizer(source, bos=True)
    report = convert(ConvertConfig(source, "hf", tmp_path / "elm", "elm", verify=True))
    assert report["verified"]["source_by"].startswith("transformers")
    assert report["verified"]["largest_difference"] < 1e-4
    base = load_base(tmp_path / "elm")
    report = convert(ConvertConfig(tmp_path / "elm", "elm", tmp_path / "back", "hf", verify=True))
    assert report["verified"]["target_by"].startswith("transformers")
    left, right = (safetensors.numpy.load_file(folder / "model.safetensors")
                   for folder in (source, tmp_path / "back"))
    assert left.keys() - right.keys() <= {"lm_head.weight"} and not right.keys() - left.keys()
    assert all(np.array_equal(left[key], right[key]) for key in right)
    kept = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back")]
    assert kept[0] == kept[1]
    if name == "llama 3":
        assert (base.config.bos_id, base.config.extra_eos_ids, base.vocabulary.eos_id) == (1, (5,), 2)
        assert base.vocabulary.encode("tea") == Tokenizer.from_file(
            str(source / "tokenizer.json")).encode("tea", add_special_tokens=False).ids
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert json.loads((tmp_path / "back" / file).read_text()) == json.loads(
                (source / file).read_text())


def test_a_name_alone_is_no_token_in_front(tmp_path):
    folder = written(tmp_path / "hf", "llama, grouped, tied")
    give_tokenizer(folder, bos=False)
    assert detect.open_model(folder).config.bos_id is None
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
    assert detect.open_model(folder).config.bos_id == 1


@pytest.mark.parametrize(("name", "change", "word"), [
    ("qwen2", {"hidden_act": "gelu"}, "activation"),
    ("qwen2", {"model_type": "rwkv"}, "model_type 'rwkv'"),
    ("qwen2", {"num_hidden_layers": 3}, "missing"),
    ("qwen2", {"intermediate_size": 41}, "wrong shape"),
    ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ("qwen2", {"num_attention_heads": 0}, "num_attention_heads"),
    ("llama 3", {"attention_bias": True}, "attention_bias True"),
    ("llama 3", {"tie_word_embeddings": True}, "differs"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
])
def test_a_folder_that_this_network_is_not_is_refused(name, change, word, tmp_path):
    folder = written(tmp_path / "hf", name, **change)
    with pytest.raises(InputError, match=word):
        detect.open_model(folder)


def test_older_settings_say_the_same():
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 2, "model_type": "llama", "eos_token_id": 2}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}}
    old = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 7.0}
    assert hf_names.config_from_hf({**sizes, **new}) == hf_names.config_from_hf({**sizes, **old})
    mistral = {**sizes, "model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 48}
    assert hf_names.config_from_hf(mistral).max_length == 48


@pytest.mark.parametrize("name", [*hf_decoders.CASES, *hf_decoders.SPARSE_CASES])
def test_a_config_is_written_as_it_is_read(name):
    values = hf_decoders.model(name).config.to_dict()
    config = hf_names.config_from_hf(values)
    assert hf_names.config_to_hf(config, values) == values
    assert hf_names.config_from_hf(hf_names.config_to_hf(config)) == config
