"""Hugging Face folders of sparse networks: there and back to the bit, logits and losses as there, faults."""

import dataclasses
import json

import hf_decoders
import hf_folders
import hf_switch
import jax
import numpy as np
import pytest
import safetensors.numpy

from elm_jax.errors import InputError
from elm_jax.experts.base import load_base
from elm_jax.formats import detect
from elm_jax.formats.hf import hf_models
from elm_jax.models import families
from elm_jax.models.decoder import hf_names as decoder_names
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.models.losses import LossConfig
from elm_jax.models.t5 import hf_names as t5_names
from elm_jax.models.t5.network import T5Network, shift_right
from elm_jax.runtime import trees
from elm_jax.workflows.convert import verify
from elm_jax.workflows.convert.convert_model import ConvertConfig, convert

SWITCH, DECODERS = list(hf_switch.CASES), list(hf_decoders.SPARSE_CASES)


def written(folder, name, **changes):
    """A case's folder as transformers writes it, with changes of its config."""
    if name in hf_switch.CASES:
        return hf_switch.written(folder, name, **changes)
    hf_decoders.model(name).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    return folder


def rewritten(folder, change):
    """Gives a folder other tensors: `change` takes and returns a dictionary of them."""
    tensors = change(safetensors.numpy.load_file(folder / "model.safetensors"))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def rows(vocab_size, count=6, length=17, target=12):
    """Inputs that end in padding, and decoder inputs."""
    draw = np.random.default_rng(5)
    inputs = hf_folders.tokens(draw, count, length, vocab_size)
    targets = draw.integers(2, vocab_size, (count, target)).astype(np.int32)
    return inputs, np.asarray(shift_right(targets))


@pytest.mark.parametrize("name", [*SWITCH[:3], "mixtral", "olmoe", "qwen3 moe, dense layers"])
def test_there_and_back_keeps_every_bit_and_the_config(name, tmp_path):
    source = written(tmp_path / "hf", name)
    report = convert(ConvertConfig(source, "hf", tmp_path / "elm", "elm", verify=True))
    assert report["verified"]["source_by"].startswith("transformers")
    experts = [leaf for leaf in report["leaves"] if "/expert/" in leaf["leaf"]]
    assert experts and all("*" in leaf["source"] and len(leaf["shape"]) == 3 for leaf in experts)
    report = convert(ConvertConfig(tmp_path / "elm", "elm", tmp_path / "back", "hf", verify=True))
    assert report["verified"]["target_by"].startswith("transformers")
    assert report["verified"]["largest_difference"] < 1e-4 < report["verified"]["largest_logit"]
    convert(ConvertConfig(tmp_path / "back", "hf", tmp_path / "again", "elm"))
    assert load_base(tmp_path / "again").fingerprint == load_base(tmp_path / "elm").fingerprint
    left, right = (hf_folders.stored(folder) for folder in (source, tmp_path / "back"))
    copies = {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert left.keys() - right.keys() <= copies and not right.keys() - left.keys()
    assert all(np.array_equal(left[key], right[key]) for key in right)
    kept = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back")]
    assert kept[0] == kept[1]


def test_an_own_config_and_shards_make_the_same_model(tmp_path):
    """Without the config that the model came with, in bfloat16 and in many files."""
    for name in ("tight", "olmoe"):
        model = detect.open_model(written(tmp_path / name, name))
        bare = dataclasses.replace(model, facts={})
        hf_models.write_model_folder(tmp_path / f"{name} again", bare, max_shard_bytes=20_000)
        again = detect.open_model(tmp_path / f"{name} again")
        assert again.config == dataclasses.replace(model.config, dropout_rate=again.config.dropout_rate)
        for path in model.tensors.specs:
            assert np.array_equal(model.tensors.read(path), again.tensors.read(path))
        convert(ConvertConfig(tmp_path / f"{name} again", "hf", tmp_path / f"{name} half", "hf",
                              dtype="bfloat16", verify=True))


@pytest.mark.parametrize("name", SWITCH)
def test_switch_computes_what_transformers_computes(name, tmp_path):
    base = load_base(hf_switch.written(tmp_path, name))
    inputs, decoder_inputs = rows(hf_switch.VOCAB_SIZE)
    dropped = hf_switch.drops(name, inputs, decoder_inputs)
    assert (dropped > 20) == (name in ("tight", "unlike steps", "one sparse layer a stack"))
    wanted = hf_switch.outputs(name, inputs, decoder_inputs).logits.numpy()
    batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": decoder_inputs}
    found = np.asarray(jax.jit(T5Network(base.config).logits)(base.params, batch))
    assert np.abs(found - wanted).max() < 2e-5 * max(1.0, np.abs(wanted).max())
    free = dataclasses.replace(base.config, sparse=dataclasses.replace(base.config.sparse, capacity=None))
    without = np.asarray(jax.jit(T5Network(free).logits)(base.params, batch))
    assert (np.abs(without - wanted).max() > 1e-2) == (dropped > 20), "the comparison must see drops"


def test_both_losses_of_routers_are_those_of_transformers(tmp_path):
    """One row and one sparse layer a stack: transformers pools rows and layers in another way."""
    name = "one sparse layer a stack"
    base = load_base(hf_switch.written(tmp_path, name))
    draw = np.random.default_rng(1)
    inputs, targets = (draw.integers(2, hf_switch.VOCAB_SIZE, (1, size)).astype(np.int32)
                       for size in (19, 11))
    decoder_inputs = np.asarray(shift_right(targets))
    theirs = hf_switch.outputs(name, inputs, decoder_inputs, output_router_logits=True)
    batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": decoder_inputs,
             "decoder_target_tokens": targets, "decoder_loss_weights": np.ones(targets.shape, np.float32)}
    settings = LossConfig(balance_loss=1.0, router_z_loss=1.0)
    sums = jax.jit(lambda params: T5Network(base.config).loss(params, batch, settings=settings))(base.params)
    for ours, kind in (("balance_loss", "aux_loss"), ("router_z_loss", "z_loss")):
        both = [float(theirs[f"{stack}_{kind}"]) for stack in ("encoder", "decoder")]
        assert min(both) > 0 and abs(both[0] - both[1]) > 1e-3
        assert float(sums.auxiliary[ours] / sums.weight) == pytest.approx(np.mean(both), rel=1e-5)


