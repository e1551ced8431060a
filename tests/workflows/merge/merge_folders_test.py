"""`elm merge` on folders: checkpoints of real classes, models and experts in every form, against numpy.

Merged tensors are bit for bit those of the streamed leaves that `tests/merging` compares with float64. The
mean is that of numpy in float64, rounded once to the output's type, but for two units in the last place of
float32.
"""

import json
import pathlib
import shutil

import merge_cases as cases
import merge_made as made
import mergekit_peer as peer
import numpy as np
import pytest
import torch
import transformers

from elm_jax.cli import main
from elm_jax.cli.merge import plain_config
from elm_jax.errors import InputError
from elm_jax.experts.base import load_base
from elm_jax.experts.overlay import load_expert, resolve
from elm_jax.formats import detect
from elm_jax.merging.methods.method_table import METHODS
from elm_jax.models.t5.network import T5Network
from elm_jax.runtime import storage, trees
from elm_jax.workflows.merge import merge_inputs
from elm_jax.workflows.merge.merge_folders import MergeOptions, merge_folders, plan_merge

WEIGHTS = (0.5, 0.3, 0.4)
SETTINGS = {"density": 0.4, "scale": 0.9, "seed": 5}
QUIET = MergeOptions(quiet=True, max_shard_bytes=30_000)
KINDS_OF_FILES = [("llama", "bfloat16"), ("llama_tied", "float32"), ("t5_untied", "float32"),
                  pytest.param(("t5_tied", "bfloat16"), marks=pytest.mark.slow, id="t5_tied-bfloat16")]


@pytest.fixture(scope="module", params=KINDS_OF_FILES, ids="-".join)
def family(request, tmp_path_factory):
    """A base and three experts beside it, several shards each."""
    shape, dtype = request.param
    return peer.make_family(tmp_path_factory.mktemp("family"), shape, dtype)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return peer.make_family(tmp_path_factory.mktemp("llama"), "llama", "bfloat16")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models in every form."""
    return made.save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Three experts of each form, and their base."""
    where = tmp_path_factory.mktemp("experts")
    return {**{form: made.save_experts(where, form) for form in made.FORMS},
            "base": made.save_own_base(where / "base")}


def given(method: str) -> dict:
    return {name: value for name, value in SETTINGS.items() if cases.has(method, name)}


def chosen(method: str, folders: list[str]) -> list[str]:
    return folders[:METHODS[method].num_experts or len(folders)]


def merge(method: str, folders: list[str], output, base=None, options=QUIET, **changes):
    folders = chosen(method, folders)
    weights = changes.pop("weights", WEIGHTS[:len(folders)])
    config = plain_config(method, folders, weights, base if METHODS[method].needs_base else None,
                          {**given(method), **changes.pop("parameters", {})}, **changes)
    return merge_folders(config, output, options)


def expected_leaf(method: str, leaf: str, experts, base, marks) -> np.ndarray:
    return cases.stream(cases.Case(method, experts, base, WEIGHTS[:len(experts)], given(method), marks, None,
                                   leaf))


def same_bits(found: np.ndarray, expected: np.ndarray, name: str):
    assert found.dtype == expected.dtype and found.shape == expected.shape, name
    assert found.tobytes() == expected.tobytes(), name


# ---- checkpoints


def test_every_method_on_checkpoints(family, tmp_path):
    folders = made.experts_of(family)
    stored = [made.values(pathlib.Path(folder)) for folder in folders]
    base = made.values(family["base"])
    for method, row in METHODS.items():
        report = merge(method, folders, tmp_path / method, str(family["base"]))
        merged = made.values(tmp_path / method)
        used = stored[:len(chosen(method, folders))]
        marks = [merge_inputs.sampled_digest(storage.as_path(folder)) for folder in chosen(method, folders)]
        assert set(merged) == set(base) and report["num_leaves"] == len(base)
        for name, leaf in merged.items():
            same_bits(leaf, expected_leaf(method, name, [each[name] for each in used],
                                          base[name] if row.needs_base else None, marks), name)
        card = json.loads((tmp_path / method / "merge.json").read_text())
        assert [parent["digest"] for parent in card["parents"]] == marks and card["method"] == method
        assert bool(card["base"]) == row.needs_base
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(METHODS)


