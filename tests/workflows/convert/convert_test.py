"""`elm convert`: models and experts there and back, reports, verification, what is refused."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import hf_folders
import jax
import numpy as np
import pytest
import safetensors.torch
import tiny_study as tiny
import torch
import transformers

from elm_jax.cli import main
from elm_jax.errors import InputError, RunError
from elm_jax.experts import hf_adapters, weight_sources
from elm_jax.experts.base import load_base
from elm_jax.experts.overlay import Expert, load_expert, resolve, save_expert, write_expert
from elm_jax.formats import detect
from elm_jax.models.adapters.kind import is_adapter_leaf
from elm_jax.models.t5 import hf_names
from elm_jax.models.t5.network import T5Network, is_norm_leaf
from elm_jax.runtime import staging, trees
from elm_jax.workflows.choices import parse_size
from elm_jax.workflows.convert import convert_model as converting
from elm_jax.workflows.convert import verify
from elm_jax.workflows.convert.convert_model import ConvertConfig, convert
from elm_jax.workflows.merge.in_memory import merge


def run(capsys, *words):
    status = main.main(["convert", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def hf_model(folder):
    """transformers' model of a folder, in float32."""
    return transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def tokens(size):
    """Inputs i32[3, 12] of unequal lengths and decoder inputs i32[3, 5] behind the start token."""
    draw = np.random.default_rng(3)
    inputs = draw.integers(2, size, (3, 12)).astype(np.int32)
    inputs[1, 7:] = inputs[2, 1:] = 0
    return inputs, np.pad(draw.integers(2, size, (3, 4)), ((0, 0), (1, 0))).astype(np.int32)


def torch_logits(model, rows):
    inputs, decoder_inputs = tokens(rows)
    with torch.no_grad():
        return model(input_ids=torch.tensor(inputs).long(), attention_mask=torch.tensor(inputs > 0).long(),
                     decoder_input_ids=torch.tensor(decoder_inputs).long()).logits.numpy()


compiled_logits = jax.jit(T5Network.logits, static_argnums=0)


def our_logits(network, params):
    inputs, decoder_inputs = tokens(network.config.vocab_size)
    return np.asarray(compiled_logits(
        network, params, {"encoder_input_tokens": inputs, "decoder_input_tokens": decoder_inputs}))