def test_gradients_of_switch_are_those_of_transformers(tmp_path):
    """Of the cross-entropy, by the names of the files: experts', routers' and others'."""
    import torch

    name = "one sparse layer a stack"
    base = load_base(hf_switch.written(tmp_path, name))
    inputs, decoder_inputs = rows(hf_switch.VOCAB_SIZE)
    targets = np.concatenate([decoder_inputs[:, 1:], np.full((len(inputs), 1), 3, np.int32)], axis=1)
    model = hf_switch.model(name)
    found = model(input_ids=torch.tensor(inputs).long(), attention_mask=torch.tensor(inputs > 0).long(),
                  decoder_input_ids=torch.tensor(decoder_inputs).long(), labels=torch.tensor(targets).long())
    found.loss.backward()
    theirs = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": decoder_inputs,
             "decoder_target_tokens": targets, "decoder_loss_weights": np.ones(targets.shape, np.float32)}

    def loss(params):
        sums = T5Network(base.config).loss(params, batch)
        return sums.loss / sums.weight

    ours = trees.flatten(jax.jit(jax.grad(loss))(base.params))
    compared = 0
    for each in t5_names.hf_parameters(base.config):
        if theirs[each.name] is None:  # an expert that no token has
            continue
        leaf = np.asarray(ours[each.paths[0]])
        leaf = leaf if each.expert is None else leaf[each.expert]
        wanted = theirs[each.name].numpy()
        np.testing.assert_allclose(leaf.T if each.transposed else leaf, wanted, rtol=0, atol=2e-5)
        compared += each.expert is not None and np.abs(wanted).max() > 1e-4
    assert compared > 4


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def fewer_experts(tensors):
    """Weights of two experts in every layer."""
    left = {key: value for key, value in tensors.items() if not any(
        f"experts.{number}." in key or f"expert_{number}." in key for number in range(2, 9))}
    return {key: value[:2] if key.endswith(("gate.weight", "classifier.weight")) else value
            for key, value in left.items()}


