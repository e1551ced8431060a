"""`python -m t5x.train` with the files of gin/t5x, on real rows; its losses against `elm train`'s."""

import pathlib
import re
import shutil

import numpy as np
import pytest

from elm_jax.errors import InputError
from elm_jax.evaluation.evaluator import EvaluationSettings, Scoring, evaluate_task
from elm_jax.experts.overlay import load_expert, resolve, save_expert
from elm_jax.models.adapters.kind import is_adapter_leaf
from elm_jax.models.t5.network import is_norm_leaf
from elm_jax.runtime import sharding, trees
from elm_jax.workflows.convert.t5x_expert import expert_from_checkpoint

pytestmark = pytest.mark.slow
RELATIVE = 1e-4


def succeeded(run):
    assert run.status == 0, run.output[-3000:]
    return run


def compare(run, losses: np.ndarray, overlay: dict, expert) -> None:
    """Every step's loss, and every leaf after the last one."""
    theirs = run.losses()
    assert theirs.shape == losses.shape == (30,)
    difference = np.abs(losses - theirs) / np.abs(theirs)
    print(f"{run.folder.name}: largest relative difference of 30 losses {difference.max():.1e}, "
          f"{theirs[0]:.3f} to {theirs[-1]:.3f}")
    assert difference.max() < RELATIVE
    assert theirs.max() - theirs.min() > 0.5  # they moved
    found = trees.flatten(expert.overlay)
    assert found.keys() == overlay.keys()
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, overlay[path], rtol=0, atol=1e-4, err_msg=path)


def dataset_run(world):
    return succeeded(world.launch("dataset", "gin/t5x/dataset.gin", MIXTURE_OR_TASK_NAME="trec"))


def prompt_run(world):
    return succeeded(world.launch(
        "prompt_adafactor", "gin/t5x/prompt_adafactor.gin", MIXTURE_OR_TASK_NAME="ag_news__classify",
        BOTTLENECK=6, INFER_EVAL="@infer_eval/DatasetConfig()"))


def adamw_run(world):
    return succeeded(world.launch(
        "prompt", "gin/t5x/prompt.gin", MIXTURE_OR_TASK_NAME="common_gen__example_prompt", BOTTLENECK=6))


def written_run(world):
    """Three steps only: after thirty the little network says the same of every input, or nothing."""
    return succeeded(world.launch(
        "written", "gin/t5x/prompt.gin", MIXTURE_OR_TASK_NAME="common_gen__example_prompt", BOTTLENECK=6,
        TRAIN_STEPS=3, INFER_EVAL="@infer_eval/DatasetConfig()"))


def test_a_dataset_expert_has_the_losses_of_elm_train(world):
    import launches

    run = dataset_run(world)
    losses, overlay = launches.elm_train(run, "trec", "adafactor", adapters=False)
    expert = expert_from_checkpoint(run.folder, world.base)
    compare(run, losses, overlay, expert)
    card = expert.card
    assert (card.id, card.kind, card.form, card.dataset) == ("trec", "dataset", "full", "trec")
    assert len(card.tasks) == 18
    assert (card.training["steps"], card.training["batch_size"], card.training["seed"]) == (30, 8, 0)


def test_t5xs_own_network_has_the_losses_of_elm_train(world):
    import launches

    run = succeeded(world.launch("minimal", "gin/t5x/dataset.gin", network="minimal.gin",
                                 MIXTURE_OR_TASK_NAME="trec"))
    losses, overlay = launches.elm_train(run, "trec", "adafactor", adapters=False)
    compare(run, losses, overlay, expert_from_checkpoint(run.folder, world.base))


def test_a_prompt_expert_has_the_losses_of_elm_train(world):
    import launches

    run = prompt_run(world)
    losses, overlay = launches.elm_train(run, "ag_news__classify", "adafactor", adapters=True)
    compare(run, losses, overlay, expert_from_checkpoint(run.folder, world.base))