@pytest.fixture(scope="module")
def exported(world, tmp_path_factory):
    """The tiny base as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("exported") / "base"
    convert(ConvertConfig(world.base.path, "elm", str(folder), "hf", max_shard_bytes=60_000))
    return folder


def test_there_and_back_on_the_command_line(capsys, tmp_path):
    hf_folders.publish(hf_folders.build("t5_1_1", torch.bfloat16), "t5_1_1", tmp_path / "t5")
    status, out, err = run(capsys, "--from", "hf", "--to", "elm", tmp_path / "t5", tmp_path / "elm",
                           "--verify", "--json")
    report = json.loads(out)
    assert status == 0 and report["verified"]["largest_difference"] < 1e-4, err
    assert report["verified"]["source_by"].startswith("transformers ")
    assert report["verified"]["target_by"] == "elm_jax"
    assert json.loads((tmp_path / "elm" / "conversion_report.json").read_text()) == report
    status, out, err = run(capsys, "--from", "elm", "--to", "hf", tmp_path / "elm", tmp_path / "back",
                           "--verify", "--max_shard_size", "20KB")
    assert status == 0, err
    assert "elm_jax against transformers" in out and out.splitlines()[-1] == str(tmp_path / "back")
    hf_folders.assert_same_bits(hf_folders.stored(tmp_path / "t5"), hf_folders.stored(tmp_path / "back"))
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2


def test_the_report_lists_every_leaf(world, exported):
    report = json.loads((exported / "conversion_report.json").read_text())
    stored = hf_folders.stored(exported)
    leaves = {leaf["leaf"]: leaf for leaf in report["leaves"]}
    assert set(leaves) == set(trees.flatten(world.base.params))
    assert {leaf["target"] for leaf in leaves.values()} == set(stored)
    for path, leaf in leaves.items():
        assert leaf["source"] == path
        assert leaf["dtype"] == leaf["source_dtype"] == "float32" and leaf["shape"] == list(
            trees.flatten(world.base.params)[path].shape)
        turned = list(stored[leaf["target"]].shape)[::-1 if leaf["transposed"] else 1]
        assert turned == leaf["shape"]
    assert leaves["encoder/layers_0/mlp/wo/kernel"]["transposed"]
    assert not leaves["token_embedder/embedding"]["transposed"]
    assert report["num_parameters"] == trees.count(world.base.params) == report["num_bytes"] / 4
    assert report["not_written"] == [] and report["source"]["kind"] == "elm"


def test_a_base_leaves_with_its_vocabulary_and_comes_back(world, exported):
    base = load_base(exported)
    assert base.fingerprint == world.base.fingerprint and base.config == world.base.config
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    text = "The coach of the team left after the match. <extra_id_7>"
    assert tokenizer(text).input_ids == [*world.base.vocabulary.encode(text), 1]
    difference = torch_logits(hf_model(exported), 1152) - our_logits(T5Network(base.config), base.params)
    assert np.abs(difference).max() < 1e-4


def test_a_dataset_expert_leaves_as_a_whole_model(capsys, world, tmp_path):
    """From the run folder, its base found by the card."""
    status, out, err = run(capsys, "--from", "elm", "--to", "hf", world.folder / "dataset", tmp_path / "de",
                           "--verify", "--json")
    assert status == 0 and json.loads(out)["verified"]["target_by"].startswith("transformers"), err
    network, params = resolve(world.base, world.dataset)
    assert np.abs(torch_logits(hf_model(tmp_path / "de"), 1152) - our_logits(network, params)).max() < 1e-4
    assert load_base(tmp_path / "de").fingerprint == trees.fingerprint(params) != world.base.fingerprint
    assert (tmp_path / "de" / "spiece.model").exists()


def test_a_head_that_was_tied_and_differs_now_is_said_to_be_untied(world, tmp_path):
    """transformers 5 ties the head of every fresh T5; older versions tie it again if the config says so."""
    model = hf_folders.build("t5_1_1_tied")
    model.config.scale_decoder_outputs = False
    model.lm_head.weight = model.shared.weight
    model.save_pretrained(tmp_path / "base")
    base = load_base(tmp_path / "base")
    head = 1.5 * base.params["decoder"]["logits_dense"]["kernel"]
    changed = trees.merge(base.params, {"decoder": {"logits_dense": {"kernel": head}}})
    card = dataclasses.replace(world.dataset.card, base=base.reference(), network=base.config.to_dict())
    for overlay, tied in ((changed, False), (base.params, True)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        save_expert(tmp_path / "expert", Expert(card, overlay))
        convert(ConvertConfig(str(tmp_path / "expert"), "elm", str(tmp_path / "out"), "hf",
                              base=str(tmp_path / "base"), verify=True))
        values = json.loads((tmp_path / "out" / "config.json").read_text())
        assert values["tie_word_embeddings"] is tied and values["scale_decoder_outputs"] is False
        assert ("lm_head.weight" in hf_folders.stored(tmp_path / "out")) is not tied


def test_verification_reads_what_the_config_says_of_the_head(monkeypatch, tmp_path):
    """transformers 5 mends a wrong flag as it reads: what it computes is no proof of what the file says."""
    hf_folders.publish(hf_folders.build("t5_1_1"), "t5_1_1", tmp_path / "t5")
    right = hf_names.config_to_hf
    monkeypatch.setattr(hf_names, "config_to_hf", lambda *given: {
        **right(*given), "tie_word_embeddings": True, "scale_decoder_outputs": False})
    monkeypatch.setattr(hf_names, "says_tied", lambda values: False)
    with pytest.raises(RunError, match="tie_word_embeddings true, and a head of its own"):
        convert(ConvertConfig(tmp_path / "t5", "hf", tmp_path / "out", "hf", verify=True))
    assert sorted(os.listdir(tmp_path)) == ["out.unverified", "t5"]


def test_a_merged_dataset_expert_leaves_as_a_whole_model(world, tmp_path):
    other = tiny.make_expert(world.base, tmp_path / "x", task="mini_topic", kind="dataset", random_seed=1,
                             expert_id="other", prepared_dir=str(world.folder / "prepared"))
    merged = merge([world.dataset, other], output=tmp_path / "merged")
    for kind in ("hf", "elm"):
        convert(ConvertConfig(str(tmp_path / "merged"), "elm", str(tmp_path / kind), kind,
                              base=world.base.path))
    assert load_base(tmp_path / "hf").fingerprint == trees.fingerprint(resolve(world.base, merged)[1])
    again = load_expert(tmp_path / "elm")  # from elm to elm an expert stays an expert
    assert again.card == merged.card
    assert trees.fingerprint(again.overlay) == trees.fingerprint(merged.overlay)


def test_a_dataset_expert_gets_another_name(capsys, world, tmp_path):
    words = ("--from", "elm", "--to", "elm", "--id", "mine", "--verify")
    status, _, err = run(capsys, *words, world.folder / "dataset", tmp_path / "named")
    assert status == 0, err
    named = load_expert(tmp_path / "named")
    assert (named.card.id, named.card.tasks) == ("mine", world.dataset.card.tasks)
    assert trees.fingerprint(named.overlay) == trees.fingerprint(world.dataset.overlay)
    status, _, err = run(capsys, *words[:4], "--dtype", "bfloat16", world.folder / "dataset", tmp_path / "x")
    assert status == 2 and "float32" in err and not (tmp_path / "x").exists()


@pytest.mark.parametrize("expert", ["topic", "dataset"])
def test_two_processes_do_not_write_one_expert(world, tmp_path, expert):
    """While one writes, a second conversion to the same name is refused, and the first one ends well."""
    config = ConvertConfig(str(world.folder / expert), "elm", str(tmp_path / "x"), "elm")
    with staging.staged(tmp_path / "x") as target:
        card = world.topic if expert == "topic" else world.dataset
        write_expert(target, card)
        with pytest.raises(InputError, match="Another process is writing"):
            convert(config)
    assert load_expert(tmp_path / "x").card.id == card.card.id


@pytest.mark.parametrize("norms", [True, False])
def test_a_prompt_expert_leaves_with_its_adapters_and_comes_back_equal(world, tmp_path, norms):
    expert, folder = world.topic, world.folder / "topic" / "expert"
    if not norms:
        expert = tiny.make_expert(world.base, tmp_path / "x", train_norms=False,
                                  prepared_dir=str(world.folder / "prepared"))
        folder = tmp_path / "x" / "expert"
    report = convert(ConvertConfig(str(folder), "elm", str(tmp_path / "hf"), "hf", base=world.base.path,
                                   verify=True))
    assert report["verified"]["largest_difference"] < 1e-4 and report["source"]["expert"] == expert.card.id
    model, base = load_base(tmp_path / "hf"), trees.flatten(world.base.params)
    overlay = trees.flatten(expert.overlay)
    for path, leaf in trees.flatten(model.params).items():
        wanted = overlay[path] if norms and is_norm_leaf(path) else base[path]
        np.testing.assert_array_equal(leaf, wanted)
    names = set(safetensors.torch.load_file(tmp_path / "hf" / "adapters.safetensors"))
    assert len(names) == 16 and "decoder.block.0.layer.2.adapter.up.bias" in names
    hf_model(tmp_path / "hf")  # transformers takes the folder as a T5
    convert(ConvertConfig(str(tmp_path / "hf"), "hf", str(tmp_path / "back"), "elm"))
    back = load_expert(tmp_path / "back")
    assert back.card == expert.card
    assert trees.fingerprint(back.overlay) == trees.fingerprint(expert.overlay)
    report = json.loads((tmp_path / "back" / "conversion_report.json").read_text())
    assert len(report["leaves"]) == len(overlay) and report["not_written"] == []


class OriginalAdapter(torch.nn.Module):
    """Adapter of the first implementation: two Linears with biases, gelu in tanh form, and the residual."""

    def __init__(self, size, width):
        super().__init__()
        self.down_sampler, self.up_sampler = torch.nn.Linear(size, width), torch.nn.Linear(width, size)

    def forward(self, x):
        return x + self.up_sampler(torch.nn.functional.gelu(self.down_sampler(x), approximate="tanh"))


def with_original_adapters(model, folder, width=4):
    """Hooks such adapters into transformers' T5 and saves what the first implementation would."""
    torch.manual_seed(3)
    saved = {}
    for name, module in model.named_modules():
        kind = name.rsplit(".", 1)[-1]
        if kind not in ("SelfAttention", "DenseReluDense"):
            continue
        adapter = OriginalAdapter(model.config.d_model, width)
        module.register_forward_hook(
            lambda _, __, out, adapter=adapter:
            (adapter(out[0]), *out[1:]) if isinstance(out, tuple) else adapter(out))
        place = name.rsplit(".", 1)[0]
        saved |= {f"{place}.adapter_controller.adapters.cosmos_qa.{key}": weight
                  for key, weight in adapter.named_parameters()}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer_norm" in name:
                weight.mul_(1 + 0.1 * torch.randn_like(weight))
                saved[name] = weight
    folder.mkdir(parents=True)
    for name, weight in saved.items():
        torch.save(weight, folder / f"{name}.pt")
    return saved


