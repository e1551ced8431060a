"""What `elm merge` refuses: checkpoints that are no states of one network, and values that are none.

All that differs is listed in one error; each `--allow` lets pass what it says, and does with it what it says;
and a merge that is refused leaves nothing behind.
"""

import json
import os
import pathlib
import shutil

import hf_folders
import merge_made as made
import mergekit_peer as peer
import numpy as np
import pytest
import torch
import transformers

from elm_jax.cli.merge import plain_config
from elm_jax.errors import InputError
from elm_jax.experts.base import save_base
from elm_jax.experts.overlay import Expert, save_expert
from elm_jax.merging.methods.method_table import METHODS
from elm_jax.merging.recipes.mergekit_yaml import read_config
from elm_jax.runtime import trees
from elm_jax.workflows.merge import merge_folders, merge_inputs
from elm_jax.workflows.merge.merge_folders import MergeOptions

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
LAST = "model.layers.3.self_attn.v_proj.weight"


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    where = tmp_path_factory.mktemp("once")
    return {shape: peer.make_family(where / shape, shape, "float32") for shape in ("llama", "llama_tied")}


@pytest.fixture
def llama(made_once, tmp_path):
    """A base and three experts to spoil, with heads of their own."""
    return made.copies(made_once["llama"], tmp_path)


@pytest.fixture
def tied(made_once, tmp_path):
    (tmp_path / "tied").mkdir()
    return made.copies(made_once["llama_tied"], tmp_path / "tied")


def merge(folders, output, *, method="mean", base=None, allow=(), weights=None, **parameters):
    folders = [str(folder) for folder in folders]
    config = plain_config(method, folders, weights, base and str(base), parameters)
    return merge_folders.merge_folders(config, output, MergeOptions(quiet=True, allow=tuple(allow)))


def experts(family) -> list[pathlib.Path]:
    return [pathlib.Path(folder) for folder in made.experts_of(family)]


def refused(folders, tmp_path, *words, **settings) -> str:
    """The message of a refused merge, which has all words in it and leaves nothing."""
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError) as caught:
        merge(folders, tmp_path / "merged", **settings)
    assert sorted(os.listdir(tmp_path)) == before
    for word in words:
        assert word in str(caught.value), caught.value
    return str(caught.value)


def tensor(folder, name) -> torch.Tensor:
    return peer.read(folder)[name]


# ---- settings and vocabularies


def test_unlike_configs(llama, tmp_path):
    first, second, third = experts(llama)
    made.set_config(second, rms_norm_eps=1e-3, torch_dtype="float64", use_cache=False)
    made.set_config(third, num_key_value_heads=4)
    message = refused(experts(llama), tmp_path, "rms_norm_eps: 1e-06 in ", f"0.001 in {second}",
                      f"num_key_value_heads: 2 in {first}, 4 in {third}", "--allow configs")
    assert "use_cache" not in message and "torch_dtype" not in message
    merge(experts(llama), tmp_path / "merged", allow=["configs"])
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-6 and config["num_key_value_heads"] == 2, "the donor's"
    merge([second, first], tmp_path / "turned", allow=["configs"])
    assert json.loads((tmp_path / "turned" / "config.json").read_text())["rms_norm_eps"] == 1e-3


@pytest.mark.parametrize("file", ["tokenizer.json", "spiece.model", "vocab.json"])
def test_unlike_vocabularies(file, llama, tmp_path):
    first, second, third = experts(llama)
    (second / file).write_text("a")
    (third / file).write_text("b")  # the first has none: it still is no vocabulary of both
    refused(experts(llama), tmp_path, f"{file} differs between {second} and {third}", "--allow vocabularies")
    (first / file).write_text("a")
    refused(experts(llama), tmp_path, f"{file} differs between {first} and {third}")
    merge(experts(llama), tmp_path / "merged", allow=["vocabularies"])
    assert (tmp_path / "merged" / file).read_text() == "a", "the donor's"
    merge([first, second], tmp_path / "same")