@pytest.mark.parametrize("name", ["tight", "mixtral", "olmoe"])
def test_another_number_of_experts_is_one_clear_error(name, tmp_path):
    folder = written(tmp_path / "hf", name)
    rewritten(folder, fewer_experts)
    count = 3 if name == "tight" else 5
    with pytest.raises(InputError, match=rf"another number of experts[^$]*got: .*experts\.(expert_)?\*\..*: "
                       rf"2 experts[^$]*expected: {count}\b"):
        detect.open_model(folder)


@pytest.mark.parametrize(("name", "gone"), [
    ("tight", "encoder.block.1.layer.1.mlp.experts.expert_1.wo.weight"),
    ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
    ("qwen3 moe", "model.layers.0.mlp.experts.4.gate_proj.weight"),
    ("olmoe", "model.layers.0.mlp.gate.weight")])
def test_a_missing_tensor_of_an_expert_is_named(name, gone, tmp_path):
    folder = written(tmp_path / "hf", name)
    rewritten(folder, without(gone))
    with pytest.raises(InputError, match=rf"missing \(1\): {gone}"):
        detect.open_model(folder)


def test_experts_of_two_dtypes_are_refused(tmp_path):
    folder = written(tmp_path / "hf", "mixtral")
    odd = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    rewritten(folder, lambda tensors: {**tensors, odd: tensors[odd].astype(np.float16)})
    with pytest.raises(InputError, match=r"different dtypes[^$]*experts\.\*\.w2\.weight: float16, float32"):
        detect.open_model(folder)


@pytest.mark.parametrize(("name", "change", "words"), [
    ("mixtral", {"model_type": "qwen2_moe"}, "qwen2_moe', which has an expert that all [^$]*mixtral"),
    ("mixtral", {"model_type": "nllb-moe"}, "nllb-moe[^$]*after dropping[^$]*switch_transformers"),
    ("mixtral", {"model_type": "jamba"}, "jamba'\n[^$]*olmoe"),
    ("mixtral", {"num_experts_per_tok": 6}, "config.json: num_experts_per_tok[^$]*more experts than"),
    ("mixtral", {"sliding_window": 0}, "sliding_window"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
    ("olmoe", {"attention_bias": True}, "attention_bias True"),
    ("olmoe", {"norm_topk_prob": "yes"}, "norm_topk_prob"),
    ("qwen3 moe", {"mlp_only_layers": [0, 1]}, r"equal distances[^$]*sparse layers \[\]"),
    ("qwen3 moe", {"mlp_only_layers": [1]}, "different widths[^$]*40 and 20"),
    ("qwen3 moe", {"mlp_only_layers": "all"}, "mlp_only_layers"),
    ("tight", {"dense_act_fn": "gelu"}, "dense_act_fn"),
    ("tight", {"router_bias": True}, "router_bias True"),
    ("tight", {"router_dtype": "bfloat16"}, "router_dtype 'bfloat16'"),
    ("tight", {"expert_capacity": 0}, "expert_capacity"),
    ("tight", {"encoder_sparse_step": -1}, "encoder_sparse_step"),
    ("tight", {"router_jitter_noise": 2}, "router_jitter_noise"),
])
def test_a_config_that_this_network_is_not_is_refused(name, change, words, tmp_path):
    folder = written(tmp_path / "hf", name, **change)
    with pytest.raises(InputError, match=words):
        detect.open_model(folder)


@pytest.mark.parametrize(("family", "change", "words"), [
    ("t5", {"experts_per_token": 2}, "experts_per_token: 2"),
    ("t5", {"step": 4, "offset": "t5x"}, r"sparse layers of the encoder: \[3\]"),
    ("t5", {"capacity": None, "eval_capacity_factor": 2.0}, "eval_capacity_factor: 2.0"),
    ("t5", {"group_rows": 2}, "group_rows: 2"),
    ("t5", {"normalize_gates": True}, "normalize_gates: True"),
    ("t5", {"dense_sublayer": True}, "dense_sublayer: True"),
    ("decoder", {"normalize_gates": False}, "normalize_gates: False[^$]*Mixtral"),
    ("decoder", {"step": 2}, r"dense layers: \[0\]"),
    ("decoder", {"capacity": 3}, "capacity: 3"),
])
def test_what_hugging_face_has_not_is_refused_by_name(family, change, words, tmp_path):
    case = {"t5": "tight", "decoder": "mixtral"}[family]
    config = detect.open_model(written(tmp_path, case)).config
    other = dataclasses.replace(config, sparse=dataclasses.replace(config.sparse, **change))
    with pytest.raises(InputError, match=words):
        {"t5": t5_names, "decoder": decoder_names}[family].config_to_hf(other)


def test_a_dense_base_s_config_is_no_sparse_network_s(tmp_path):
    """An upcycled network keeps the facts of its dense base's folder."""
    dense = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 24, "d_kv": 5,
             "d_ff": 40, "num_heads": 3, "num_layers": 4, "num_decoder_layers": 2, "vocab_size": 61}
    config = dataclasses.replace(t5_names.config_from_hf(dense), sparse=SparseConfig(3))
    values = t5_names.config_to_hf(config, dense)
    assert values["model_type"] == "switch_transformers" and values["expert_capacity"] == 1 << 20
    again = t5_names.config_from_hf(values)
    assert again.sparse == SparseConfig(3, capacity_factor=None, offset="hf")
    assert dataclasses.replace(again, sparse=None) == dataclasses.replace(config, sparse=None)
    dense = hf_decoders.model("llama, linear scaling").config.to_dict()
    config = dataclasses.replace(decoder_names.config_from_hf(dense), sparse=SparseConfig(
        3, experts_per_token=2, normalize_gates=True, step=1))
    values = decoder_names.config_to_hf(config, dense)
    assert (values["model_type"], values["num_local_experts"]) == ("mixtral", 3)
    again = decoder_names.config_from_hf(values)
    ample = dataclasses.replace(config.sparse, capacity_factor=None)
    assert again == dataclasses.replace(config, sparse=ample)