@pytest.fixture
def first_implementation(exported, tmp_path):
    """(run folder of the first implementation, transformers' model that computes the same)."""
    model = hf_model(exported)
    with_original_adapters(model, tmp_path / "run" / "adapter_params")
    return tmp_path / "run", model


def test_the_first_implementations_adapters_come_in(capsys, world, exported, first_implementation, tmp_path):
    folder, model = first_implementation
    status, out, err = run(capsys, "--from", "hf", "--to", "elm", folder, tmp_path / "expert", "--base",
                           exported, "--json")
    assert status == 0, err
    expert = load_expert(tmp_path / "expert")
    assert (expert.card.id, expert.card.kind, expert.card.tasks) == ("cosmos_qa", "prompt", ("cosmos_qa",))
    # The same model has one fingerprint, so the expert stands on this program's own base too.
    network, params = resolve(world.base, expert)
    assert np.abs(torch_logits(model, 1152) - our_logits(network, params)).max() < 1e-4
    assert np.abs(our_logits(T5Network(world.base.config), world.base.params)
                  - our_logits(network, params)).max() > 0.1, "the adapters must matter"
    places = {leaf["leaf"]: leaf for leaf in json.loads(out)["leaves"]}
    down = places["encoder/layers_0/mlp_adapter/down/kernel"]
    assert down["transposed"] and down["source"] == (
        "encoder.block.0.layer.1.adapter_controller.adapters.cosmos_qa.down_sampler.weight.pt")


