"""PEFT's LoRA adapters as experts and back: the logits are PEFT's own, on T5, Llama, Qwen2 and GPT-2."""

import dataclasses
import functools
import json
import shutil
import signal
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.numpy import load_file, save_file

from elm_jax.cli.main import main
from elm_jax.errors import InputError
from elm_jax.experts.base import Base, load_base
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.overlay import Expert, load_expert, resolve, save_expert
from elm_jax.experts.peft_adapters import check_base_name, load_peft
from elm_jax.experts.peft_export import save_peft
from elm_jax.formats.peft import expressions, lora_settings
from elm_jax.formats.peft.base_modules import modules_of
from elm_jax.models import AdapterConfig, families
from elm_jax.models.network import ADAPTER, NORM, TWO_SIDED
from elm_jax.runtime import trees

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SIZES = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
         "pad_token_id": 0, "eos_token_id": 1}
MODELS = {
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=48, n_embd=16, n_layer=2, n_head=4, n_positions=32, n_inner=24, eos_token_id=1)),
}
FAN = {"fan_in_fan_out": True}
CASES = {
    "t5 default": ("t5", {"r": 4, "lora_alpha": 8}),
    "t5 all-linear, rank-stabilised": ("t5", {
        "r": 3, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear",
        "modules_to_save": ["layer_norm", "lm_head"]}),
    "t5 patterns": ("t5", {
        "r": 4, "lora_alpha": 8, "target_modules": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
        "rank_pattern": {"q": 2, "encoder.block.0.layer.0.SelfAttention.v": 8},
        "alpha_pattern": {"wo": 3, r"decoder\..*\.o": 16}, "exclude_modules": ["EncDecAttention.k"]}),
    "llama default": ("llama", {"r": 4, "lora_alpha": 16}),
    "llama regex": ("llama", {"r": 4, "target_modules": r".*\.1\..*\.(q|o|down)_proj"}),
    "llama one layer": ("llama", {
        "r": 2, "target_modules": ["gate_proj", "up_proj"], "layers_to_transform": [1],
        "layers_pattern": "layers", "modules_to_save": ["embed_tokens", "lm_head", "model.norm"]}),
    "tied all-linear": ("tied", {
        "r": 2, "target_modules": "all-linear", "modules_to_save": ["input_layernorm"]}),
    "qwen2 biases of updates": ("qwen2", {"r": 4, "target_modules": ["q_proj", "o_proj"],
                                          "bias": "lora_only"}),
    "gpt2 fused": ("gpt2", {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], **FAN}),
    "gpt2 biases and modules": ("gpt2", {
        "r": 4, "target_modules": "all-linear", "bias": "all", "rank_pattern": {"attn.c_attn": 3},
        "modules_to_save": ["ln_f", "wpe"], **FAN}),
}
SEQ2SEQ = ("t5",)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Bases as transformers writes them, and adapters as PEFT does, none of whose factors is zero."""
    folder = tmp_path_factory.mktemp("peft")
    for number, (name, make) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        model = make()
        for parameter in model.parameters():
            parameter.data = parameter.data.clip(-0.5, 0.5) + 0.1 * torch.randn(parameter.shape)
        model.save_pretrained(folder / name)
    for case, (name, settings) in CASES.items():
        write_adapter(folder, case, name, settings)
    return folder


def write_adapter(folder, case, name, settings, seed=0, kind=peft.LoraConfig):
    """An adapter with random factors; PEFT's logits lie beside it."""
    task = "SEQ_2_SEQ_LM" if name in SEQ2SEQ else "CAUSAL_LM"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(torch_model(folder / name), kind(task_type=task, **settings))
        draw = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
        model.save_pretrained(folder / case)
    np.save(folder / f"{case}.npy", torch_logits(model.eval()))


def torch_model(folder):
    kind = (transformers.AutoModelForSeq2SeqLM if folder.name in SEQ2SEQ
            else transformers.AutoModelForCausalLM)
    return kind.from_pretrained(folder, dtype=torch.float32)