def test_counts_stand_under_two_names():
    """Qwen3-MoE's is num_experts in published files, and num_local_experts in those of transformers 5.24."""
    values = hf_decoders.model("qwen3 moe").config.to_dict()
    count = values.pop("num_local_experts")
    assert decoder_names.config_from_hf({**values, "num_experts": count}).sparse.num_experts == count == 5
    assert decoder_names.config_from_hf(values).sparse.num_experts == 128


@pytest.mark.parametrize("name", ["tight", "olmoe"])
def test_any_part_of_a_leaf_of_experts(name, tmp_path):
    model = detect.open_model(written(tmp_path, name))
    draw = np.random.default_rng(0)
    for path, spec in model.tensors.specs.items():
        whole = model.tensors.read(path)
        assert whole.shape == spec.shape and whole.flags.c_contiguous
        for _ in range(3 if "/expert/" in path else 0):
            ends = [sorted(draw.integers(0, size + 1, 2)) for size in spec.shape]
            index = tuple(slice(int(start), int(stop)) for start, stop in ends)
            assert np.array_equal(model.tensors.read(path, index), whole[index])


def test_an_older_transformers_is_no_peer_for_switch(monkeypatch, tmp_path):
    config = detect.open_model(hf_switch.written(tmp_path, "tight")).config
    import transformers

    assert verify._transformers(str(tmp_path), config) is not None
    monkeypatch.setattr(transformers, "__version__", "5.17.2")
    assert verify._transformers(str(tmp_path), config) is None
    assert verify._transformers(str(tmp_path), dataclasses.replace(config, sparse=None)) is not None


def test_the_families_list_their_parameters():
    """As PEFT names modules: none of a single expert, which transformers joins."""
    from elm_jax.formats.peft import base_modules

    config = decoder_names.config_from_hf(hf_decoders.model("mixtral").config.to_dict())
    names = [each.name for each in families.hf_parameters_of(config)]
    assert len(set(names)) == len(names) and "model.layers.1.block_sparse_moe.experts.4.w3.weight" in names
    modules = base_modules.modules_of(config)
    assert not any("experts" in name for name in modules.parameters)
    assert {name.rpartition(".")[2] for name in modules.projections} == {
        "q_proj", "k_proj", "v_proj", "o_proj"}