def test_adapters_without_norms_come_in_too(world, first_implementation, tmp_path):
    folder, _ = first_implementation
    for path in (folder / "adapter_params").glob("*layer_norm*"):
        path.unlink()
    convert(ConvertConfig(str(folder / "adapter_params"), "hf", str(tmp_path / "expert"), "elm",
                          base=world.base.path))
    assert all(is_adapter_leaf(path) for path in trees.flatten(load_expert(tmp_path / "expert").overlay))


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda folder: next(folder.glob("*.up_sampler.bias.pt")).unlink(), r"missing \(1\): \S*up_sampler.bias"),
    (lambda folder: next(folder.glob("*final_layer_norm*")).unlink(), r"missing \(1\): \S*final_layer_norm"),
    (lambda folder: torch.save(torch.ones(16), folder / "decoder.block.0.layer.0.adapter_controller."
                               "post_layer_norm.weight.pt"), r"unexpected \(1\): \S*post_layer_norm"),
    (lambda folder: torch.save(torch.ones(3), next(folder.glob("*up_sampler.bias.pt"))),
     r"\[3\] instead of \[16\]"),
    (lambda folder: next(folder.glob("*down_sampler.bias.pt")).write_bytes(b"PK\3\4"),
     "truncated or damaged"),
    (lambda folder: torch.save({"a": 1}, next(folder.glob("*down_sampler.bias.pt"))), "else than one tensor"),
    (lambda folder: torch.save(torch.ones(4), folder / "encoder.block.0.layer.0.adapter_controller.adapters."
                               "imdb.down_sampler.bias.pt"), "one task(.|\n)*cosmos_qa, imdb"),
])
def test_folders_of_the_first_implementation_that_do_not_fit(
        world, first_implementation, tmp_path, spoil, words):
    folder, _ = first_implementation
    spoil(folder / "adapter_params")
    with pytest.raises(InputError, match=words):
        convert(ConvertConfig(str(folder), "hf", str(tmp_path / "expert"), "elm", base=world.base.path))
    assert not (tmp_path / "expert").exists()


def test_a_cast_is_torchs_and_the_config_says_so(tmp_path):
    model = hf_folders.build("flan_t5")
    hf_folders.publish(model, "flan_t5", tmp_path / "t5")
    report = convert(ConvertConfig(str(tmp_path / "t5"), "hf", str(tmp_path / "half"), "hf", dtype="bfloat16",
                                   verify=True))
    wanted = {name: tensor.to(torch.bfloat16) for name, tensor in hf_folders.stored(tmp_path / "t5").items()}
    hf_folders.assert_same_bits(wanted, hf_folders.stored(tmp_path / "half"))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {(leaf["source_dtype"], leaf["dtype"]) for leaf in report["leaves"]} == {("float32", "bfloat16")}
    assert report["verified"]["largest_difference"] < 1e-4 and report["cast_to"] == "bfloat16"


def test_verification_sees_a_wrong_weight(capsys, monkeypatch, tmp_path):
    """Two projections exchanged: all names and shapes fit, and the model is another one."""
    hf_folders.publish(hf_folders.build("t5_1_1"), "t5_1_1", tmp_path / "t5")
    right = converting.write

    def wrong(source, config):
        tensors = source.model.tensors
        swap = {"encoder/layers_0/attention/query/kernel": "encoder/layers_0/attention/key/kernel"}
        read = type(tensors).read
        monkeypatch.setattr(type(tensors), "read", lambda self, path, index=None: read(
            self, swap.get(path, path), index))
        return right(source, config)

    monkeypatch.setattr(converting, "write", wrong)
    status, _, err = run(capsys, "--from", "hf", "--to", "elm", tmp_path / "t5", tmp_path / "elm", "--verify")
    assert status == 1 and "do not compute the same" in err and "logits that differ by" in err
    assert sorted(os.listdir(tmp_path)) == ["elm.unverified", "t5"], "it does not look finished"


def with_value(folder, value):
    """The folder with one weight of another value; returns the leaf's name."""
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    tensors = hf_folders.stored(folder)
    tensors[name][3, 5] = value
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return "encoder/layers_1/mlp/wo/kernel"


def test_values_that_the_target_would_not_hold_are_refused(capsys, tmp_path):
    """T5s are known for large values in wo: infinity is never written, and neither is NaN."""
    hf_folders.publish(hf_folders.build("t5_1_1"), "t5_1_1", tmp_path / "t5")
    leaf = with_value(tmp_path / "t5", 1e5)
    status, _, err = run(capsys, "--from", "hf", "--to", "hf", tmp_path / "t5", tmp_path / "out",
                         "--dtype", "float16")
    assert status == 2 and f"too large for float16\n  where: leaf {leaf} of {tmp_path / 't5'}" in err
    with pytest.raises(InputError, match="too large for float16"):
        convert(ConvertConfig(tmp_path / "t5", "hf", tmp_path / "out", "t5x", dtype="float16"))
    with_value(tmp_path / "t5", float("nan"))
    for refused in (lambda: load_base(tmp_path / "t5"),
                    lambda: convert(ConvertConfig(tmp_path / "t5", "hf", tmp_path / "out", "elm"))):
        with pytest.raises(InputError, match=f"not finite\n  where: leaf {leaf} of {tmp_path / 't5'}"):
            refused()
    assert os.listdir(tmp_path) == ["t5"]