def test_transformers_loads_the_mean_and_its_tensors_are_numpys(family, tmp_path):
    folders = made.experts_of(family)
    merge("mean", folders, tmp_path / "mean", weights=None)
    stored = [made.values(pathlib.Path(folder)) for folder in folders]
    merged = made.values(tmp_path / "mean")
    assert len(list((tmp_path / "mean").glob("model-*-of-*.safetensors"))) > 2
    for name, leaf in merged.items():
        made.assert_mean(leaf, [each[name] for each in stored], name=name)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "mean")
    kind = (transformers.T5ForConditionalGeneration if config.model_type == "t5"
            else transformers.AutoModelForCausalLM)
    model, info = kind.from_pretrained(tmp_path / "mean", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    loaded = model.state_dict()
    for name, leaf in merged.items():
        same_bits(made.as_numpy(loaded[name]), leaf, name)
    if config.model_type == "t5":
        head = np.asarray(made.as_numpy(loaded["lm_head.weight"]), np.float32)
        tied = np.array_equal(head, np.asarray(merged["shared.weight"], np.float32))
        assert tied == ("lm_head.weight" not in merged), "an untied head is not lost"
        network = T5Network(load_base(tmp_path / "mean").config)  # a T5, so that elm opens it too
        assert network.config.vocab_size == 320


def test_what_stands_beside_the_weights_comes_from_the_donor(llama, tmp_path):
    folders = made.copies(llama, tmp_path)
    for folder in folders.values():
        (folder / "tokenizer.json").write_text("{}")
        (folder / "generation_config.json").write_text(json.dumps({"from": folder.name}))
        (folder / "conversion.log").write_text("")
    merge("mean", made.experts_of(folders), tmp_path / "merged", dtype="float32")
    merged = tmp_path / "merged"
    assert json.loads((merged / "generation_config.json").read_text()) == {"from": "expert0"}
    assert (merged / "tokenizer.json").exists() and not (merged / "conversion.log").exists()
    config = json.loads((merged / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"
    assert {leaf.dtype.name for leaf in made.values(merged).values()} == {"float32"}
    merge("task_arithmetic", made.experts_of(folders), tmp_path / "added", str(folders["base"]))
    assert json.loads((tmp_path / "added" / "generation_config.json").read_text()) == {"from": "base"}


@pytest.mark.parametrize("shard", [1.0, 1e9])
def test_shards_of_any_size(shard, llama, tmp_path):
    merge("mean", made.experts_of(llama), tmp_path / "merged", options=MergeOptions(
        quiet=True, max_shard_bytes=shard))
    files = list((tmp_path / "merged").glob("*.safetensors"))
    merged = made.values(tmp_path / "merged")
    assert len(files) == {1.0: len(merged), 1e9: 1}[shard]
    stored = [made.values(pathlib.Path(folder)) for folder in made.experts_of(llama)]
    for name, leaf in merged.items():
        made.assert_mean(leaf, [each[name] for each in stored], WEIGHTS, name)


def test_empty_leaves_and_scalars_travel(llama, tmp_path):
    folders = made.copies(llama, tmp_path)
    for number, folder in enumerate(folders.values()):
        made.set_tensors(folder, {"none": torch.zeros((3, 0)), "empty": torch.zeros(0),
                                  "scalar": torch.tensor(float(number))})
    for method in METHODS:
        merge(method, made.experts_of(folders), tmp_path / method, str(folders["base"]), weights=None)
        merged = made.values(tmp_path / method)
        assert merged["none"].shape == (3, 0) and merged["empty"].shape == (0,)
        assert merged["scalar"].shape == () and np.isfinite(merged["scalar"])


# ---- models of our own, of T5X and of Hugging Face


def leaves_of(folder) -> dict[str, np.ndarray]:
    return trees.flatten(load_base(folder).params)


def assert_mean_of_models(folder):
    merged = leaves_of(folder)
    assert set(merged) == set(trees.flatten(made.params(0)))
    for path, leaf in merged.items():
        made.assert_mean(np.asarray(leaf), [trees.flatten(made.params(number))[path] for number in range(3)],
                         WEIGHTS, path)


@pytest.mark.parametrize(("kind", "target"), [
    ("elm", None), ("elm", "t5x"), ("t5x", None), ("t5x", "hf"), ("mixed", None), ("mixed", "elm")])
def test_models_of_every_kind_merge_into_every_kind(kind, target, models, tmp_path):
    folders = models.get(kind) or [models["t5x"][0], models["elm"][1], models["hf"][2]]
    merge("mean", folders, tmp_path / "merged", options=MergeOptions(quiet=True, target=target))
    found = detect.open_model(tmp_path / "merged")
    assert found.kind == (target or {"mixed": "t5x"}.get(kind, kind))
    assert_mean_of_models(tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("method", ["ties", "dare_ties", "slerp"])
def test_other_methods_on_models(method, models, tmp_path):
    merge(method, models["elm"][:2], tmp_path / "merged", models["elm"][2])
    marks = [trees.fingerprint(made.params(number)) for number in range(2)]
    flat = [trees.flatten(made.params(number)) for number in range(3)]
    for path, leaf in leaves_of(tmp_path / "merged").items():
        base = flat[2][path] if METHODS[method].needs_base else None
        same_bits(np.asarray(leaf), expected_leaf(method, path, [flat[0][path], flat[1][path]], base, marks),
                  path)


def test_models_of_hugging_face_merge_as_they_lie_and_elm_opens_the_result(models, tmp_path):
    merge("mean", models["hf"], tmp_path / "merged")
    assert detect.open_model(tmp_path / "merged").kind == "hf"
    assert (tmp_path / "merged" / "merge.json").exists()
    assert_mean_of_models(tmp_path / "merged")


def test_a_merged_model_says_what_it_was_made_of(models, tmp_path):
    merge("mean", models["elm"], tmp_path / "merged")
    training = json.loads((tmp_path / "merged" / "base.json").read_text())["training"]["merged"]
    assert [parent["path"] for parent in training["parents"]] == models["elm"]
    assert [parent["weight"] for parent in training["parents"]] == pytest.approx(np.divide(WEIGHTS, 1.2))


def test_models_of_unlike_networks_are_refused(models, tmp_path):
    other = pathlib.Path(shutil.copytree(models["elm"][0], tmp_path / "other"))
    value = json.loads((other / "base.json").read_text())
    value["network"]["relative_attention_max_distance"] = 64
    (other / "base.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"unlike networks(.|\n)*attention_max_distance: 128 and 64"):
        merge("mean", [models["elm"][1], str(other)], tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


# ---- experts


@pytest.mark.parametrize(("form", "method"), [
    ("adapter", "mean"), ("adapter", "ties"), ("adapter", "dare_linear"), ("full", "task_arithmetic"),
    ("full", "slerp")])
def test_experts_merge_overlay_by_overlay(form, method, experts, tmp_path):
    merge(method, experts[form], tmp_path / "merged", experts["base"], options=MergeOptions(
        quiet=True, expert_id="mine"))
    merged = load_expert(tmp_path / "merged")
    network, params = resolve(made.base(), merged)
    assert trees.first_difference(params, network.abstract_params()) is None and merged.card.id == "mine"
    used = [made.expert(form, number) for number in range(len(chosen(method, experts[form])))]
    marks = [trees.fingerprint(expert.overlay) for expert in used]
    base = trees.flatten(made.base().params)
    for path, leaf in trees.flatten(merged.overlay).items():
        own = [trees.flatten(expert.overlay)[path] for expert in used]
        under = base.get(path, np.zeros_like(own[0])) if METHODS[method].needs_base else None
        same_bits(np.asarray(leaf), expected_leaf(method, path, own, under, marks), path)
    assert [parent["fingerprint"] for parent in merged.card.parents] == marks
    assert {parent["kind"] for parent in merged.card.parents} == {used[0].card.kind}
    assert merged.card.merging[0]["method"] == method


def test_prompt_experts_merge_with_prompt_experts_of_their_base_only(experts, models, tmp_path):
    for other, message in ((experts["full"][0], "unlike kind"), (experts["lora"][0], "unlike network"),
                           (models["elm"][0], "Experts and whole models cannot be merged")):
        with pytest.raises(InputError, match=message):
            merge("mean", [experts["adapter"][0], other], tmp_path / "x", weights=None)
    with pytest.raises(InputError, match="belong to another base"):
        merge("task_arithmetic", experts["adapter"], tmp_path / "x", models["elm"][1])
    with pytest.raises(InputError, match="no form of merged experts"):
        merge("mean", experts["adapter"], tmp_path / "x", options=MergeOptions(quiet=True, target="hf"))
    assert not list(tmp_path.iterdir())


def test_an_expert_that_was_changed_is_refused(experts, tmp_path):
    spoilt = pathlib.Path(shutil.copytree(experts["adapter"][0], tmp_path / "spoilt"))
    mark = trees.fingerprint(made.expert("adapter", 0).overlay)
    text = (spoilt / "expert.json").read_text()
    (spoilt / "expert.json").write_text(text.replace(mark, "sha256:" + 64 * "0"))
    with pytest.raises(InputError, match=r"not those that were written(.|\n)*spoilt"):
        merge("mean", [experts["adapter"][1], str(spoilt)], tmp_path / "x", weights=None)


# ---- low-rank updates


def updates(overlay) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The factors, down and up, by the path they share."""
    flat = trees.flatten(overlay)
    return {path.removesuffix("down/kernel"): (flat[path].astype(np.float64),
                                               flat[path.replace("down/", "up/")].astype(np.float64))
            for path in flat if path.endswith("_adapter/down/kernel") or "/down/kernel" in path}


def scale_of(expert) -> float:
    adapter = expert.card.network["adapter"]
    return adapter["alpha"] / adapter["rank"] if adapter.get("alpha") is not None else 1.0


def products(number: int) -> dict[str, np.ndarray]:
    expert = made.expert("lora", number)
    return {path: scale_of(expert) * (down @ up) for path, (down, up) in updates(expert.overlay).items()}


@pytest.mark.parametrize(("method", "factors"), [
    ("mean", np.divide(WEIGHTS, 1.2)), ("linear", np.divide(WEIGHTS, 1.2)),
    ("task_arithmetic", np.multiply(WEIGHTS, 0.9))])
def test_weighted_sums_of_low_rank_updates_are_exact(method, factors, experts, tmp_path):
    """Of unlike ranks and scales; not the product of averaged factors. Exact but for float32's rounding."""
    merge(method, experts["lora"], tmp_path / "merged", experts["base"])
    merged = load_expert(tmp_path / "merged")
    assert merged.card.network["adapter"]["rank"] == 2 + 3 + 2
    dense = [products(number) for number in range(3)]
    found = updates(merged.overlay)
    assert set(found) == set(dense[0]) and len(found) > 3
    for path, (down, up) in found.items():
        expected = sum(factor * own[path] for factor, own in zip(factors, dense, strict=True))
        np.testing.assert_allclose(scale_of(merged) * (down @ up), expected, rtol=0,
                                   atol=4 * cases.EPSILON * np.abs(expected).max(), err_msg=path)
    resolve(made.base(), merged)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "slerp", "mean"])
@pytest.mark.parametrize("rank", [3, 64])
def test_other_merges_of_updates_lose_as_little_as_they_must(method, rank, experts, tmp_path):
    """By Eckart and Young, against the merge of the dense products; at full rank only float32's rounding."""
    merge(method, experts["lora"], tmp_path / "merged", experts["base"],
          options=MergeOptions(quiet=True, rank=rank))
    merged = load_expert(tmp_path / "merged")
    count = len(chosen(method, experts["lora"]))
    marks = [trees.fingerprint(made.expert("lora", number).overlay) for number in range(count)]
    dense = [products(number) for number in range(count)]
    for path, (down, up) in updates(merged.overlay).items():
        wide = [own[path].astype(np.float32) for own in dense]
        base = np.zeros_like(wide[0]) if METHODS[method].needs_base else None
        case = cases.Case(method, wide, base, WEIGHTS[:count], given(method), marks, None, path)
        expected = cases.REFERENCE[method](case).values
        sizes = np.linalg.svd(expected, compute_uv=False)
        kept = min(rank, *expected.shape)
        assert down.shape[1] == up.shape[0] and np.linalg.matrix_rank(down @ up) <= kept
        error = np.linalg.norm(scale_of(merged) * (down @ up) - expected)
        limit = np.linalg.norm(sizes[kept:])
        assert error <= limit + 1e-5 * np.linalg.norm(expected), path
        assert rank != 64 or limit < 1e-12


# ---- the plan


@pytest.mark.parametrize("method", ["mean", "ties", "slerp"])
def test_a_dry_run_writes_nothing_and_counts_the_files_bytes(method, capsys, llama, tmp_path):
    folders = chosen(method, made.experts_of(llama))
    words = ["--method", method, *folders]
    if METHODS[method].needs_base:
        words += ["--base", llama["base"]]
    status, out, _ = made.run(capsys, *words, "--dry_run", "--json", "--output", tmp_path / "merged")
    plan = json.loads(out)
    assert status == 0 and not list(tmp_path.iterdir())
    read = [*folders, *([llama["base"]] if METHODS[method].needs_base else [])]
    assert plan["bytes_to_read"] == sum(tensor_bytes(pathlib.Path(folder)) for folder in read)
    assert made.run(capsys, *words, "--output", tmp_path / "merged", "--json")[0] == 0
    assert plan["bytes_to_write"] == tensor_bytes(tmp_path / "merged")
    assert plan["num_parameters"] == sum(leaf.size for leaf in made.values(tmp_path / "merged").values())
    assert {row["leaf"] for row in plan["leaves"]} == set(made.values(tmp_path / "merged"))
    assert 1e8 < plan["memory_bytes"] < 1e9


def tensor_bytes(folder: pathlib.Path) -> int:
    """Of all files of weights, without their headers."""
    return sum(path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
               for path in folder.glob("*.safetensors"))


def test_a_dry_run_in_words(capsys, experts, models, tmp_path):
    for folders in (experts["lora"], models["t5x"]):
        status, _, err = made.run(capsys, "--dry-run", *folders)
        assert status == 0 and "parameters; reads" in err and "needs about" in err
    assert not list(tmp_path.iterdir())


def test_the_plan_of_a_large_merge_needs_no_more_memory_for_more_models(llama):
    folders = made.experts_of(llama)
    two, nine = (plan_merge(plain_config("mean", folders[:1] * count, None, None, {}), QUIET).summary(2)
                 for count in (2, 9))
    assert nine["bytes_to_read"] == 4.5 * two["bytes_to_read"]
    assert nine["memory_bytes"] < 1.2 * two["memory_bytes"]


# ---- from a library


def test_library_routing_merge(capsys, world, tmp_path):
    words = ["--library", world.folder / "library", "--task", "mini_review__good_or_bad", "--queries", 12,
             "--module", "elm_jax.tasks.embedded"]
    assert main.main(["route", *map(str, words), "--json"]) == 0
    ranking = json.loads(capsys.readouterr().out)["ranking"]
    words += ["--top_k", 2]
    overlays = {name: trees.flatten(world.library.load(name).overlay) for name in world.library}
    for by, column in (("votes", "votes"), ("similarity", "mean_similarity")):
        status, _, err = made.run(capsys, *words, "--weights", by, "--output", tmp_path / by, "--json")
        assert status == 0, err
        shares = np.asarray([row[column] for row in ranking], float)
        shares /= shares.sum()
        merged = load_expert(tmp_path / by)
        assert [parent["id"] for parent in merged.card.parents] == [row["expert"] for row in ranking]
        assert [parent["weight"] for parent in merged.card.parents] == pytest.approx(list(shares))
        for path, leaf in trees.flatten(merged.overlay).items():
            own = [overlays[row["expert"]][path] for row in ranking]
            made.assert_mean(np.asarray(leaf), own, shares, path)
    status, _, err = made.run(capsys, *words, "--weights", "fame", "--output", tmp_path / "x")
    assert status == 2 and "--weights are not numbers" in err
    assert not (tmp_path / "x").exists()