def by_peft(base, adapter):
    """Logits of an adapter that PEFT reads; it must find all tensors and know what to do with them."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(torch_model(base), adapter).eval()
    assert not [str(one.message) for one in told if "key" in str(one.message)]
    return torch_logits(model)


@functools.cache
def rows():
    draw = np.random.default_rng(0)
    return draw.integers(2, 48, (2, 7)).astype(np.int32), draw.integers(2, 48, (2, 5)).astype(np.int32)


def torch_logits(model):
    inputs, targets = (torch.tensor(part).long() for part in rows())
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return model(input_ids=inputs, decoder_input_ids=targets).logits.numpy()
        return model(input_ids=inputs).logits.numpy()


def our_logits(base, expert):
    network, params = resolve(base, expert)
    inputs, targets = rows()
    places = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
    return np.asarray(network.logits(params, (
        {"encoder_input_tokens": inputs, "decoder_input_tokens": targets} if network.batches == TWO_SIDED
        else {"tokens": inputs, "segment_ids": np.ones_like(inputs), "positions": places})))


@functools.cache
def base_of(folder) -> Base:
    return load_base(folder)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_says_the_same_here_and_comes_back(place, tmp_path, case):
    base, wanted = base_of(place / CASES[case][0]), np.load(place / f"{case}.npy")
    expert = load_peft(place / case, base)
    assert np.abs(wanted - our_logits(base, None)).max() > 1e-2
    np.testing.assert_allclose(our_logits(base, expert), wanted, rtol=0, atol=1e-5)
    carrying = read(place / case).get("layers_to_transform")  # the same layers carry updates here
    assert carrying is None or expert.card.network["adapter"]["layers"] == carrying
    save_peft(tmp_path / "back", expert, base)
    first, second = (load_file(folder / WEIGHTS) for folder in (place / case, tmp_path / "back"))
    copies = {name for name in first if ".original_module." in name or ".modules_to_save." in name}
    assert second.keys() == first.keys() - copies
    assert all(np.array_equal(array, first[name]) for name, array in second.items())
    assert read(tmp_path / "back") == read(place / case)


@pytest.mark.parametrize("case", CASES)
def test_settings_made_of_the_leaves_say_the_same_in_peft(place, tmp_path, case):
    """An expert that no longer knows its adapter_config.json."""
    base = base_of(place / CASES[case][0])
    expert = load_peft(place / case, base)
    bare = dataclasses.replace(expert, card=dataclasses.replace(expert.card, training={}))
    save_peft(tmp_path / "fresh", bare, base)
    again = trees.flatten(load_peft(tmp_path / "fresh", base).overlay)
    assert again.keys() == trees.flatten(expert.overlay).keys()
    np.testing.assert_allclose(by_peft(place / CASES[case][0], tmp_path / "fresh"), np.load(
        place / f"{case}.npy"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "settings"), [
    ("t5", {"rank": 3}), ("llama", {"rank": 4, "alpha": 6.0, "targets": "all", "ranks": {"wo": 2}}),
    ("gpt2", {"rank": 2, "targets": ["query", "value", "wi"], "alphas": {"wi": 5.0}}),
])
def test_an_expert_of_this_program_loads_in_peft(place, tmp_path, name, settings):
    """Updates and norms, as `elm train` makes them; GPT-2's query and value are one module in PEFT."""
    base = base_of(place / name)
    config = base.config.with_adapter(AdapterConfig(kind="lora", **settings))
    network, draw = families.network_of(config), np.random.default_rng(1)
    leaves = trees.flatten(network.abstract_params())
    overlay = {path: draw.normal(0, 0.2, leaf.shape).astype(np.float32) for path, leaf in leaves.items()
               if network.role_of(path) in (ADAPTER, NORM)}
    card = ExpertCard("made", "prompt", "adapter", base.reference(), config.to_dict())
    save_expert(tmp_path / "made", Expert(card, trees.unflatten(overlay)))
    assert main(["convert", "--from", "elm", "--to", "peft", "--base", str(place / name),
                 str(tmp_path / "made"), str(tmp_path / "peft")]) == 0
    wanted = our_logits(base, load_expert(tmp_path / "made"))
    np.testing.assert_allclose(by_peft(place / name, tmp_path / "peft"), wanted, rtol=0, atol=1e-5)
    back = trees.flatten(load_peft(tmp_path / "peft", base).overlay)
    if name != "gpt2":
        assert back.keys() == overlay.keys()
        assert all(np.array_equal(back[path], leaf) for path, leaf in overlay.items())