def test_experts_that_are_not_finite_are_refused(world, tmp_path):
    flat = {path: np.array(leaf) for path, leaf in trees.flatten(world.topic.overlay).items()}
    path = next(path for path in flat if path.endswith("up/kernel"))
    flat[path][0, 0] = np.inf
    expert = dataclasses.replace(world.topic, overlay=trees.unflatten(flat))
    save_expert(tmp_path / "bad", expert)
    for refused in (lambda: load_expert(tmp_path / "bad"), lambda: convert(ConvertConfig(
            str(tmp_path / "bad"), "elm", str(tmp_path / "out"), "hf", base=world.base.path))):
        with pytest.raises(InputError, match=f"not finite(.|\n)*leaf {path} of {tmp_path / 'bad'}"):
            refused()
    assert os.listdir(tmp_path) == ["bad"]


def test_verification_of_logits_that_are_not_finite(capsys, tmp_path):
    """The verdict is an error and a folder set aside, not a traceback about JSON."""
    model = hf_folders.build("t5_1_1")
    with torch.no_grad():
        model.lm_head.weight[3] = 3e38
    hf_folders.publish(model, "t5_1_1", tmp_path / "t5")
    words = ("--from", "hf", "--to", "elm", tmp_path / "t5", tmp_path / "elm", "--verify")
    status, _, err = run(capsys, *words)
    assert status == 1 and "do not compute the same" in err and "differ by nan" in err
    assert sorted(os.listdir(tmp_path)) == ["elm.unverified", "t5"]
    report = json.loads((tmp_path / "elm.unverified" / converting.REPORT_FILE).read_text())
    assert report["verified"]["largest_difference"] == "nan"
    status, _, err = run(capsys, *words)
    assert status == 2 and "elm.unverified" in err, "what stands there is not removed without a word"


