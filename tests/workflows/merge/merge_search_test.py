"""Searching merge weights: which rows are used, what is found, and what is written down."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import tiny_model as tiny
import tiny_study
from t5_rows import FORM
from t5_rows import rows as padded_rows

from elm_jax.cli import main
from elm_jax.data.arrays.batches import padded
from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.errors import InputError
from elm_jax.evaluation import rank
from elm_jax.evaluation.batch_plan import TaskInstances, plan_batches
from elm_jax.evaluation.evaluation_settings import EvaluationSettings
from elm_jax.experts.base import Base
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.overlay import Expert, load_expert, resolve
from elm_jax.models import AdapterConfig, T5Network
from elm_jax.models.adapters.kind import is_adapter_leaf
from elm_jax.models.decode import greedy
from elm_jax.models.t5.network import is_norm_leaf
from elm_jax.runtime import sharding, trees
from elm_jax.workflows.choices import SEARCHES
from elm_jax.workflows.merge import search_merge, search_objective
from elm_jax.workflows.merge.in_memory import merge
from elm_jax.workflows.merge.search_merge import (
    SearchConfig,
    choose_instances,
    search_and_merge,
    search_weights,
)

NETWORK = tiny.network()
BEST = 1
ROWS = 40


@functools.cache
def base() -> Base:
    params, _ = trees.split(tiny.parameters(NETWORK), lambda path: not is_adapter_leaf(path))
    return Base("tiny", params, tiny.network(adapter=False).config, trees.fingerprint(params),
                tiny.vocabulary())


@functools.cache
def experts() -> tuple[Expert, ...]:
    def overlay(seed: int) -> dict:
        return trees.split(tiny.parameters(NETWORK, seed),
                           lambda path: is_adapter_leaf(path) or is_norm_leaf(path))[0]

    return tuple(Expert(ExpertCard(id=f"e{number}", kind="prompt", form="adapter", base=base().reference(),
                                   network=NETWORK.config.to_dict(), tasks=(f"toys__{number}",)),
                        overlay(10 + number)) for number in range(3))


@functools.cache
def answers(kind: str) -> list:
    """What the best expert itself answers: the task is then its own."""
    params = trees.merge(base().params, experts()[BEST].overlay)
    if kind == "generation":
        inputs = np.stack([np.resize(row["inputs"], 24) for row in tiny.generation_rows(ROWS)])
        return [row[:int(np.argmax(row == 1)) + 1 if (row == 1).any() else 6]
                for row in np.asarray(greedy(NETWORK, params, padded_rows(inputs), max_length=6))]
    found = np.zeros(ROWS, int)
    instances = TaskInstances.of(tiny.split_of(tiny.rank_rows(ROWS), "rank"), NETWORK, SETTINGS)
    for shape, numbers in plan_batches(instances, SETTINGS, 1):
        batch = instances.batch(shape, numbers)
        scores = np.asarray(rank.score_choices(NETWORK, params, padded(batch, "inputs"), padded(batch,
                                                                                                "choices")))
        found[numbers] = rank.predict(scores[:len(numbers)], [len(instances.choices[n]) for n in numbers])
    return found.tolist()


SETTINGS = EvaluationSettings(source_length=24, tokens_per_batch=2000)


def rows(kind: str) -> list[dict]:
    if kind == "rank":
        return [{**row, "label": label, "text": {**row["text"], "targets": row["text"]["choices"][label]}}
                for row, label in zip(tiny.rank_rows(ROWS), answers(kind), strict=True)]
    return [{**row, "inputs": np.resize(row["inputs"], 24), "targets": answer}
            for row, answer in zip(tiny.generation_rows(ROWS), answers(kind), strict=True)]


@dataclasses.dataclass
class Data:
    """In the place of `TaskData`: splits of one task, read with the limits that are noted."""

    splits: dict[str, PreparedSplit]
    vocabulary: object = None

    def split(self, task, split, max_rows=None):
        found = self.splits[split]
        return found if max_rows is None else found.subset(max_rows)

    def has_rows(self, task, split, max_rows=None):
        return split in self.splits


def data(kind: str = "rank", *splits: str, change=lambda row: row) -> Data:
    made = tiny.split_of([change(row) for row in rows(kind)], kind)
    return Data({name: dataclasses.replace(made, split=name) for name in splits or ("train", "validation")})


def config(**changes) -> SearchConfig:
    return SearchConfig(**{
        "experts": ("e0", "e1", "e2"), "base": "tiny", "task": "toys_small__ask_it", "num_examples": 12,
        "steps": 6, "population": 8, "learning_rate": 0.5, "source_length": 24, "max_new_tokens": 6,
        "tokens_per_batch": 2000, "compare": False, **changes})


def run(chosen: SearchConfig, own: Data | None = None):
    return search_weights(chosen, base=base(), experts=experts(), data=own or data(),
                          mesh=sharding.make_mesh(1, 1))


@pytest.mark.parametrize("kind", ["rank", pytest.param("generation", marks=pytest.mark.slow)])
@pytest.mark.parametrize("search", SEARCHES)
def test_the_expert_whose_task_it_is_gets_the_largest_weight(search, kind):
    found = run(config(search=search), data(kind))
    assert np.argmax(found.weights) == BEST and max(found.weights) > 0.5
    objective = found.report["objective"]
    assert np.argmin(objective["alone"]) == BEST
    assert objective["found"] < objective["start"] == pytest.approx(objective["uniform_mean"], rel=1e-5)
    assert objective["found"] == min(objective["history"])
    assert [expert["weight"] for expert in found.report["experts"]] == list(found.weights)


@pytest.mark.slow
def test_an_expert_alone_scores_as_itself_whatever_method_is_searched():
    """TIES trims even a single expert; its column "alone" must not."""
    few = {"search": "evolution", "steps": 1}
    mean, ties = run(config(**few)), run(config(**few, method="ties", parameters={"density": 0.2}))
    assert ties.report["objective"]["alone"] == pytest.approx(mean.report["objective"]["alone"], rel=3e-6)
    assert ties.report["objective"]["uniform_mean"] == pytest.approx(
        mean.report["objective"]["uniform_mean"], rel=3e-6)
    assert ties.report["objective"]["start"] != pytest.approx(mean.report["objective"]["start"], rel=1e-3)


@pytest.mark.parametrize("search", [pytest.param(search, marks=[pytest.mark.slow] * (search == "gradient"))
                                    for search in SEARCHES])
def test_one_seed_is_one_result(search):
    first, again, other = (run(config(search=search, seed=seed, steps=2)) for seed in (3, 3, 4))
    assert first.weights == again.weights
    assert {**first.report, "seconds": 0} == {**again.report, "seconds": 0}
    assert first.report["rows"] != other.report["rows"] and first.weights != other.weights


def test_without_labels_the_answers_change_nothing():
    def permuted(row):
        label = (row["label"] + 1) % len(row["choices"])
        return {**row, "label": label, "targets": row["choices"][label],
                "text": {**row["text"], "targets": row["text"]["choices"][label]}}

    without = data(change=lambda row: {**row, "label": -1})
    blind, seeing = config(labelled=False, steps=3), config(steps=3)
    assert run(blind).weights == run(blind, data(change=permuted)).weights == run(blind, without).weights
    assert run(seeing).weights != run(seeing, data(change=permuted)).weights  # or this would show nothing
    with pytest.raises(InputError, match=r"(?s)too few rows.*got: 0"):
        run(config(), without)


@pytest.mark.parametrize("split", ["test", "test_r1", "TEST", "my-test-split", "test[:32]"])
def test_a_test_split_is_refused(split):
    with pytest.raises(InputError, match="never searched on a test split"):
        config(split=split)


@pytest.mark.parametrize("split", ["validation", "latest", "train", "contest"])
def test_other_splits_are_not(split):
    assert config(split=split).split == split


def test_rows_of_validation_are_held_back_from_the_rest():
    own = data("rank", "validation")
    found = choose_instances(config(split="validation", compare=True, max_rows=30), own)
    left = search_merge.indices_of(found.held_back, range(len(found.held_back)))
    subset = own.split("", "validation", 30)
    assert len(found.rows) == 12 and len(left) == 18
    assert set(found.indices()) | set(left) == set(search_merge.indices_of(subset, range(30)))
    assert not set(found.indices()) & set(left)


def test_an_index_that_comes_twice_is_held_back_in_no_copy():
    def twice(row):
        return {**row, "text": {**row["text"], "index": row["text"]["index"] // 6}}

    own = data("rank", "validation", change=twice)
    found = choose_instances(config(split="validation", compare=True), own)
    left = search_merge.indices_of(found.held_back, range(len(found.held_back)))
    assert left and not set(found.indices()) & set(left)


def test_of_train_the_validation_split_or_the_rest_is_held_back():
    found = choose_instances(config(compare=True), data())
    assert found.split.split == "train" and found.held_back.split == "validation"
    assert len(found.held_back) == ROWS
    alone = choose_instances(config(compare=True), data("rank", "train"))
    assert alone.held_back.split == "train" and len(alone.held_back) == ROWS - 12
    left = search_merge.indices_of(alone.held_back, range(len(alone.held_back)))
    assert not set(alone.indices()) & set(left)


def test_too_few_rows_are_refused():
    with pytest.raises(InputError, match="too few rows"):
        choose_instances(config(num_examples=ROWS + 1), data())
    with pytest.raises(InputError, match=r"(?s)too few rows.*hold back"):
        choose_instances(config(num_examples=ROWS, split="validation"), data())
    assert len(choose_instances(config(num_examples=ROWS), data()).rows) == ROWS


def test_only_the_reported_rows_are_read():
    """All other rows of the split are spoiled: the search finds the same."""
    chosen = config(steps=2)
    first = run(chosen)
    used = set(first.report["rows"])
    spoiled = data(change=lambda row: row if row["text"]["index"] in used else {
        **row, "inputs": row["inputs"][::-1].copy(), "label": 0, "choices": row["choices"][::-1]})
    assert run(chosen, spoiled).weights == first.weights
    assert len(used) == 12 == len(first.report["rows"])


def test_what_is_saved_is_what_was_found(tmp_path):
    chosen = config(split="validation", compare=True, expert_id="mix", search="evolution", steps=3)
    merged, result = search_and_merge(chosen, tmp_path / "mix", base=base(), experts=experts(), data=data(),
                                      mesh=sharding.make_mesh(1, 1))
    report = json.loads((tmp_path / "mix" / "search.json").read_text())
    assert report == json.loads(json.dumps(result.report))
    card = load_expert(tmp_path / "mix").card
    assert card.id == "mix" and card.method == "mean" and card.kind == "merged"
    assert card.merging[0]["weights"] == list(result.weights)
    assert [parent["weight"] for parent in card.parents] == pytest.approx(list(result.weights), abs=1e-6)
    assert card.training["weight_search"]["rows"] == report["rows"]
    assert card.training["weight_search"]["split"] == "validation"
    held = report["held_back"]
    assert not set(held["rows"]) & set(report["rows"]) and held["num_rows"] == ROWS - 12 == len(held["rows"])
    gain = held["found"]["value"] - held["uniform_mean"]["value"]
    assert held["difference"]["value"] == pytest.approx(gain)
    assert held["difference"]["ci95_low"] <= held["difference"]["value"] <= held["difference"]["ci95_high"]
    for path, leaf in trees.flatten(merged.overlay).items():
        wanted = sum(weight * trees.flatten(expert.overlay)[path].astype(np.float64)
                     for weight, expert in zip(result.weights, experts(), strict=True))
        np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-6, err_msg=path)


def family(form: str) -> list[Expert]:
    """Two experts of another form on the same base: LoRA's of unlike rank and scale, or whole."""
    adapters = {"lora": [AdapterConfig(kind="lora", rank=2, alpha=6.0), AdapterConfig(kind="lora", rank=3)],
                "full": [None, None], "adapter": [AdapterConfig(8)] * 2}[form]
    made = []
    for number, adapter in enumerate(adapters):
        net = T5Network(dataclasses.replace(NETWORK.config, adapter=adapter))
        overlay, _ = trees.split(tiny.parameters(net, 20 + number), lambda path: (
            form == "full" or is_adapter_leaf(path) or is_norm_leaf(path)))
        card = ExpertCard(id=f"{form}{number}", kind="dataset" if form == "full" else "prompt",
                          form="full" if form == "full" else "adapter", base=base().reference(),
                          network=net.config.to_dict())
        made.append(Expert(card, overlay))
    return made