def test_the_verb_converts_both_ways_and_peft_verifies(place, tmp_path, capsys):
    for kinds, source, target in ((("peft", "elm"), place / "gpt2 fused", tmp_path / "expert"),
                                  (("elm", "peft"), tmp_path / "expert", tmp_path / "back")):
        assert main(["convert", "--from", kinds[0], "--to", kinds[1], str(source), str(target), "--verify",
                     "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["verified"]["largest_difference"] < 1e-5 and report["num_leaves"] == 12
        assert f"peft {peft.__version__}" in [report["verified"][f"{side}_by"] for side in ("source",
                                                                                            "target")]
    assert load_file(tmp_path / "back" / WEIGHTS).keys() == load_file(place / "gpt2 fused" / WEIGHTS).keys()


def test_adapters_merge_as_peft_merges_them(place, tmp_path):
    for seed, rank in ((1, 4), (2, 6)):
        write_adapter(place, f"merged {seed}", "llama", {"r": rank, "lora_alpha": 4}, seed)
    first, second = (str(place / f"merged {seed}") for seed in (1, 2))
    assert main(["merge", "--base", str(place / "llama"), "--method", "linear", "--weights", "0.3,0.7",
                 "--output", str(tmp_path / "merged"), first, second]) == 0
    model = peft.PeftModel.from_pretrained(torch_model(place / "llama"), first, adapter_name="a")
    model.load_adapter(second, adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.3, 0.7], "both", combination_type="cat")
    model.set_adapter("both")
    found = our_logits(base_of(place / "llama"), load_expert(tmp_path / "merged"))
    np.testing.assert_allclose(found, torch_logits(model.eval()), rtol=0, atol=1e-5)


def test_updates_of_unlike_modules_merge_as_if_the_others_were_zero(place, tmp_path):
    """The mean of two adapters is both at once in PEFT, with half the alpha."""
    for seed, module in ((1, "q_proj"), (2, "down_proj")):
        settings = {"r": 2 + seed, "lora_alpha": 8, "target_modules": [module]}
        write_adapter(place, f"unlike {seed}", "llama", settings, seed)
    folders = [place / f"unlike {seed}" for seed in (1, 2)]
    assert main(["merge", "--base", str(place / "llama"), "--output", str(tmp_path / "merged"),
                 *map(str, folders)]) == 0
    for folder in folders:
        changed(lora_alpha=4)(folder)
    model = peft.PeftModel.from_pretrained(torch_model(place / "llama"), folders[0], adapter_name="a")
    model.load_adapter(folders[1], adapter_name="b")
    model.base_model.set_adapter(["a", "b"])
    found = our_logits(base_of(place / "llama"), load_expert(tmp_path / "merged"))
    np.testing.assert_allclose(found, torch_logits(model.eval()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [
    {"target_modules": ["q_proj", "mlp.up_proj"]}, {"target_modules": ["proj"]},
    {"target_modules": r"model\.layers\.(0|1)\.mlp\..*"},
    {"target_modules": ["q_proj", "model.layers.0.self_attn.v_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": ["blocks", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"},
    {"target_modules": ["down_proj", "lm_head"], "exclude_modules": ["layers.1.mlp.down_proj"]},
    {"target_modules": ["down_proj", "o_proj"], "exclude_modules": r".*\.0\..*"},
    {"target_modules": ["down_proj", "o_proj"], "modules_to_save": ["mlp"]},
], ids=str)
def test_targets_are_those_of_peft(place, settings):
    config = peft.LoraConfig(**settings)
    ours = lora_settings.parse({"peft_type": "LORA", **settings}, None)
    modules = modules_of(base_of(place / "llama").config)
    for name in modules.names:
        assert ours.targets(name, name in modules.projections) == bool(
            check_target_module_exists(config, name)), name


@pytest.mark.parametrize("settings", [
    {"target_modules": "(.|.)*x"}, {"target_modules": "q_proj", "exclude_modules": r"([\w.]+)+!"},
    {"target_modules": ["q_proj"], "modules_to_save": [r"([\w.]+)+!"]},
], ids=str)
def test_an_expression_that_would_match_for_ever_is_refused(monkeypatch, settings):
    monkeypatch.setattr(expressions, "MAX_SECONDS", 0.02)
    before = signal.getsignal(signal.SIGVTALRM)
    ours = lora_settings.parse({"peft_type": "LORA", **settings}, None)
    with pytest.raises(InputError, match=r"takes longer than 0.02 seconds(.|\n)*self_attn.q_proj"):
        ours.targets("base_model.model.model.layers.0.self_attn.q_proj", True)
    assert signal.getsignal(signal.SIGVTALRM) is before and signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


@pytest.mark.parametrize(("name", "settings"), [
    ("t5", {}), ("llama", {"modules_to_save": ["norm"]}),
    ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], **FAN}),
    ("qwen2", {"target_modules": r".*\.0\..*\.(q|up)_proj", "feedforward_modules": []}),
])
def test_factors_of_ia3_say_the_same_here(place, tmp_path, name, settings):
    write_adapter(place, f"ia3 {name}", name, settings, kind=peft.IA3Config)
    assert main(["convert", "--from", "peft", "--to", "elm", "--base", str(place / name),
                 str(place / f"ia3 {name}"), str(tmp_path / "expert")]) == 0
    base, expert = base_of(place / name), load_expert(tmp_path / "expert")
    wanted = np.load(place / f"ia3 {name}.npy")
    np.testing.assert_allclose(our_logits(base, expert), wanted, rtol=0, atol=1e-5)
    assert np.abs(wanted - our_logits(base, None)).max() > 1e-3
    with pytest.raises(InputError, match="no form in PEFT"):
        save_peft(tmp_path / "back", expert, base)


def read(folder):
    return json.loads((folder / CONFIG).read_text())


def changed(**values):
    return lambda folder: (folder / CONFIG).write_text(json.dumps(read(folder) | values))


def without_tensor(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors[min(tensors)]
    save_file(tensors, folder / WEIGHTS)


def with_tensor(name, shape=(2, 2)):
    def add(folder):
        tensors = load_file(folder / WEIGHTS)
        save_file({**tensors, f"base_model.model.{name}": np.zeros(shape, np.float32)}, folder / WEIGHTS)
    return add


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(("change", "message"), [
    (changed(peft_type="ADALORA"), "peft_type 'ADALORA'"),
    (changed(peft_type="PREFIX_TUNING"), "'PREFIX_TUNING'"),
    (changed(use_dora=True), "DoRA"), (changed(init_lora_weights="loftq"), "'loftq'"),
    (changed(init_lora_weights="pissa_niter_4"), "'pissa_niter_4'"),
    (changed(trainable_token_indices=[1, 2]), "trainable tokens"), (changed(lora_bias=True), "lora_bias"),
    (changed(alora_invocation_tokens=[3]), "aLoRA"), (changed(layer_replication=[[0, 2]]), "layer replic"),
    (changed(use_magic=True), "use_magic = True"), (changed(r="4"), "r = '4'"),
    (changed(bias="some"), "bias ="),
    (changed(target_modules="(q"), r"target_modules = '\(q'"),
    (changed(r=3), r"config and its tensors disagree(?s:.*)wrong shape(?s:.*)lora_A(?s:.*)of one adapter"),
    (changed(target_modules=["c_attn"]), r"tensors disagree(?s:.*)c_attn(?s:.*)q_proj, v_proj"),
    (changed(target_modules=["q_proj"]), r"tensors disagree(?s:.*)unexpected(?s:.*)v_proj.lora_A"),
    (changed(target_modules=["q_proj", "v_proj", "lm_head"]), r"not supported(?s:.*)lm_head"),
    (changed(base_model_name_or_path="meta-llama/Llama-3.2-1B"), None),
    (without_tensor, r"disagree(?s:.*)missing \(1\): model.layers.0"),
    (pickled, "pickle(?s:.*)safe_serialization"),
    (changed(target_modules=["q_proj", "v_proj", "o_proj"]),
     r"disagree(?s:.*)missing \(4\)(?s:.*)o_proj.lora_A"),
    (with_tensor("model.layers.2.self_attn.q_proj.lora_A.weight", (4, 16)),
     r"not fit the base(?s:.*)layers.2(?s:.*)give the base"),
    (with_tensor("lm_head.weight", (48, 16)), r"unexpected \(1\): lm_head.weight"),
    (lambda folder: (folder / WEIGHTS).unlink(), "weights are missing"),
    (lambda folder: (folder / CONFIG).write_text("[]"), CONFIG),
    (lambda folder: (folder / CONFIG).unlink(), "no peft folder"),
    (lambda folder: (folder / WEIGHTS).write_bytes(b"cut short"), "truncated"),
])
def test_what_is_not_supported_is_refused_by_name(place, tmp_path, capsys, change, message):
    shutil.copytree(place / "llama default", tmp_path / "adapter")
    change(tmp_path / "adapter")
    status = main(["convert", "--from", "peft", "--to", "elm", "--base", str(place / "llama"),
                   str(tmp_path / "adapter"), str(tmp_path / "expert")])
    text = capsys.readouterr().err
    if message is None:
        assert status == 0
        return
    with pytest.raises(InputError, match=message):
        raise InputError(text)
    assert status == 2 and not (tmp_path / "expert").exists() and "Traceback" not in text


def test_another_base_is_refused_by_shapes_by_name_and_where_modules_are_tied(
        place, tmp_path, capsys, caplog):
    with pytest.raises(InputError, match="other modules"):
        load_peft(place / "llama default", base_of(place / "gpt2"))
    with pytest.raises(InputError, match=r"unexpected(?s:.*)q_proj.bias"):
        load_peft(place / "qwen2 biases of updates", base_of(place / "llama"))
    names = ("hf://meta-llama/Llama-3.2-1B",)
    caplog.clear()
    for recorded, given in (("unsloth/llama-3.2-1b", names), ("me/tiny", ("/bases/tiny",)), (None, names),
                            ("/models/Tiny/", ("/bases/tiny",)),
                            ("runs/a/base", ("/x/runs/a/base",)), ("me/tiny", ("/x", "you/tiny"))):
        check_base_name(recorded, given, None)
    assert not caplog.records
    for recorded, given in (("/models/mine", names), ("me/tiny", ("/bases/other",)),
                            ("/runs/a/base", ("/runs/b/base",))):
        check_base_name(recorded, given, "adapter_config.json")
        assert f"adapter_config.json records the base {recorded}" in caplog.text
    assert caplog.text.count("has no name to compare") == 3
    with pytest.raises(InputError, match=r"another base(?s:.*)Qwen/Qwen2-0.5B"):
        check_base_name("Qwen/Qwen2-0.5B", names, None)
    with pytest.raises(InputError, match=r"would part them(?s:.*)embed_tokens"):
        load_peft(place / "llama one layer", base_of(place / "tied"))
    for verb in (["evaluate", "--base", str(place / "llama"), "--expert", str(place / "llama default"),
                  "--task", "mini_topic__which_section", "--output", str(tmp_path / "results.jsonl"),
                  "--module", "elm_jax.tasks.embedded"],
                 ["convert", "--from", "elm", "--to", "peft", str(place / "llama default"),
                  str(tmp_path / "x")]):
        assert main(verb) == 2
        assert "peft" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_an_adapter_beside_a_model_is_never_passed_over(place, tmp_path, capsys, name):
    """transformers loads such a folder with the adapter: read without a word, it would be another model."""
    both, adapter = tmp_path / "both", place / f"{name} default"
    shutil.copytree(place / name, both)
    for file in (CONFIG, WEIGHTS):
        shutil.copy(adapter / file, both / file)
    out, base, words = str(tmp_path / "out"), str(place / name), "lies beside this model"
    for verb in (["convert", "--from", "hf", "--to", "elm", str(both), out],
                 ["merge", "--output", out, base, str(both)],
                 ["merge", "--output", out, "--to", "elm", base, str(both)],
                 ["convert", "--from", "peft", "--to", "elm", "--base", str(both), str(adapter), out],
                 ["generate", "--base", str(both), "a"]):
        assert main(verb) == 2
        text = capsys.readouterr().err
        assert words in text and CONFIG in text and str(both) in text, text
    with pytest.raises(InputError, match=words):
        load_base(both)
    assert sorted(tmp_path.iterdir()) == [both]


def test_an_adapter_alone_is_called_one(place, tmp_path, capsys):
    adapter = str(place / "llama default")
    with pytest.raises(InputError, match="This is a PEFT adapter"):
        load_base(adapter)
    for verb, words in ((["convert", "--from", "hf", "--to", "elm", adapter, str(tmp_path / "x")],
                         "got: an adapter of PEFT\n  cure: --from peft"),
                        (["generate", "--base", adapter, "a"], "This is a PEFT adapter"),
                        (["merge", "--output", str(tmp_path / "x"), str(place / "llama"), adapter],
                         f"{adapter} (expert)")):
        assert main(verb) == 2
        assert words in capsys.readouterr().err


def test_what_has_no_form_in_peft_is_refused(place, tmp_path):
    base = base_of(place / "llama")
    config = base.config.with_adapter(AdapterConfig(4))
    card = ExpertCard("made", "prompt", "adapter", base.reference(), config.to_dict())
    with pytest.raises(InputError, match=r"no form in PEFT(?s:.*)kind 'bottleneck'"):
        save_peft(tmp_path / "x", Expert(card, {}), base)
    with pytest.raises(InputError, match="another base"):
        save_peft(tmp_path / "x", load_peft(place / "llama default", base), base_of(place / "tied"))
    assert not (tmp_path / "x").exists()