def test_a_prompt_expert_by_adamw_has_the_losses_of_elm_train(world):
    import launches

    run = adamw_run(world)
    losses, overlay = launches.elm_train(run, "common_gen__example_prompt", "adamw", adapters=True)
    compare(run, losses, overlay, expert_from_checkpoint(run.folder, world.base))


@pytest.mark.parametrize("make", [prompt_run, adamw_run])
def test_only_adapters_and_norms_train_and_have_optimiser_state(world, make):
    import launches

    run = make(world)
    base = trees.flatten(world.base.params)
    before, after = (launches.parameters(run.folder / name) for name in ("checkpoint_0", "checkpoint_30"))
    for path, leaf in after.items():
        trains = is_adapter_leaf(path) or is_norm_leaf(path)
        assert np.array_equal(leaf, before[path]) != trains, path
        if not is_adapter_leaf(path):
            np.testing.assert_array_equal(before[path], base[path], err_msg=path)
    info = (run.folder / "model-info.txt").read_text()
    stated = re.findall(r"^Variable +param_states/(\S+) +size (\d+)", info, re.MULTILINE)
    kept = {path for path, size in stated if int(size) > 1}
    assert kept
    assert all(re.search(r"_adapter/|_norm/scale", path) for path in kept), kept


def test_two_partitions_give_the_same_losses(world):
    whole = prompt_run(world)
    split = succeeded(world.launch(
        "two_partitions", "gin/t5x/prompt_adafactor.gin", MIXTURE_OR_TASK_NAME="ag_news__classify",
        BOTTLENECK=6, NUM_PARTITIONS=2, MODEL_PARALLEL_SUBMESH=(1, 2), devices=8))
    info = (split.folder / "model-info.txt").read_text()
    assert re.search(r"token_embedder/embedding .*partition spec \('model', None\)", info)
    assert "global_mesh devices shape: (4, 2)" in split.output
    np.testing.assert_allclose(split.losses(), whole.losses(), rtol=1e-5)


def test_the_multitask_baseline_trains_and_evaluates_every_task(world):
    import few_tasks

    run = succeeded(world.launch(
        "multitask", "gin/t5x/multitask.gin", MIXTURE_OR_TASK_NAME="few_tasks",
        MIXTURE_OR_TASK_MODULE="few_tasks", TRAIN_STEPS=3, INFER_EVAL="@infer_eval/DatasetConfig()"))
    expert = expert_from_checkpoint(run.folder, world.base, expert_id="multitask")
    assert (expert.card.kind, expert.card.form, expert.card.dataset) == ("multitask", "full", None)
    assert set(expert.card.tasks) == set(few_tasks.TASKS)
    assert len(run.losses()) == 3
    evaluated = {path.name.removesuffix("-metrics.jsonl") for path in
                 (run.folder / "inference_eval").glob("*-metrics.jsonl")}
    assert evaluated == {
        "ag_news__classify_score_eval", "common_gen__example_prompt", "trec__trec1_score_eval"}
    assert "1 of 4 tasks have no row in split validation" in run.output


def own_evaluation(world, run, task: str, max_new_tokens: int = 1):
    """`elm evaluate`'s numbers for a launch's expert, saved and loaded on the way."""
    from elm_jax.data.preparing import seqio_tasks

    folder = run.folder / "expert"
    save_expert(folder, expert_from_checkpoint(run.folder, world.base))
    network, params = resolve(world.base, load_expert(folder))
    split = seqio_tasks.prepare(task, "validation", world.base.vocabulary_path)
    scoring = Scoring(EvaluationSettings(max_new_tokens=max_new_tokens), world.base.vocabulary,
                      sharding.make_mesh(1, 1), "base")
    return evaluate_task(network, params, split, scoring, "t5x")