def test_heads_of_t5_as_two_versions_of_transformers_write_them(tmp_path):
    """Version 5 says that every T5 is tied, older ones what it is; the result says what it is."""
    models = [hf_folders.build("t5_1_1", seed=seed) for seed in (0, 1)]
    models[0].save_pretrained(tmp_path / "new")
    hf_folders.publish(models[1], "t5_1_1", tmp_path / "old")
    values = json.loads((tmp_path / "new" / "config.json").read_text())
    assert values["tie_word_embeddings"] and not values["scale_decoder_outputs"]
    own = ("tie_word_embeddings", "scale_decoder_outputs", "transformers_version")
    shared = {key: values[key] for key in values if key not in own}
    (tmp_path / "old" / "config.json").write_text(json.dumps({**shared, "tie_word_embeddings": False}))
    for number, order in enumerate((["new", "old"], ["old", "new"])):
        merge([tmp_path / name for name in order], tmp_path / f"merged{number}")
        head = hf_folders.stored(tmp_path / f"merged{number}")[HEAD]
        torch.testing.assert_close(head, (models[0].lm_head.weight + models[1].lm_head.weight).detach() / 2)
        merge_inputs.check_head(str(tmp_path / f"merged{number}"))
    (tmp_path / "old" / "config.json").write_text(json.dumps({**shared, "scale_decoder_outputs": True}))
    refused([tmp_path / "new", tmp_path / "old"], tmp_path, "scale_decoder_outputs: False in ")


# ---- tensors


def test_all_tensors_that_differ_are_listed(llama, tmp_path):
    first, second, third = experts(llama)
    made.set_tensors(second, {NORM: torch.ones(7), LAST: None, "extra.weight": torch.ones(2)})
    made.set_tensors(third, {LAST: tensor(third, LAST).to(torch.bfloat16), HEAD: None})
    message = refused(experts(llama), tmp_path, f"{NORM}: [32] in {first}, [7] in {second}",
                      f"{LAST} is missing from {second}", f"extra.weight is missing from {first}",
                      f"{LAST}: float32 in {first}, bfloat16 in {third}", f"{HEAD} is missing from {third}",
                      "--allow dtypes", "--allow heads", "--allow missing")
    assert message.count(" in ") + message.count("is missing") >= 5
    for allow in (["dtypes"], ["missing"], ["dtypes", "missing"], ["heads", "configs", "vocabularies"]):
        refused(experts(llama), tmp_path, f"{NORM}: [32] in {first}, [7] in {second}", allow=allow)


def test_many_differences_are_counted(llama, tmp_path):
    first, second, _ = experts(llama)
    made.set_tensors(second, {f"extra.{number}": torch.ones(1) for number in range(70)})
    refused([first, second], tmp_path, "extra.0 is missing", "and 20 more")


def test_unlike_dtypes_are_allowed_by_name_and_the_first_ones_is_kept(llama, tmp_path):
    first, second, _ = experts(llama)
    narrow = {name: value.to(torch.bfloat16) for name, value in peer.read(second).items()}
    made.set_tensors(second, narrow)
    refused([first, second], tmp_path, "float32", "bfloat16", "--allow dtypes")
    for number, (folders, dtype) in enumerate((([first, second], "float32"), ([second, first], "bfloat16"))):
        merge(folders, tmp_path / str(number), allow=["dtypes"])
        merged = made.values(tmp_path / str(number))
        assert {leaf.dtype.name for leaf in merged.values()} == {dtype}
        for name, leaf in merged.items():
            wide, narrow = (made.values(folder)[name].astype(np.float32) for folder in (first, second))
            np.testing.assert_array_equal(leaf, ((wide + narrow) / 2).astype(leaf.dtype))


def test_missing_leaves_come_from_the_base_or_else_from_the_first_that_has_them(llama, tmp_path):
    first, second, third = experts(llama)
    base = pathlib.Path(llama["base"])
    own = {folder: tensor(folder, NORM).numpy() for folder in (first, second, third, base)}
    made.set_tensors(second, {NORM: None})
    refused([first, second, third], tmp_path, f"{NORM} is missing from {second}", "--allow missing")
    merge([first, second, third], tmp_path / "merged", allow=["missing"], weights=[1, 1, 2])
    made.assert_mean(made.values(tmp_path / "merged")[NORM], [own[first], own[first], own[third]], [1, 1, 2])
    merge([second, first, third], tmp_path / "turned", allow=["missing"])
    made.assert_mean(made.values(tmp_path / "turned")[NORM], [own[first], own[first], own[third]])
    merge([second, first], tmp_path / "based", allow=["missing"], method="task_arithmetic", base=base,
          weights=[5.0, 1.0])
    np.testing.assert_allclose(made.values(tmp_path / "based")[NORM], own[first], rtol=1e-6)
    made.set_tensors(base, {NORM: None})  # now the base lacks it too: it is the first expert's everywhere
    merge([second, first], tmp_path / "none", allow=["missing"], method="task_arithmetic", base=base)
    np.testing.assert_array_equal(made.values(tmp_path / "none")[NORM], own[first])