def test_an_interrupted_verification_leaves_nothing_that_looks_verified(exported, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(ConvertConfig(str(exported), "hf", str(tmp_path / "elm"), "elm", verify=True))
    assert os.listdir(tmp_path) == ["elm.unverified"]


def test_shards_of_an_index_without_metadata_are_verified(tmp_path):
    """Which transformers cannot read: a valid index, as other programs write it."""
    hf_folders.publish(hf_folders.build("t5_1_1"), "t5_1_1", tmp_path / "t5", shard_size="40KB")
    index = tmp_path / "t5" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    report = convert(ConvertConfig(tmp_path / "t5", "hf", tmp_path / "out", "hf", verify=True,
                                   max_shard_bytes=40_000))
    assert report["verified"]["source_by"] == report["verified"]["target_by"] != "elm_jax"
    assert "metadata" not in json.loads(index.read_text())


def test_float32_error_is_asked_for_only_where_it_may_explain_a_difference():
    wanted = np.full((1, 2, 3), 10.0, np.float32)
    asked = []

    def judged(difference, error):
        return verify.judge(wanted, wanted + np.float32(difference), ("a", "b"),
                            lambda: asked.append(difference) or error)

    for difference, error, tolerance in (
            (1e-4, 1.0, 2e-4), (5e-4, 1e-4, 8e-4), (5e-4, 1e-6, 2e-4), (0.05, 1.0, 0.1), (0.5, 1.0, 2e-4)):
        found = judged(difference, error)
        assert found["tolerance"] == pytest.approx(tolerance) and found["target_by"] == "b"
        assert found["largest_difference"] == pytest.approx(difference, rel=0.1)
    assert asked == [5e-4, 5e-4, 0.05]


@pytest.mark.slow
def test_float32_is_judged_by_its_own_error(monkeypatch, tmp_path):
    """Large weights, where right conversions differ by more than a fixed share; a wrong one still fails."""
    model = hf_folders.build("t5_1_1")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "wi_" in name or "wo" in name or ".v." in name:
                weight.mul_(40.0)
    hf_folders.publish(model, "t5_1_1", tmp_path / "t5")
    monkeypatch.setattr(verify, "TOLERANCE", 0.0)
    monkeypatch.setattr(verify, "RELATIVE_TOLERANCE", 0.0)
    found = convert(ConvertConfig(tmp_path / "t5", "hf", tmp_path / "out", "elm", verify=True))["verified"]
    assert 0 < found["float32_error"] < 1e-3 * found["largest_logit"]
    assert found["tolerance"] == verify.ROUNDINGS * found["float32_error"]
    with_value(tmp_path / "t5", 0.5)
    opened = weight_sources.open_source("hf", tmp_path / "t5")
    wrong = verify.compare(opened, "hf", str(tmp_path / "out"), "elm")
    assert wrong["largest_difference"] > wrong["tolerance"]


@pytest.mark.parametrize("difference", [float("nan"), float("inf"), 2e-3])
def test_verification_is_relative_to_large_logits_and_not_to_infinite_ones(difference, tmp_path):
    found = {"largest_difference": 1e-3, "tolerance": 1e-5 * 150, "largest_logit": 150.0}
    converting.check_verified(found, tmp_path / "x")
    (tmp_path / "x").mkdir()
    limit = {"tolerance": float("inf")} if difference != 2e-3 else {}
    with pytest.raises(RunError, match="logits that differ"):
        converting.check_verified(found | {"largest_difference": difference, **limit}, tmp_path / "x")


def test_correct_conversions_with_large_logits_are_verified(capsys, tmp_path):
    """An untied head a thousand times as large: float32 then differs by more than 1e-4 in every program."""
    model = hf_folders.build("t5_1_1")
    with torch.no_grad():
        model.lm_head.weight *= 1000
    hf_folders.publish(model, "t5_1_1", tmp_path / "t5")
    status, _, err = run(capsys, "--from", "hf", "--to", "elm", tmp_path / "t5", tmp_path / "elm", "--verify")
    verified = json.loads((tmp_path / "elm" / converting.REPORT_FILE).read_text())["verified"]
    assert status == 0, err
    assert verified["largest_logit"] > 500 and 1e-4 < verified["largest_difference"] < verified["tolerance"]


def test_without_transformers_our_own_network_verifies(tmp_path, monkeypatch):
    hf_folders.publish(hf_folders.build("t5_1_0"), "t5_1_0", tmp_path / "t5")
    monkeypatch.setitem(sys.modules, "transformers", None)
    report = convert(ConvertConfig(str(tmp_path / "t5"), "hf", str(tmp_path / "elm"), "elm", verify=True))
    assert report["verified"]["source_by"] == report["verified"]["target_by"] == "elm_jax"


def test_training_starts_from_a_hugging_face_folder(world, exported, tmp_path):
    """The same expert, whichever way the base was given; merged and exported it is a T5 again."""
    ours = tiny.make_expert(world.base, tmp_path / "a", task="mini_topic", kind="dataset", expert_id="de",
                            prepared_dir=str(world.folder / "prepared"))
    theirs = tiny.make_expert(load_base(exported), tmp_path / "b", task="mini_topic", kind="dataset",
                              expert_id="de", prepared_dir=str(world.folder / "prepared"))
    assert trees.fingerprint(ours.overlay) == trees.fingerprint(theirs.overlay)
    assert theirs.card.base["path"] == str(exported)
    convert(ConvertConfig(str(tmp_path / "b"), "elm", str(tmp_path / "hf"), "hf", verify=True))


@pytest.mark.parametrize(("layout", "scanned"), [("orbax", False), ("orbax", True), ("zarr", True)])
def test_by_way_of_t5x(capsys, tmp_path, layout, scanned):
    """hf -> t5x -> elm -> t5x -> hf, in T5X's layouts: every bit comes back."""
    hf_folders.publish(hf_folders.build("t5_1_1", torch.bfloat16), "t5_1_1", tmp_path / "t5")
    form = ["--layout", layout, "--scanned" if scanned else "--no-scanned"]
    for number, words in enumerate([["hf", "t5x", *form, "--step", 7], ["t5x", "elm"], ["elm", "t5x"],
                                    ["t5x", "hf", "--verify"]]):
        source = tmp_path / ("t5" if number == 0 else str(number - 1))
        status, out, err = run(capsys, "--from", words[0], "--to", words[1], source, tmp_path / str(number),
                               *words[2:])
        assert status == 0, err
    assert "elm_jax against transformers" in out
    assert (tmp_path / "2" / "checkpoint_7").exists(), "the step travels along"
    assert detect.open_model(tmp_path / "2").facts["t5x"]["scanned"] is scanned, "so do stacked layers"
    report = json.loads((tmp_path / "1" / "conversion_report.json").read_text())
    source = {leaf["leaf"]: leaf["source"] for leaf in report["leaves"]}["encoder/layers_1/mlp/wo/kernel"]
    assert source.endswith("[layer 1]") is scanned and source.startswith("target.encoder.")
    hf_folders.assert_same_bits(hf_folders.stored(tmp_path / "t5"), hf_folders.stored(tmp_path / "3"))


def test_a_scanned_checkpoint_given_as_unscanned(capsys, exported, tmp_path):
    convert(ConvertConfig(str(exported), "hf", str(tmp_path / "t5x"), "t5x", scanned=True))
    status, _, err = run(capsys, "--from", "t5x", "--to", "elm", tmp_path / "t5x", tmp_path / "x",
                         "--no-scanned")
    assert status == 2 and "scanned" in err and not (tmp_path / "x").exists()
    assert load_base(tmp_path / "t5x").fingerprint == load_base(exported).fingerprint


def test_a_prompt_expert_through_t5x(world, tmp_path):
    """A T5X checkpoint that holds adapters comes in as a prompt expert on its base."""
    convert(ConvertConfig(str(world.folder / "topic"), "elm", str(tmp_path / "t5x"), "t5x"))
    convert(ConvertConfig(str(tmp_path / "t5x"), "t5x", str(tmp_path / "back"), "elm", base=world.base.path))
    back = load_expert(tmp_path / "back")
    assert trees.fingerprint(back.overlay) == trees.fingerprint(world.topic.overlay)
    assert back.card.network == world.topic.card.network and back.card.kind == "prompt"
    refuse("another base(.|\n)*22 of 22 frozen leaves", tmp_path / "t5x", "t5x", tmp_path / "x", "elm",
           base=world.other_base.path)
    refuse("base is needed", tmp_path / "t5x", "t5x", tmp_path / "x", "elm")


# What is refused, before anything is written.


def refuse(words, source, source_kind, target, target_kind, **more):
    with pytest.raises(InputError, match=words):
        convert(ConvertConfig(str(source), source_kind, str(target), target_kind, **more))


def test_a_target_that_is_taken(capsys, exported, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    status, _, err = run(capsys, "--from", "hf", "--to", "elm", exported, tmp_path)
    assert status == 2 and "target exists already" in err and os.listdir(tmp_path) == ["mine.txt"]
    refuse("target exists already", exported, "hf", tmp_path / "mine.txt", "elm")


def test_a_source_of_another_kind(world, exported, tmp_path):
    refuse(r"source is no elm folder(.|\n)*got: hf(.|\n)*--from hf", exported, "elm", tmp_path / "x", "hf")
    refuse(r"source is no hf folder(.|\n)*got: elm", world.base.path, "hf", tmp_path / "x", "hf")
    refuse("There is no model here", tmp_path / "no" / "where", "hf", tmp_path / "x", "elm")


def test_experts_of_another_base(world, exported, tmp_path):
    refuse("belongs to another base", world.folder / "topic", "elm", tmp_path / "x", "hf",
           base=world.other_base.path)
    convert(ConvertConfig(str(world.folder / "topic"), "elm", str(tmp_path / "hf"), "hf"))
    refuse("belongs to another base", tmp_path / "hf", "hf", tmp_path / "x", "elm",
           base=world.other_base.path)


def test_an_expert_whose_base_has_moved(world, tmp_path):
    card = {**world.topic.card.to_dict(), "base": {**world.topic.card.base, "path": str(tmp_path / "gone")}}
    card.pop("schema_version")
    moved = type(world.topic)(type(world.topic.card)(**card), world.topic.overlay)
    save_expert(tmp_path / "expert", moved)
    refuse(r"base is needed(.|\n)*gone(.|\n)*--base", tmp_path / "expert", "elm", tmp_path / "x", "hf")


def test_a_dataset_expert_whose_weights_have_changed(world, tmp_path):
    folder = hf_folders.copy_of(world.folder / "dataset" / "expert", tmp_path / "expert")
    text = (folder / "expert.json").read_text().replace('"overlay_fingerprint": "sha256:',
                                                        '"overlay_fingerprint": "sha256:0')
    (folder / "expert.json").write_text(text)
    refuse("not those that were written", folder, "elm", tmp_path / "x", "hf")


def flip_a_bit(folder):
    """The lowest bit of a number in the middle of the largest file: no other program would notice."""
    largest = max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)
    contents = bytearray(largest.read_bytes())
    contents[len(contents) // 8 * 4] ^= 1
    largest.write_bytes(contents)
    return folder


@pytest.mark.parametrize(("kind", "more"), [
    ("hf", {}), ("hf", {"dtype": "bfloat16"}), ("elm", {}), ("t5x", {}), ("t5x", {"scanned": True})])
def test_a_base_with_one_bit_flipped_is_not_converted(exported, tmp_path, kind, more):
    """Its chunks have no checksums of their own: the fingerprint has to see it, before the name is given."""
    convert(ConvertConfig(str(exported), "hf", str(tmp_path / "base"), "elm"))
    convert(ConvertConfig(str(tmp_path / "base"), "elm", str(tmp_path / "whole"), kind, **more))
    flip_a_bit(tmp_path / "base")
    refuse("base's weights are not those that were written", tmp_path / "base", "elm", tmp_path / "x", kind,
           **more)
    assert sorted(os.listdir(tmp_path)) == ["base", "whole"]


def test_a_bit_flipped_is_status_2_on_the_command_line(capsys, exported, tmp_path):
    convert(ConvertConfig(str(exported), "hf", str(tmp_path / "base"), "elm"))
    flip_a_bit(tmp_path / "base")
    status, out, err = run(capsys, "--from", "elm", "--to", "hf", tmp_path / "base", tmp_path / "x",
                           "--verify")
    assert status == 2 and out == "" and "not those that were written" in err and "Traceback" not in err
    assert os.listdir(tmp_path) == ["base"]


@pytest.mark.parametrize(("expert", "kind"), [("topic", "hf"), ("topic", "t5x"), ("dataset", "hf")])
def test_an_expert_on_a_base_with_one_bit_flipped(world, exported, tmp_path, expert, kind):
    """The base's description alone makes no base: a dataset expert needs its vocabulary only, and leaves."""
    convert(ConvertConfig(str(exported), "hf", str(tmp_path / "base"), "elm"))
    convert(ConvertConfig(str(world.folder / expert), "elm", str(tmp_path / "whole"), kind,
                          base=str(tmp_path / "base")))
    flip_a_bit(tmp_path / "base")
    if expert == "topic":
        refuse("weights are not those", world.folder / expert, "elm", tmp_path / "x", kind,
               base=str(tmp_path / "base"))
        assert sorted(os.listdir(tmp_path)) == ["base", "whole"]
    else:
        convert(ConvertConfig(str(world.folder / expert), "elm", str(tmp_path / "x"), kind,
                              base=str(tmp_path / "base")))


def test_verification_sees_a_bit_flipped_in_the_target(exported, tmp_path):
    convert(ConvertConfig(str(exported), "hf", str(tmp_path / "base"), "elm"))
    source = weight_sources.open_source("hf", exported)
    flip_a_bit(tmp_path / "base")
    with pytest.raises(InputError, match="base's weights are not those that were written"):
        verify.compare(source, "hf", str(tmp_path / "base"), "elm")


def test_adapters_that_are_damaged_or_of_another_kind(world, tmp_path):
    convert(ConvertConfig(str(world.folder / "topic"), "elm", str(tmp_path / "hf"), "hf"))
    whole = safetensors.torch.load_file(tmp_path / "hf" / "adapters.safetensors")
    name = "encoder.block.0.layer.1.adapter.down.weight"
    for change, words in (({name: None}, rf"missing \(1\): {name}"),
                          ({name: torch.ones(4, 3)}, r"\[4, 3\] instead of \[4, 16\]"),
                          ({"x": torch.ones(1)}, r"unexpected \(1\): x")):
        changed = {key: tensor for key, tensor in (whole | change).items() if tensor is not None}
        safetensors.torch.save_file(changed, tmp_path / "hf" / "adapters.safetensors")
        refuse(words, tmp_path / "hf", "hf", tmp_path / "x", "elm")
    (tmp_path / "hf" / "adapters.safetensors").unlink()
    refuse("adapters' weights are missing", tmp_path / "hf", "hf", tmp_path / "x", "elm")
    (tmp_path / "hf" / hf_adapters.CONFIG_FILE).write_text('{"peft_type": "LORA"}')
    refuse("form that this program does not read", tmp_path / "hf", "hf", tmp_path / "x", "elm")


def test_a_vocabulary_for_a_model_without_one(world, tmp_path):
    hf_folders.publish(hf_folders.build("t5_1_1"), "t5_1_1", tmp_path / "t5")
    refuse("not that of the embedding", tmp_path / "t5", "hf", tmp_path / "x", "elm",
           vocabulary=world.base.vocabulary_path)
    refuse("no vocabulary here", tmp_path / "t5", "hf", tmp_path / "x", "elm", vocabulary="/no/file")
    opened = weight_sources.open_source("elm", world.base.path, vocabulary=world.base.vocabulary_path)
    assert opened.model.vocabulary == world.base.vocabulary.contents


def lying_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"shape":[24]', b'"shape":[25]', 1))


def code_inside(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"shared.weight": torch.ones(2), "x": os.system}, folder / "pytorch_model.bin")


def other_vocabulary(folder, world):
    hf_folders.add_vocabulary(folder, world.base.vocabulary.contents)


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda folder, _: os.truncate(folder / "model.safetensors", 30_000), "truncated"),
    (lambda folder, _: lying_header(folder), "header is wrong"),
    (lambda folder, _: code_inside(folder), "may be code"),
    (lambda folder, _: (folder / "config.json").write_text(json.dumps(
        hf_folders.PUBLISHED["t5_1_1"] | {"d_ff": 48})), "do not fit the config"),
    (other_vocabulary, "vocabulary is not that of the embedding"),
    (lambda folder, _: (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors"),
     "no weights that this program reads"),
])
def test_wrong_folders_are_status_2_and_nothing_is_written(capsys, world, tmp_path, spoil, words):
    hf_folders.publish(hf_folders.build("t5_1_1"), "t5_1_1", tmp_path / "t5")
    spoil(tmp_path / "t5", world)
    for kind in ("elm", "t5x", "hf"):
        status, out, err = run(capsys, "--from", "hf", "--to", kind, tmp_path / "t5", tmp_path / "x")
        assert status == 2 and words in err and out == "" and "Traceback" not in err
    assert os.listdir(tmp_path) == ["t5"]


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from elm_jax.cli import main as cli
sys.exit(cli.main(["convert", "--from", "hf", "--to", sys.argv[2], sys.argv[1], sys.argv[3]]))
"""


@pytest.mark.parametrize("kind", ["elm", *(
    pytest.param(kind, marks=pytest.mark.slow) for kind in ("hf", "t5x"))])
def test_a_full_disk_is_status_1_and_leaves_nothing(tmp_path, kind):
    hf_folders.publish(hf_folders.build("t5_1_1"), "t5_1_1", tmp_path / "t5")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path / "t5"), kind, str(tmp_path / "x")],
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("elm convert: Cannot write"), done.stderr
    assert "Traceback" not in done.stderr and os.listdir(tmp_path) == ["t5"]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5e9), ("500mb", 5e8), ("1.5 KB", 1500), ("42", 42)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("words", [["--max_shard_size", "5 apples"], ["--max_shard_size", "0"]])
def test_wrong_sizes_are_status_2(capsys, exported, tmp_path, words):
    status, _, err = run(capsys, "--from", "hf", "--to", "hf", exported, tmp_path / "x", *words)
    assert status == 2 and ("no size" in err or "out of range" in err) and not (tmp_path / "x").exists()