def test_ranks_are_those_of_elm_evaluate(world):
    run, name = prompt_run(world), "ag_news__classify_score_eval"
    own = own_evaluation(world, run, "ag_news__classify")
    assert run.metrics(name)["rows"] == own.rows[0]["num_instances"] == 24
    assert run.metrics(name)["accuracy"] == pytest.approx(100 * own.rows[0]["value"])
    theirs = [example["score"] for example in run.inferences(name, 30)]
    ours = [score for row in own.predictions for score in row["scores"]]
    np.testing.assert_allclose(theirs, ours, rtol=1e-4)


def test_written_texts_are_those_of_elm_evaluate(world):
    from elm_jax.data.preparing import seqio_tasks

    run, name = written_run(world), "common_gen__example_prompt"
    split = seqio_tasks.prepare(name, "validation", world.base.vocabulary_path)
    longest = max(len(split.targets(number)) for number in range(len(split)))
    own = own_evaluation(world, run, name, max_new_tokens=longest)
    theirs = [example["prediction"] for example in run.inferences(name, 3)]
    assert theirs == [row["prediction"].strip() for row in own.predictions]
    assert len(set(theirs)) > 10
    assert run.metrics(name)["rouge_l"] == pytest.approx(100 * own.rows[0]["value"], abs=1e-6)


def test_a_launch_goes_on_where_it_stood(world):
    before = adamw_run(world)
    shutil.copytree(before.folder, world.folder / "resumed", ignore=shutil.ignore_patterns("expert"))
    run = succeeded(world.launch(
        "resumed", "gin/t5x/prompt.gin", MIXTURE_OR_TASK_NAME="common_gen__example_prompt", BOTTLENECK=6,
        TRAIN_STEPS=32))
    assert f"Restoring checkpoint from {run.folder / 'checkpoint_30'}" in run.output
    np.testing.assert_array_equal(run.losses()[:30], before.losses())
    assert len(run.losses()) == 32
    assert expert_from_checkpoint(run.folder, world.base).card.training["steps"] == 32


def test_the_older_layout_of_t5x_is_a_base_too(world):
    import launches

    old = launches.write_checkpoint(world.folder / "legacy", world.base, 9, legacy=True)
    assert list(pathlib.Path(old).glob("target.*"))
    run = succeeded(world.launch("from_legacy", "gin/t5x/dataset.gin", MIXTURE_OR_TASK_NAME="trec",
                                 INITIAL_CHECKPOINT_PATH=old, TRAIN_STEPS=2))
    np.testing.assert_allclose(run.losses(), dataset_run(world).losses()[:2], rtol=1e-6)


@pytest.mark.parametrize("bindings, words", [
    ({"T5Config__mlp_dim": 200}, "decoder/layers_0/mlp/wi_0/kernel: [136, 264] instead of [136, 200]"),
    ({"T5Config__num_decoder_layers": 4},
     "missing (14): decoder/layers_3/encoder_decoder_attention/key/kernel"),
    ({"VOCAB_SIZE": 320}, "The vocabulary is larger than the embedding"),
], ids=["width", "depth", "vocabulary"])
def test_a_base_that_does_not_fit_ends_the_launch(world, bindings, words):
    run = world.launch(f"wrong_{'_'.join(bindings)}", "gin/t5x/dataset.gin", MIXTURE_OR_TASK_NAME="trec",
                       **bindings)
    assert run.status == 1
    assert words in run.output


def test_another_base_is_refused(world):
    import dataclasses

    run = prompt_run(world)
    changed = trees.flatten(world.base.params)
    changed["encoder/layers_0/mlp/wo/kernel"] = changed["encoder/layers_0/mlp/wo/kernel"] + np.float32(1e-3)
    other = dataclasses.replace(world.base, params=trees.unflatten(changed))
    with pytest.raises(InputError, match=r"another base(.|\n)*1 of .* encoder/layers_0/mlp/wo/kernel"):
        expert_from_checkpoint(run.folder, other)
    with pytest.raises(InputError, match="none of that kind"):
        expert_from_checkpoint(run.folder, world.base, kind="dataset")