@pytest.mark.parametrize(("form", "method", "parameters"), [
    pytest.param("adapter", "dare_ties", {"density": 0.5}, marks=pytest.mark.slow),
    pytest.param("full", "ties", {"density": 0.3}, marks=pytest.mark.slow),
    pytest.param("full", "slerp", {}, marks=pytest.mark.slow),
    ("lora", "mean", {}), pytest.param("lora", "task_arithmetic", {"scale": 0.7}, marks=pytest.mark.slow)])
def test_the_merged_expert_has_the_loss_that_the_search_saw(form, method, parameters):
    chosen = config(experts=("a", "b"), method=method, parameters=parameters, steps=1, population=4,
                    search="evolution", seed=1)
    found = search_weights(chosen, base=base(), experts=family(form), data=data(),
                           mesh=sharding.make_mesh(1, 1))
    merged = merge(family(form), method=method, weights=found.weights, base=base(), **parameters)
    network, params = resolve(base(), merged)
    instances = choose_instances(chosen, data())
    batches = search_objective.make_batches(instances.split, instances.rows, labelled=True,
                                            settings=chosen.settings, form=FORM)
    score = jax.jit(search_objective.batch_loss, static_argnums=(0, 3, 4))
    loss = 0.0
    for number in range(len(batches["real"])):
        batch = {name: rows[number] for name, rows in batches.items()}
        loss += float(score(network, params, batch, "rank", True)[0])
    assert loss / len(instances.rows) == pytest.approx(found.found.objective, rel=1e-4)


