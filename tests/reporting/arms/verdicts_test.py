"""Verdicts on made-up gaps: what holds, what is refuted, what cannot be seen; and the tables of a study."""

import json

import numpy as np
import pytest

from elm_jax.errors import InputError
from elm_jax.evaluation.results import ResultsStore, TaskResult
from elm_jax.reporting.arms.arm_cells import ACCURACY, LOSS, ArmScores, difference
from elm_jax.reporting.arms.arms_report import write_arms_report
from elm_jax.reporting.arms.verdicts import HOLDS, REFUTED, UNSEEN, verdict

TASKS = ("a", "b", "c", "d", "e", "f")
UNSEEN_TASKS = ("g",)


def gaps(mean, noise=0.02, rows=300):
    rng = np.random.default_rng(0)
    return {task: rng.normal(mean, noise, rows) for task in TASKS}


@pytest.mark.parametrize(("mean", "noise", "result"), [
    (0.05, 0.1, HOLDS), (-0.05, 0.1, REFUTED), (0.0, 0.5, UNSEEN), (0.004, 0.5, UNSEEN)])
def test_a_verdict_follows_from_the_interval(mean, noise, result):
    found = verdict("sparse gains more", LOSS, gaps(mean, noise))
    assert found.result == result
    assert found.tasks == len(TASKS)
    sentence = found.sentence()
    assert sentence.startswith("sparse gains more, target loss: ")
    assert ("four times out of five" in sentence) == (result == UNSEEN)
    assert f"{found.estimate.value:+.3f}" in sentence


def test_the_smallest_gap_is_seen_and_one_of_a_third_is_not():
    noise = gaps(0.0, 0.5)
    centred = {task: own - own.mean() for task, own in noise.items()}
    smallest = verdict("", LOSS, centred).smallest
    for share, result in ((1.1, HOLDS), (0.3, UNSEEN), (-1.1, REFUTED)):
        found = verdict("", LOSS, {task: own + share * smallest for task, own in centred.items()})
        assert found.result == result


def test_points_are_percent_and_unknown_rows_are_left_out():
    values = {task: np.where(np.arange(200) < 20, np.nan, own[:200])
              for task, own in gaps(0.25, 0.01).items()}
    found = verdict("claim", ACCURACY, values)
    assert "+25.0 [" in found.sentence() and "points" in found.sentence()
    assert found.estimate.n == 6 * 180


def test_scores_of_other_tasks_are_not_compared():
    with pytest.raises(InputError, match="other tasks or rows"):
        difference(gaps(0), {"a": np.zeros(300)})


SETUPS = [
    ({"setup": "base", "rows": 0}, (*TASKS, *UNSEEN_TASKS)), ({"setup": "i", "rows": 50}, TASKS),
    ({"setup": "i", "rows": 100}, TASKS), ({"setup": "iii", "rows": 50}, TASKS),
    ({"setup": "iii", "rows": 100}, TASKS), ({"setup": "ii", "tuned_on": 1}, (*TASKS, *UNSEEN_TASKS)),
    ({"setup": "ii", "tuned_on": 2}, (*TASKS, *UNSEEN_TASKS)),
]


def write_study(folder, gap_of):
    """Results of a made-up study, in which the sparse arm's loss is lower by `gap_of` of each set-up."""
    store = ResultsStore(folder)
    for arm in ("dense", "sparse"):
        for place, (tags, tasks) in enumerate(SETUPS):
            for task in tasks:
                rng = np.random.default_rng([place, ord(task)])  # the arms share rows and their noise
                losses = rng.normal(2.0, 0.2, 60) - (gap_of(tags) if arm == "sparse" else 0)
                losses += np.random.default_rng([place, ord(task), len(arm)]).normal(0, 0.02, 60)
                right = rng.integers(0, 2, 60)
                common = {"schema_version": 3, "expert": f"{arm}-{place}", "task": task,
                          "split": "validation", "dataset": task, "chance": 0.5, "settings": "x",
                          "num_instances": 60,
                          "ci95_low": 0.0, "ci95_high": 1.0, "arm": arm, "seed": 0, "few_shot": 0, **tags}
                predictions = [{"index": row, "prediction": "", "target": "", "correct": int(right[row]),
                                "scores": [0.0, -1.0], "label": 0, "place": 0,
                                "target_loss": float(losses[row])} for row in range(60)]
                store.append(TaskResult([
                    {**common, "metric": "accuracy", "value": float(right.mean())},
                    {**common, "metric": "target_loss", "value": float(losses.mean())}], predictions))
    point = {"rate": 0.01, "batch_size": 4}
    arms = [{"name": name, "origin": "continued", "total": 100, "active": 100, "flops": 50.0,
             "reads_tasks": False, "is_sparse": name == "sparse", "choices": {"tune": point}}
            for name in ("dense", "sparse")]
    facts = {"schema_version": 1, "kind": "flan", "title": "Made up", "command": None, "arms": arms,
             "lengths": {"inputs": 8, "targets": 4}, "stage_seconds": {"all": 1.0}, "versions": {},
             "programs": {"count": 0, "seconds": 0.0}, "config": {
                 "finetune_tasks": list(TASKS), "unseen_tasks": list(UNSEEN_TASKS),
                 "finetune_rows": [50, 100], "tuning_counts": [1, 2], "few_shot": 0,
                 "ablated_arm": None, "ablations": []}}
    (folder / "arms.json").write_text(json.dumps(facts))
    return store


@pytest.mark.parametrize(("tuned", "results"), [(0.3, [HOLDS, HOLDS]), (-0.3, [REFUTED, REFUTED]),
                                                (0.0, [UNSEEN, UNSEEN])])
def test_a_made_up_study_is_told_as_it_was_made(tmp_path, tuned, results):
    store = write_study(tmp_path, lambda tags: tuned if tags["setup"] in ("ii", "iii") else 0.0)
    outcome = write_arms_report(tmp_path, store)
    of_loss = [one for one in outcome.verdicts if one.metric == LOSS and "gap i" in one.claim]
    assert [one.result for one in of_loss] == results
    assert of_loss[0].estimate.value == pytest.approx(tuned, abs=0.02)
    assert all(one.result == UNSEEN for one in outcome.verdicts if one.metric == ACCURACY)
    report = (tmp_path / "report.md").read_text()
    assert "## Gaps" in report and "## Gain by number of tuning tasks" in report
    assert "data:image/png" in (tmp_path / "report.html").read_text()
    saved = json.loads((tmp_path / "verdicts.json").read_text())["verdicts"]
    assert [one["result"] for one in saved] == [one.result for one in outcome.verdicts]


def test_seeds_are_averaged_row_by_row_and_a_missing_score_is_named(tmp_path):
    store = write_study(tmp_path, lambda tags: 0.0)
    row = store.rows_of("dense-1", "a", "validation")[0]
    other = [{**one, "target_loss": one["target_loss"] + 1.0} for one in store.predictions("dense-1", "a")]
    store.append(TaskResult([{**row, "expert": "dense-1-s1", "metric": metric, "seed": 1}
                             for metric in ("accuracy", "target_loss")], other))
    tags = {"arm": "dense", "setup": "i", "rows": 50}
    found = ArmScores(store).cell("a", **tags).values[LOSS]
    first = np.asarray([-one["target_loss"] for one in store.predictions("dense-1", "a")])
    np.testing.assert_allclose(found, first - 0.5)
    with pytest.raises(InputError, match="missing"):
        ArmScores(store).cell("a", **{**tags, "rows": 7})
