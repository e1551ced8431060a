"""GGUF files against the package ``gguf``, against Hugging Face folders, and damaged on purpose."""

import contextlib
import pathlib
import shutil

import gguf
import gguf_files
import hf_decoders
import numpy as np
import pytest
import torch
import transformers

from elm_jax.errors import InputError
from elm_jax.experts.base import load_base
from elm_jax.formats import detect
from elm_jax.formats.gguf import gguf_header, gguf_models
from elm_jax.formats.model import Model
from elm_jax.runtime import trees
from elm_jax.workflows.convert import convert_model

NOT_IN_A_FILE = {"pad_id", "eos_id", "extra_eos_ids", "bos_id", "dropout_rate"}
CASES = [name for name in hf_decoders.CASES if name != "mistral"]  # architecture llama, as its name says
MIXED = {"token_embd": "Q8_0", "blk.0.attn_q": "Q4_0", "blk.0.attn_k": "Q4_1", "blk.0.attn_v": "Q5_0",
         "blk.0.attn_output": "Q5_1", "blk.0.ffn_gate": "Q4_K", "blk.0.ffn_up": "Q5_K",
         "blk.0.ffn_down": "Q6_K",
         "blk.1.attn_q": "BF16", "blk.1.attn_k": "F16", "blk.1.attn_v": "F32", "blk.1.attn_output": "Q6_K",
         "blk.1.ffn_gate": "Q8_0", "blk.1.ffn_up": "Q4_K", "blk.1.ffn_down": "Q5_K"}