def test_low_rank_updates_are_searched_in_weighted_sums_only():
    with pytest.raises(InputError, match=r"only weighted sums(.|\n)*got: ties"):
        search_weights(config(method="ties", experts=("a", "b")), base=base(), experts=family("lora"),
                       data=data())


def test_an_output_that_is_there_is_kept(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(InputError, match="exists already"):
        search_and_merge(config(), tmp_path, base=base(), experts=experts(), data=data())
    assert (tmp_path / "mine").read_text() == "precious"


def test_scoring_searched_rows_is_told(caplog):
    searched = {"split": "validation", "dataset": "toys/small", "rows": [1, 4, 7, 1000]}
    card = dataclasses.replace(experts()[0].card, training={"weight_search": searched})
    own = data()
    for split, own_card, told in (("validation", card, True), ("train", card, False),
                              ("validation", experts()[0].card, False), ("validation", None, False)):
        caplog.clear()
        search_merge.warn_of_searched_rows(own_card, own.split("", split))
        assert ("searched on 3 of the 40 rows" in caplog.text) == told, split
    other = tiny.rank_rows(ROWS)
    spaced = [{**row, "text": {**row["text"], "index": 2000 + n}} for n, row in enumerate(other)]
    search_merge.warn_of_searched_rows(card, tiny.split_of(spaced, "rank"))
    assert not caplog.text


def test_a_refused_search_writes_nothing(tmp_path):
    with pytest.raises(InputError, match="too few"):
        search_and_merge(config(num_examples=500), tmp_path / "mix", base=base(), experts=experts(),
                         data=data(), mesh=sharding.make_mesh(1, 1))
    assert not (tmp_path / "mix").exists()


def test_where_the_weights_are_looked_for():
    spaces = {method: config(experts=("a", "b"), method=method).space for method in (
        "mean", "slerp", "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")}
    assert spaces == {"mean": "simplex", "slerp": "simplex", "linear": "plane", "task_arithmetic": "free",
                      "ties": "simplex", "dare_linear": "free", "dare_ties": "free"}
    assert config(method="linear", parameters={"normalize": False}).space == "free"
    assert config(method="task_arithmetic", parameters={"normalize": True}).space == "plane"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_weights_of_any_sign_are_searched_too(method):
    found = run(config(method=method, steps=4, learning_rate=0.1, l1=0.01))
    assert np.argmax(found.weights) == BEST and found.found.objective < found.found.start


@pytest.mark.parametrize(("changes", "message"), [
    ({"search": "gradients"}, "nearest: gradient"), ({"method": "maen"}, "nearest: mean"),
    ({"l1": 0.1}, "changes nothing"), ({"population": 2}, "population"),
    ({"num_examples": 0}, "num_examples"),
    ({"parameters": {"density": 0.5}}, "parameter of mean"), ({"seed": -1}, "seed"),
    ({"labelled": 1}, "labelled"),
    ({"method": "slerp", "experts": ("a", "b"), "parameters": {"t": 0.5}}, "finds what t would say")])
def test_wrong_configs_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        config(**changes)


SEARCH = ["merge", "--search", "gradient", "--task", tiny_study.TOPIC, "--module", tiny_study.MODULES[0],
          "--num_examples", "6", "--steps", "2", "--source_length", "64", "--max_new_tokens", "16"]


def test_the_command_line_searches_merges_and_tells(world, tmp_path, capsys):
    folders = [str(world.folder / "topic"), str(world.folder / "review" / "expert")]
    shared = ["--base", world.base.path, "--prepared", str(world.folder / "prepared"), *folders]
    assert main.main([*SEARCH, *shared, "--output", str(tmp_path / "mix"), "--id", "mix"]) == 0
    told = capsys.readouterr().out
    card = load_expert(tmp_path / "mix").card
    assert tiny_study.REVIEW in told and f"{card.parents[0]['weight']:.4f}" in told
    assert "other rows (validation)" in told and told.endswith(f"{tmp_path / 'mix'}\n")
    assert card.training["weight_search"]["task"] == tiny_study.TOPIC


@pytest.mark.slow
def test_the_command_line_tells_a_search_as_json(world, tmp_path, capsys):
    folders = [str(world.folder / "topic"), str(world.folder / "review" / "expert")]
    shared = ["--base", world.base.path, "--prepared", str(world.folder / "prepared"), *folders]
    assert main.main([*SEARCH, *shared, "--output", str(tmp_path / "mix"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    card = load_expert(tmp_path / "mix").card
    assert [each["weight"] for each in found["experts"]] == card.merging[0]["weights"] and found["rows"]


@pytest.mark.parametrize(("flags", "message"), [
    ([*SEARCH, "--output", "x", "a", "b"], "needs --base"),
    ([*SEARCH, "--output", "x", "--base", "b", "--weights", "1,2", "--allow", "heads"], "--weights, --allow"),
    ([*SEARCH, "--output", "x", "--base", "b", "--search_split", "test", "a", "b"], "never searched on"),
    (["merge", "--output", "x", "a", "b", "--l1", "0.1", "--unlabelled"], "--l1, --unlabelled"),
    (["merge", "--output", "x", "a", "b", "--search_seed", "0"], "--search_seed"),
    ([*SEARCH, "--output", "x", "--base", "b", "--density", "0.5", "a", "b"], "parameter of mean")])
def test_flags_that_make_no_sense_are_refused(flags, message, capsys):
    assert main.main(flags) == 2
    assert message in capsys.readouterr().err
