"""`elm train` and `elm evaluate` with adapters in some layers, and the states below them kept."""

import json

import numpy as np
import pytest
import small_decoder
import tiny_study as tiny
import weights
from processes import ROUNDING, Run

from elm_jax.cli.main import main
from elm_jax.errors import InputError
from elm_jax.experts.base import load_base, save_base
from elm_jax.experts.overlay import load_expert, resolve
from elm_jax.models import families
from elm_jax.models.decoder.config import DecoderConfig
from elm_jax.runtime import trees
from elm_jax.training.trunk import trunk_cache
from elm_jax.workflows.merge.in_memory import merge
from elm_jax.workflows.train.train_config import TrainConfig

TASKS = (tiny.TOPIC, tiny.REVIEW)
UPPER = ("--gin.ADAPTER_LAYERS='upper 1'", "--gin.TRUNK_DROPOUT=False")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base of three layers; an expert of the upper one, trained with and without kept states."""
    folder = tmp_path_factory.mktemp("trunk")
    (folder / "tokenizer.json").write_bytes(small_decoder.tokenizer())
    config = DecoderConfig(258, 16, 2, 1, 8, 32, 3, 128, tied_head=True, pad_id=3)
    params = weights.drawn(families.network_of(config))
    save_base(folder / "base", params, config, folder / "tokenizer.json", {})
    assert train(folder, "plain", TASKS[0], *UPPER) == 0
    assert train(folder, "cached", TASKS[0], *UPPER, cached(folder)) == 0
    return folder


def cached(folder) -> str:
    return f"--gin.TRUNK_CACHE='{folder / 'states'}'"


def train(folder, name, task, *more, kind="prompt"):
    return main(train_words(folder, name, task, *more, kind=kind))


def train_words(folder, name, task, *more, kind="prompt"):
    return [
        "train", "--gin_file", f"gin/experts/{kind}.gin", f"--gin.MODEL_DIR='{folder / name}'",
        f"--gin.INITIAL_CHECKPOINT_PATH='{folder / 'base'}'", f"--gin.TASK='{task}'",
        f"--gin.PREPARED_DIR='{folder / 'prepared'}'", "--gin.TASK_MODULES=('elm_jax.tasks.embedded',)",
        "--gin.MESH_DATA=1", "--gin.BATCH_SIZE=2", "--gin.EPOCHS=None", "--gin.TRAIN_STEPS=4",
        "--gin.LEARNING_RATE=1e-2", "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 16}",
        "--gin.train.tensorboard=False", "--gin.train.log_period=1", *more]


def losses_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def check_same(one, other):
    ours, theirs = (trees.flatten(load_expert(each).overlay) for each in (one, other))
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=0, atol=2e-4, err_msg=path)


def test_kept_states_train_the_same_expert(folder):
    plain, kept = (load_expert(folder / name) for name in ("plain", "cached"))
    np.testing.assert_allclose(losses_of(folder / "cached"), losses_of(folder / "plain"), rtol=1e-5)
    check_same(folder / "cached", folder / "plain")
    assert kept.card.training["config_digest"] == plain.card.training["config_digest"], "no other result"
    assert list((folder / "states").glob("*/*.rows"))


def test_an_expert_has_leaves_from_its_lowest_layer_on(folder):
    base, expert = load_base(folder / "base"), load_expert(folder / "cached")
    paths = trees.flatten(expert.overlay)
    assert {path.split("/")[1] for path in paths} == {"layers_2", "final_norm"}
    assert sum("_norm/" in path for path in paths) == 3 and any("_adapter/" in path for path in paths)
    assert expert.card.network["adapter"] == {"bottleneck": None, "layers": [2]}
    network, params = resolve(base, expert)
    assert trees.first_difference(params, network.abstract_params()) is None
    merged = merge([expert, load_expert(folder / "plain")], method="mean")
    assert merged.card.network == expert.card.network and trees.flatten(merged.overlay).keys() == paths.keys()


def test_a_stack_uses_the_states_of_earlier_runs(folder, monkeypatch):
    computed, real = [], trunk_cache._compiled
    monkeypatch.setattr(trunk_cache, "_compiled", lambda *given: computed.append(given) or real(*given))
    more = [*UPPER, cached(folder), "--gin.STACK_EXPERTS=2"]
    assert train(folder, "stack", ",".join(TASKS), *more, kind="prompt_stack") == 0
    assert 0 < len(computed) <= 4, "those of the second task"
    check_same(folder / "stack" / TASKS[0], folder / "plain")


@pytest.mark.slow
def test_two_processes_share_a_cache(folder, tmp_path, monkeypatch):
    """Each computes the states of its own rows; one process finds all of them later."""
    kept = f"--gin.TRUNK_CACHE='{tmp_path / 'states'}'"
    words = train_words(folder, "two", TASKS[0], *UPPER, kept, "--gin.MESH_DATA=2")
    run = Run(tmp_path / "log", words, devices=1)
    assert run.wait() == [0, 0], run.said()
    np.testing.assert_allclose(losses_of(folder / "two"), losses_of(folder / "plain"), rtol=ROUNDING)
    assert len(list(tmp_path.glob("states/*/*.rows"))) >= 2, "of each process"
    monkeypatch.setattr(trunk_cache, "_compiled", None)  # there is nothing left to compute
    assert train(folder, "one", TASKS[0], *UPPER, kept) == 0
    check_same(folder / "one", folder / "two")
    words = train_words(folder, "wrong", TASKS[0], *UPPER, kept, "--gin.MESH_MODEL=2")
    run = Run(tmp_path / "log", words, devices=1)
    assert run.wait() == [2, 2] and "model axis spans processes" in run.said()


def test_scores_are_the_same_with_kept_states(folder, monkeypatch):
    computed, real = [], trunk_cache._compiled
    monkeypatch.setattr(trunk_cache, "_compiled", lambda *given: computed.append(given) or real(*given))
    words = ["--base", str(folder / "base"), "--max_rows", "6", "--mesh_data", "1", "--source_length", "64",
             "--module", "elm_jax.tasks.embedded", "--max_new_tokens", "3", "--prepared",
             str(folder / "prepared"), *(word for task in TASKS for word in ("--task", task))]
    experts = {"plain": ["plain"], "cached": ["cached"], "both": ["plain", f"stack/{TASKS[1]}"]}
    rows = {}
    for name, more in {"whole": [], "kept": ["--trunk_cache", str(folder / "states")]}.items():
        for expert, members in experts.items():
            output = folder / name / expert / "results.jsonl"
            given = [word for member in members for word in ("--expert", str(folder / member))]
            stack = ["--stack_experts", str(len(members) if more else 1)]
            assert main(["evaluate", *words, *given, "--output", str(output), *stack, *more]) == 0
            predictions = sorted((output.parent / "predictions").rglob("*.jsonl"))
            rows[name, expert] = [json.loads(line) for path in predictions
                                  for line in path.read_text().splitlines()]
            computed.append(None)
    ends = [number for number, each in enumerate(computed) if each is None]
    assert ends[:3] == [0, 1, 2] and ends[3] > 3, "computed for the first expert"
    assert ends[4:] == [ends[3] + 1, ends[3] + 2], "and for no other"
    for expert in experts:
        assert rows["kept", expert]
        for found, expected in zip(rows["kept", expert], rows["whole", expert], strict=True):
            np.testing.assert_allclose(found.pop("scores", 0), expected.pop("scores", 0), rtol=0, atol=2e-5)
            assert found == expected


WRONG = [
    ({"trunk_cache": "x"}, "States that are kept have no dropout"),
    ({"trunk_cache_bytes": 10}, "no trunk_cache"),
    ({"trunk_dropout": False, "dropout_rate": 0.0}, "dropout_rate is 0"),
    ({"kind": "dataset", "adapter_layers": "upper 2"}, "trains every leaf"),
    *(({"adapter_layers": layers}, r"cannot be read\n  where: AdapterConfig\.layers")
      for layers in ("2-x", "3-1", "upper 0", (-1, 2), ())),
    ({"kind": "multitask", "trunk_cache": "x"}, "trains every leaf"),
    ({"trunk_cache": "x", "trunk_dropout": False, "trunk_cache_bytes": 0}, "above 0"),
]


@pytest.mark.parametrize(("settings", "words"), WRONG)
def test_settings_without_effect_are_errors(settings, words):
    with pytest.raises(InputError, match=words):
        TrainConfig(**{"model_dir": "a", "task": "b", "initial_checkpoint_path": "c", "train_steps": 1,
                       **settings})


@pytest.mark.parametrize(("words", "message"), [
    (["--gin.ADAPTER_LAYERS='upper 9'"], "not the network's"),
    (["--gin.ADAPTER_LAYERS='lower 1'"], "cannot be read"),
    (["--gin.ADAPTER_LAYERS=(1, 1)"], "cannot be read"),
    (["--gin.TRUNK_DROPOUT=False"], "adapters and norms in all layers"),
    (["--gin.ADAPTER_LAYERS=(0,)", "--gin.TRUNK_CACHE='x'", "--gin.DROPOUT_RATE=0"], "adapter_layers=(0,)"),
    (["--gin.ADAPTER_LAYERS='upper 1'", "--gin.TRUNK_CACHE='gs://x/y'", "--gin.DROPOUT_RATE=0"], "bucket"),
])
def test_wrong_layers_are_one_error_and_nothing_is_written(folder, words, message, capsys):
    assert train(folder, "wrong", TASKS[0], *words) == 2
    assert message in capsys.readouterr().err and not (folder / "wrong").exists()