"""Types of a file's matrices: each type that is read."""
SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where the half-precision scales of a block lie, of types that the package only reads."""


def leaves_of(model: Model) -> dict[str, np.ndarray]:
    return {path: model.tensors.read(path) for path in model.tensors.specs}


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_read_as_its_hugging_face_folder(name, tmp_path):
    theirs = hf_decoders.model(name)
    theirs.save_pretrained(tmp_path / "hf")
    file = gguf_files.write_gguf(tmp_path / "model.gguf", theirs)
    found, wanted = detect.open_model(file), detect.open_model(tmp_path / "hf")
    assert found.kind == "gguf"
    ours, other = (model.config.to_dict() for model in (found, wanted))
    for key in ours.keys() - NOT_IN_A_FILE:
        assert ours[key] == other[key], key
    leaves, expected = leaves_of(found), leaves_of(wanted)
    assert leaves.keys() == expected.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=64, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def packed(array: np.ndarray, kind: str, draw: np.random.Generator) -> np.ndarray:
    """A matrix in the bytes of a type; random ones of the types that the package cannot write."""
    quantisation = gguf.GGMLQuantizationType[kind]
    if kind not in SCALES:
        return gguf.quantize(array, quantisation)
    block, size = gguf.GGML_QUANT_SIZES[quantisation]
    blocks = draw.integers(0, 256, (array.size // block, size), np.uint8)
    for place in SCALES[kind]:
        scales = draw.uniform(0.01, 0.1, (len(blocks), 1)).astype(np.float16)
        blocks[:, place:place + 2] = scales.view(np.uint8)
    return blocks.reshape(len(array), -1)


@pytest.fixture(scope="module")
def mixed(llama, tmp_path_factory) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """A file of all types, and what the package's dequantiser reads from it, by llama.cpp's names."""
    path = tmp_path_factory.mktemp("mixed") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {**gguf_files.metadata(llama.config, "llama"), **gguf_files.byte_level(64)}.items():
        gguf_files.add_value(writer, key, value)
    draw, wanted = np.random.default_rng(0), {}
    for name, array in gguf_files.stored_tensors(llama, "llama").items():
        kind = MIXED.get(name.removesuffix(".weight"), "F32")
        contents = packed(np.ascontiguousarray(array), kind, draw)
        quantisation = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, contents, raw_dtype=quantisation)
        wanted[name] = gguf.dequantize(contents, quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, wanted


def test_all_types_are_dequantised_as_the_package_and_transformers_do(mixed):
    path, wanted = mixed
    assert set(MIXED.values()) == set(gguf_header.QUANTISATIONS)
    model = gguf_models.open_gguf(path)
    for leaf, origin in model.tensors.origins.items():
        if not origin.name.endswith(("attn_q.weight", "attn_k.weight")):
            expected = wanted[origin.name].T if origin.transposed else wanted[origin.name]
            np.testing.assert_array_equal(model.tensors.read(leaf).astype(np.float32), expected, err_msg=leaf)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    for number in range(2):
        for ours, word in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
            leaf = model.tensors.read(f"decoder/layers_{number}/attention/{ours}/kernel").astype(np.float32)
            expected = theirs.get_parameter(f"model.layers.{number}.self_attn.{word}_proj.weight")
            np.testing.assert_array_equal(leaf.T, expected.detach().float().numpy())


def test_plain_types_keep_their_dtype_and_parts_are_parts_of_the_whole(mixed):
    tensors = gguf_models.open_gguf(mixed[0]).tensors
    assert [tensors.specs[f"decoder/layers_1/attention/{name}/kernel"].dtype
            for name in ("query", "key", "value", "out")] == ["bfloat16", "float16", "float32", "float32"]
    for path in ("decoder/layers_0/attention/query/kernel", "decoder/layers_1/attention/key/kernel",
                 "decoder/layers_0/mlp/wo/kernel", "token_embedder/embedding"):
        whole = tensors.read(path)
        for index in ((slice(3, 40), slice(70, 101)), (slice(None), slice(17, 18)),
                      (slice(0, 0), slice(None))):
            np.testing.assert_array_equal(tensors.read(path, index), whole[index])
    norm = "decoder/final_norm/scale"
    np.testing.assert_array_equal(tensors.read(norm, (slice(5, 9),)), tensors.read(norm)[5:9])


def test_a_file_becomes_a_base(mixed, tmp_path):
    report = convert_model.convert(convert_model.ConvertConfig(
        source=mixed[0], source_kind="gguf", target=tmp_path / "base", target_kind="elm"))
    assert report["num_leaves"] == 20 and "1 BF16" in " ".join(report["notes"])
    made, direct = load_base(tmp_path / "base"), load_base(mixed[0])
    assert made.config == direct.config and made.fingerprint == direct.fingerprint
    assert made.vocabulary.encode("the") == direct.vocabulary.encode("the")
    assert (made.vocabulary.pad_id, made.vocabulary.eos_id, made.config.pad_id) == (2, 2, 2)
    flat = trees.flatten(direct.params)
    assert all(np.array_equal(leaf, flat[path]) for path, leaf in trees.flatten(made.params).items())


def test_special_ids_and_the_template_travel(llama, tmp_path):
    path = gguf_files.write_gguf(tmp_path / "model.gguf", llama, values={
        "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.eot_token_id": 4, "tokenizer.chat_template": "{{ messages }}",
        "general.license": "mit"})
    model = gguf_models.open_gguf(tmp_path)  # the folder that holds it
    assert (model.config.pad_id, model.config.bos_id, model.config.extra_eos_ids) == (0, 1, (4,))
    assert model.facts["gguf"] == {"license": "mit"} and model.where == str(path)
    kept = model.facts["hf"]["tokenizer"]["tokenizer_config.json"]
    assert kept["chat_template"] == "{{ messages }}" and kept["bos_token"] == "<|bos|>"


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_tokenizer_goes_on_to_hugging_face(adds_bos, llama, tmp_path):
    """By way of a base: transformers gives the same ids, and BOS where prompts get one."""
    file = gguf_files.write_gguf(tmp_path / "model.gguf", llama, values={
        "tokenizer.ggml.add_bos_token": adds_bos, "tokenizer.chat_template": "{{ messages }}"})
    for source, kind, target, form in ((file, "gguf", "base", "elm"), (tmp_path / "base", "elm", "hf", "hf")):
        convert_model.convert(convert_model.ConvertConfig(
            source=source, source_kind=kind, target=tmp_path / target, target_kind=form))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours, back = load_base(file), detect.open_model(tmp_path / "hf")
    bos = [1] if adds_bos else []
    assert theirs("!!5<|end|>")["input_ids"] == [*bos, *ours.vocabulary.encode("!!5<|end|>")]
    assert theirs.chat_template == "{{ messages }}" and theirs.eos_token_id == 2
    assert back.config.bos_id == ours.config.bos_id == (1 if adds_bos else None)
    assert back.facts["hf"]["tokenizer"]["tokenizer_config.json"]["chat_template"] == "{{ messages }}"


def test_a_head_that_is_the_embedding_is_left_out(llama, tmp_path):
    table = llama.get_input_embeddings().weight.detach().numpy()
    path = gguf_files.write_gguf(tmp_path / "model.gguf", llama, tensors={"output.weight": table})
    model = gguf_models.open_gguf(path)
    assert model.config.tied_head and "head/kernel" not in model.tensors.specs
    assert "copy of token_embd.weight" in model.notes[0]


LLAMA_3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ones = np.ones
FAULTS = {
    "architecture": ({"general.architecture": "mamba"}, {}, r"Unknown architecture(?s:.*)mamba"),
    "unknown key": ({"llama.attention.sliding_window": 8}, {}, r"does not do(?s:.*)sliding_window 8"),
    "experts": ({"llama.expert_count": 4}, {}, r"does not do(?s:.*)expert_count 4"),
    "no dimension": ({"llama.block_count": None}, {}, r"dimension(?s:.*)block_count None"),
    "part rotary": ({"llama.rope.dimension_count": 32}, {}, r"Sizes(?s:.*)dimension_count 32"),
    "scaling": ({"llama.rope.scaling.type": "yarn"}, {}, r"scaling of rotary(?s:.*)'yarn'"),
    "two scalings": ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
                     {"rope_freqs.weight": gguf_files.llama3_factors(64, LLAMA_3)}, "two scalings"),
    "missing": ({}, {"blk.1.ffn_up.weight": None}, r"missing \(1\): blk.1.ffn_up.weight"),
    "no embedding": ({}, {"token_embd.weight": None}, "no token_embd.weight"),
    "unexpected": ({}, {"blk.0.attn_output.bias": ones(256)}, r"unexpected \(1\): blk.0.attn_output.bias"),
    "shape": ({}, {"output_norm.weight": ones(128)}, r"output_norm.weight: \[128\] instead of \[256\]"),
    "no tokenizer": ({"tokenizer.ggml.model": None}, {}, "holds no tokenizer(?s:.*)no tokenizer.ggml.model"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, {}, "holds no tokenizer(?s:.*)no tokenizer.ggml.tokens"),
    "other tokenizer": ({"tokenizer.ggml.model": "rwkv"}, {}, "Unknown kind of tokenizer(?s:.*)rwkv"),
    "other rule": ({"tokenizer.ggml.pre": "tekken"}, {}, "Unknown rule(?s:.*)tekken"),
    "no EOS": ({"tokenizer.ggml.eos_token_id": None}, {}, "names no token that ends a text"),
    "EOS outside": ({"tokenizer.ggml.eos_token_id": 99}, {}, "does not have(?s:.*)eos_token_id 99"),
    "EOS behind all": ({"tokenizer.ggml.add_eos_token": True}, {}, "puts EOS behind every text"),
    "few types": ({"tokenizer.ggml.token_type": [1, 1]}, {}, "64 tokens, 2 types"),
    "merges": ({"tokenizer.ggml.merges": ["x yz"]}, {}, "merges are damaged(?s:.*)'x yz'"),
    "adapter": ({"general.type": "adapter"}, {}, "no whole model(?s:.*)'adapter'"),
    "split": ({"split.count": 3}, {}, "a part of a model(?s:.*)llama-gguf-split"),
    "alignment": ({"general.alignment": 0}, {}, "alignment is wrong"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_clear_error(name, llama, tmp_path):
    values, tensors, message = FAULTS[name]
    path = tmp_path / "model.gguf"
    gguf_files.write_gguf(path, llama, quantisation="F16", values=values, tensors=tensors)
    with pytest.raises(InputError, match=message) as caught:
        gguf_models.open_gguf(path)
    assert "model.gguf" in str(caught.value)


def test_unknown_quantisations_are_named(llama, tmp_path):
    path = gguf_files.write_gguf(tmp_path / "model.gguf", llama, quantisation="TQ1_0")
    with pytest.raises(InputError, match=r"not read(?s:.*)token_embd.weight: TQ1_0(?s:.*) more"):
        gguf_models.open_gguf(path)


def test_files_that_are_cut_short_or_none(mixed, tmp_path):
    """Wherever a file ends, there is one error; no prefix of it is taken for a model."""
    contents = mixed[0].read_bytes()
    path = tmp_path / "model.gguf"
    draw = np.random.default_rng(0)
    for length in [0, 3, 4, 8, 23, *draw.integers(24, len(contents) - 1, 60), len(contents) - 64]:
        path.write_bytes(contents[:length])
        with pytest.raises(InputError, match=r"cut short|no GGUF"):
            gguf_models.open_gguf(path)
    for start, message in ((b"GGML", "no GGUF"), (b"GGUF\1\0\0\0", "version 1"),
                           (b"GGUF\0\0\0\3", "highest byte")):
        path.write_bytes(start + contents[len(start):])
        with pytest.raises(InputError, match=message):
            gguf_models.open_gguf(path)
    path.write_bytes(contents[:8] + b"\xff" * 16 + contents[24:])  # counts without end
    with pytest.raises(InputError):
        gguf_models.open_gguf(path)


def test_a_folder_must_hold_one_file(mixed, tmp_path):
    for name in "ab":
        shutil.copy(mixed[0], tmp_path / f"{name}.gguf")
    with pytest.raises(InputError, match=r"a.gguf, b.gguf(?s:.*)name the file"):
        detect.open_model(tmp_path)


@pytest.mark.parametrize("value", [3, -1, True, 1e39, "text", "", [], ["a", "b"], np.array([1, 2]),
                                   np.array([0.5]), np.array([])], ids=str)
def test_a_value_of_another_type_never_ends_in_another_error(value, mixed, monkeypatch):
    header = gguf_header.read_header(gguf_models.storage.as_path(mixed[0]))
    for key in [*header.metadata, "split.count", "llama.rope.scaling.type", "llama.rope.scaling.factor",
                "tokenizer.ggml.add_eos_token", "llama.expert_count", "tokenizer.ggml.scores"]:
        changed = gguf_header.Header({**header.metadata, key: value}, header.tensors)
        monkeypatch.setattr(gguf_header, "read_header", lambda path, changed=changed: changed)
        with contextlib.suppress(InputError):
            gguf_models.open_gguf(mixed[0])


def test_random_damage_never_ends_in_another_error(mixed, tmp_path):
    contents = bytearray(mixed[0].read_bytes())
    end = gguf_header.read_header(gguf_models.storage.as_path(mixed[0])).tensors["output_norm.weight"].offset
    draw = np.random.default_rng(1)
    path = tmp_path / "model.gguf"
    for place in draw.integers(0, min(end, len(contents)), 150):
        damaged = bytearray(contents)
        damaged[place] ^= int(draw.integers(1, 256))
        path.write_bytes(damaged)
        with contextlib.suppress(InputError):
            gguf_models.open_gguf(path)