def test_tied_and_own_heads(llama, tied, tmp_path):
    """The tied model's embedding is its head; the result has a head of its own, and its config says so."""
    own, shared = experts(llama)[0], experts(tied)[1]
    refused([own, shared], tmp_path, "tie_word_embeddings: False")
    refused([own, shared], tmp_path, f"{HEAD} is missing from {shared}", "--allow heads", allow=["configs"])
    for number, folders in enumerate(([own, shared], [shared, own])):
        merge(folders, tmp_path / str(number), allow=["heads"])
        merged = made.values(tmp_path / str(number))
        made.assert_mean(merged[HEAD], [tensor(own, HEAD).numpy(), tensor(shared, EMBEDDING).numpy()])
        config = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert config["tie_word_embeddings"] is False
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        np.testing.assert_array_equal(model.lm_head.weight.detach().numpy(), merged[HEAD])


def test_tied_heads_stay_tied(tied, tmp_path):
    merge(experts(tied), tmp_path / "merged")
    assert HEAD not in made.values(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True


def test_second_copies_of_the_embedding_must_be_copies(tied, tmp_path):
    first, second, _ = experts(tied)
    made.set_tensors(second, {HEAD: tensor(second, EMBEDDING)})
    merge([first, second], tmp_path / "merged")
    assert HEAD not in made.values(tmp_path / "merged")
    made.set_tensors(second, {HEAD: 2 * tensor(second, EMBEDDING)})
    shutil.rmtree(tmp_path / "merged")
    refused([first, second], tmp_path, f"{HEAD} differs from {EMBEDDING}", str(second))


# ---- tensors that are no parameters


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integers_are_copied_if_they_are_equal(dtype, llama, tmp_path):
    places = torch.arange(5).to(dtype)
    for folder in (*experts(llama), pathlib.Path(llama["base"])):
        made.set_tensors(folder, {"positions": places})
    first, second, third = experts(llama)
    for name, settings in {"mean": {}, "ties": {"method": "ties", "base": llama["base"]},
                           "slerp": {"method": "slerp"}}.items():
        merge([first, second, third][:2 if name == "slerp" else 3], tmp_path / name, **settings)
        assert np.array_equal(made.values(tmp_path / name)["positions"], places.numpy())
    made.set_tensors(third, {"positions": 1 - places if dtype == torch.int64 else places.flip(0)})
    refused([first, second, third], tmp_path, "leaf positions", "cannot be merged, and differs", str(third))
    merge([first, second], tmp_path / "without")


def test_integers_of_the_base_must_be_equal_too(llama, tmp_path):
    for number, folder in enumerate((*experts(llama), pathlib.Path(llama["base"]))):
        made.set_tensors(folder, {"positions": torch.arange(5) + (number == 3)})
    refused(experts(llama), tmp_path, "leaf positions", "differs", "base", method="ties", base=llama["base"])


def test_a_cast_of_the_inputs_leaves_integers_alone(llama, tmp_path):
    places = torch.tensor([2**24 + 1, 3])  # which float32 cannot hold
    for folder in experts(llama):
        made.set_tensors(folder, {"positions": places})
    (tmp_path / "merge.yaml").write_text("merge_method: linear\ndtype: float16\nmodels:\n" + "".join(
        f"- model: {folder}\n  parameters: {{weight: 1}}\n" for folder in experts(llama)))
    merge_folders.merge_folders(read_config(tmp_path / "merge.yaml"), tmp_path / "merged",
                                MergeOptions(quiet=True))
    merged = made.values(tmp_path / "merged")
    assert merged["positions"].dtype == np.int64 and np.array_equal(merged["positions"], places.numpy())
    assert merged[NORM].dtype == np.float16


def test_a_parameter_in_one_and_an_integer_in_another_is_refused(llama, tmp_path):
    first, second, _ = experts(llama)
    made.set_tensors(second, {NORM: torch.ones(32, dtype=torch.int32)})
    for allow in ((), ("dtypes",)):
        refused([first, second], tmp_path, f"{NORM}: float32 in {first}, int32 in {second}", allow=allow)


# ---- values


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("method", [
    pytest.param(method, marks=[pytest.mark.slow] * (method == "dare_linear"))  # dare_ties draws as it does
    for method in METHODS])
def test_values_that_are_not_finite_are_refused_with_leaf_and_folder(method, bad, llama, tmp_path):
    """Also where a weight of zero leaves the model out."""
    needs_base = METHODS[method].needs_base
    folders = experts(llama)[:METHODS[method].num_experts or 3]
    spoilt = [folders[1], *([pathlib.Path(llama["base"])] if needs_base else [])]
    for folder in spoilt:
        good = tensor(folder, LAST)
        worse = good.clone()
        worse.view(-1)[-1] = bad
        made.set_tensors(folder, {LAST: worse})
        refused(folders, tmp_path, f"leaf {LAST} of {'the base' if folder == llama['base'] else folder}",
                method=method, base=llama["base"] if needs_base else None,
                weights=[1.0, *(0.0,) * (len(folders) - 1)])
        made.set_tensors(folder, {LAST: good})


def test_casts_that_lose_a_value_are_refused_by_name(llama, tmp_path):
    """`dtype` of a merge config casts what is merged, `out_dtype` the result; no model is at fault."""
    first, second, _ = experts(llama)
    weight = tensor(second, LAST)
    weight[0, 0] = 3e5
    made.set_tensors(second, {LAST: weight})
    for dtype, words in (("dtype", f"too large for float16\n  where: leaf {LAST} of {second}"),
                         ("out_dtype", f"too large\n  where: leaf {LAST}\n  got: infinity in float16")):
        (tmp_path / "merge.yaml").write_text(json.dumps({
            "merge_method": "linear", dtype: "float16",
            "models": [{"model": str(each), "parameters": {"weight": 1}} for each in (first, second)]}))
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(InputError) as caught:
            merge_folders.merge_folders(read_config(tmp_path / "merge.yaml"), tmp_path / "merged",
                                        MergeOptions(quiet=True))
        assert words in str(caught.value) and sorted(os.listdir(tmp_path)) == before


def test_weights_that_are_codes_are_refused(llama, tmp_path):
    first, second, _ = experts(llama)
    made.set_config(second, quantization_config={"quant_method": "fp8"})
    refused([first, second], tmp_path, "quantised", f"{second}/config.json", "fp8")


@pytest.mark.parametrize("form", ["adapter", "full", "lora"])
def test_values_of_experts_that_are_not_finite(form, tmp_path):
    folders = made.save_experts(tmp_path, form, 2)
    expert = made.expert(form, 1)
    flat = {path: np.array(leaf) for path, leaf in trees.flatten(expert.overlay).items()}
    path = next(path for path in flat if path.endswith("up/kernel" if form == "lora" else "scale"))
    flat[path].reshape(-1)[0] = np.nan
    save_expert(tmp_path / "bad", Expert(expert.card, trees.unflatten(flat)))
    refused([folders[0], tmp_path / "bad"], tmp_path, f"leaf {path} of {expert.card.id}\n")


def test_values_of_models_that_are_not_finite(tmp_path):
    for number in range(2):
        flat = {path: np.array(leaf) for path, leaf in trees.flatten(made.params(number)).items()}
        if number:
            flat["encoder/encoder_norm/scale"][3] = np.inf
        save_base(tmp_path / str(number), trees.unflatten(flat), made.CONFIG, None, {})
    refused([tmp_path / "0", tmp_path / "1"], tmp_path, "leaf encoder/encoder_norm/scale of ",
            str(tmp_path / "1"))


# ---- on the command line


@pytest.mark.parametrize(("words", "message"), [
    (["--method", "ties"], "no base"),
    (["--method", "mean", "--base", "{base}"], "takes no base"),
    (["--method", "slerp"], "Another number of experts than slerp takes"),
    (["--weights", "1,2"], "one value an expert"),
    (["--weights", "1,-2,3"], "must not be negative"),
    (["--weights", "0,0,0"], "nor all be zero"),
    (["--weights", "a,b,c"], "not numbers"),
    (["--method", "linear", "--weights", "1,-1,0"], "sum to zero"),
    (["--density", "0.5"], "Unknown parameter of mean 'density'"),
    (["--method", "ties", "--base", "{base}", "--density", "1.5"], "density is out of range"),
    (["--method", "ties", "--base", "{base}", "--density", "0.5,0.5"], "one value an expert"),
    (["--method", "ties", "--base", "{base}", "--rescale", "l2"], "Unknown value of rescale 'l2'"),
    (["--pattern", "no_such_part=1,1,1"], "matches no leaf"),
    (["--allow", "dtypes", "--to", "t5x"], "a network of family 'decoder'"),
    (["nowhere"], "There is no"),
])
def test_wrong_words_are_status_2_and_write_nothing(capsys, words, message, made_once, tmp_path):
    family = made_once["llama"]
    words = [word.format(base=family["base"]) for word in words]
    status, out, err = made.run(capsys, *made.experts_of(family), *words, "--output", tmp_path / "merged")
    assert status == 2 and message in err and out == "" and "Traceback" not in err
    assert not os.listdir(tmp_path)


def test_a_folder_that_is_taken(capsys, made_once, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "thesis.txt").write_text("")
    status, _, err = made.run(capsys, *made.experts_of(made_once["llama"]), "--output", tmp_path / "merged")
    assert status == 2 and "exists already" in err and os.listdir(tmp_path) == ["merged"]


def test_every_difference_that_can_be_allowed_is_tested_here():
    assert set(merge_inputs.ALLOWED) == {"dtypes", "configs", "vocabularies", "heads", "missing"}
