"""A family that no line outside of models/ and the tests knows of goes through the ordinary verbs.

Its batches are joined, its EOS is 2, id 0 is a real token, its norms have biases (`small_decoder`).
"""

import json

import jax
import numpy as np
import pytest
import small_decoder
import tiny_study as tiny
import weights

from elm_jax.cli.main import main
from elm_jax.data.preparing.task_data import TaskData
from elm_jax.evaluation.evaluator import EvaluationSettings
from elm_jax.experts.base import load_base, save_base
from elm_jax.experts.overlay import load_expert, resolve
from elm_jax.models import families
from elm_jax.models.network import NORM
from elm_jax.runtime import trees
from elm_jax.types import Padded
from elm_jax.workflows.evaluate.evaluate_models import evaluate

TASK, HEADLINE, MIXTURE = tiny.TOPIC, "mini_headline__write_a_headline", "mini_topic"
COMMON = ["--gin.MESH_DATA=1", "--gin.TASK_MODULES=('elm_jax.tasks.embedded',)",
          "--gin.BATCH_SIZE=4", "--gin.EPOCHS=None",
          "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 16}", "--gin.train.tensorboard=False"]
MODULE = ["--module", "elm_jax.tasks.embedded"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base of the family, and experts that `elm train` made of it; the family is in the table meanwhile."""
    folder = tmp_path_factory.mktemp("second")
    with small_decoder.with_family():
        (folder / "tokenizer.json").write_bytes(small_decoder.tokenizer())
        config = small_decoder.SmallDecoderConfig(vocab_size=258)
        params = weights.drawn(families.network_of(config))
        save_base(folder / "base", params, config, folder / "tokenizer.json", {})
        train(folder, "prompt", "topic", TASK, "--gin.train.expert_id='topic'")
        train(folder, "prompt", "review", tiny.REVIEW, "--gin.train.expert_id='review'")
        train(folder, "dataset", "whole", MIXTURE, "--gin.TRAIN_STEPS=12", "--gin.train.log_period=1")
        yield folder


def train(folder, kind, name, task, *more):
    words = ["train", "--gin_file", f"gin/experts/{kind}.gin", f"--gin.MODEL_DIR='{folder / name}'",
             f"--gin.INITIAL_CHECKPOINT_PATH='{folder / 'base'}'", f"--gin.TASK='{task}'",
             "--gin.TRAIN_STEPS=3", "--gin.LEARNING_RATE=1e-2",
             f"--gin.PREPARED_DIR='{folder / 'prepared'}'", *COMMON, *more]
    assert main(words) == 0


def test_training_learns_and_trains_what_it_should(folder):
    base, expert = load_base(folder / "base"), load_expert(folder / "topic")
    network, _ = resolve(base, expert)
    overlay, start = trees.flatten(expert.overlay), trees.flatten(base.params)
    assert isinstance(network.config, small_decoder.SmallDecoderConfig) and network.config.adapter is not None
    assert json.loads((folder / "topic" / "expert" / "expert.json").read_text())["network"]["family"] == (
        "small_decoder")
    norms = {path for path in start if network.role_of(path) == NORM}
    assert any(path.endswith("/bias") for path in norms)
    assert overlay.keys() - start.keys() and overlay.keys() & start.keys() == norms
    assert all(np.any(np.asarray(overlay[path]) != start[path]) for path in norms)
    rows = [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])


def test_scores_are_those_of_the_network_alone(folder):
    """`elm evaluate` against sums of `target_log_probs`, one row and one choice at a time."""
    base, expert = load_base(folder / "base"), load_expert(folder / "topic")
    data = TaskData(base.vocabulary, tiny.MODULES, str(folder / "prepared"))
    split = data.split(TASK, "validation", 6)
    output = folder / "results" / "results.jsonl"
    words = ["evaluate", "--base", str(folder / "base"), "--expert", str(folder / "topic" / "expert"),
             "--expert", str(folder / "review" / "expert"), "--task", TASK, "--task", HEADLINE,
             "--max_rows", "6", "--output", str(output), "--source_length", "48", "--max_new_tokens", "6",
             "--prepared", str(folder / "prepared"), *MODULE]
    assert main(words) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {(row["expert"], row["task"]) for row in rows} == {
        (name, task) for name in ("topic", "review") for task in (TASK, HEADLINE)}
    network, params = resolve(base, expert)
    score = jax.jit(network.target_log_probs)
    right = 0
    for number in range(len(split)):
        prompt = split.inputs(number)[:-1][:48]  # without EOS: the choice follows
        found = []
        for choice in split.choices(number):
            assert choice[-1] == 2
            one = np.full((1, 1, 24), 0, np.int32)
            one[0, 0, :len(choice)] = choice
            wide = np.full((1, 48), 0, np.int32)
            wide[0, :len(prompt)] = prompt
            found.append(float(score(params, Padded(wide, np.array([len(prompt)])),
                                     Padded(one, np.array([[len(choice)]]))).sum()))
        right += int(np.argmax(found)) == split.label(number)
    own, = (row for row in rows if (row["expert"], row["task"]) == ("topic", TASK))
    assert own["value"] == pytest.approx(right / len(split))
    settings = EvaluationSettings(source_length=48, max_new_tokens=6)
    again = evaluate(base, expert, tasks=[TASK], data=data, settings=settings, max_rows=6)
    assert again[0]["value"] == own["value"]


def test_experts_merge_and_the_library_routes(folder, capsys):
    experts = [str(folder / name / "expert") for name in ("topic", "review")]
    assert main(["merge", "--output", str(folder / "merged"), *experts]) == 0
    merged, parents = load_expert(folder / "merged"), [load_expert(expert) for expert in experts]
    first, second = (trees.flatten(parent.overlay) for parent in parents)
    for path, leaf in trees.flatten(merged.overlay).items():
        np.testing.assert_allclose(leaf, (first[path] + second[path]) / 2, rtol=0, atol=1e-6)
    network, params = resolve(load_base(folder / "base"), merged)
    assert trees.first_difference(params, network.abstract_params()) is None
    assert main(["library", "build", "--library", str(folder / "lib"), "--base", str(folder / "base"),
                 "--encoder", "tfidf", "--instances", "20", "--prepared", str(folder / "prepared"), *MODULE,
                 *experts]) == 0
    capsys.readouterr()
    assert main(["route", "--library", str(folder / "lib"), "--task", TASK, "--queries", "8", "--json",
                 "--top_k", "1", *MODULE]) == 0
    assert json.loads(capsys.readouterr().out)["ranking"][0]["expert"] == "topic"


def test_a_base_is_converted_to_itself_and_to_nothing_else(folder, capsys):
    target = folder / "copy"
    assert main(["convert", "--from", "elm", "--to", "elm", str(folder / "base"), str(target)]) == 0
    assert load_base(target).fingerprint == load_base(folder / "base").fingerprint
    assert load_base(target).vocabulary.eos_id == 2
    capsys.readouterr()
    for kind in ("hf", "t5x"):
        status = main(["convert", "--from", "elm", "--to", kind, str(folder / "base"), str(folder / kind)])
        text = capsys.readouterr().err
        assert status == 2 and "small_decoder" in text and not (folder / kind).exists(), text


def test_a_vocabulary_of_other_ids_is_refused(folder, tmp_path, capsys):
    """A T5's vocabulary beside this family's network: EOS would never come."""
    config = small_decoder.SmallDecoderConfig(vocab_size=400)
    params = weights.drawn(families.network_of(config))
    (tmp_path / "vocabulary.json").write_text(json.dumps(
        {"schema_version": 1, "kind": "bytes", "extra_ids": 125}))
    save_base(tmp_path / "base", params, config, tmp_path / "vocabulary.json", {})
    status = main(["tasks", "show", TASK, "--base", str(tmp_path / "base"), *MODULE])
    text = capsys.readouterr().err
    assert status == 2 and "EOS = 1" in text and "EOS = 2" in text
