"""Results on disk: resumable, newest row first, predictions before the row."""

import functools
import json
import pathlib
import time

import many_processes
import numpy as np
import pytest

from elm_jax.errors import InputError
from elm_jax.evaluation.results import ResultsStore, TaskResult
from elm_jax.runtime import storage


def result(expert: str = "one", task: str = "toys__ask", value: float = 0.5, digest: str = "aaa",
           metric: str = "accuracy", version: int = 3) -> TaskResult:
    row = {"schema_version": version, "expert": expert, "task": task, "split": "validation",
           "metric": metric, "value": value, "num_instances": 2, "ci95_low": 0.0, "ci95_high": 1.0,
           "dataset": "toys", "chance": None, "settings": digest}
    field = "correct" if metric == "accuracy" else "rouge_l"
    scores = [1, 0] if metric == "accuracy" else [value, 0.25]
    return TaskResult([row], [{"index": 4 * number, "prediction": f"line\nümlaut\u2028 {number}",
                               "target": "x", field: one} for number, one in enumerate(scores)])


def test_what_was_appended_is_there_after_a_restart(tmp_path: pathlib.Path) -> None:
    store = ResultsStore(tmp_path / "results")
    assert store.rows() == []
    assert not store.done("one", "toys__ask", "validation", "aaa")
    first, second = result(), result("two", metric="rouge_l", value=0.75)
    store.append(first)
    store.append(second)
    for opened in (store, ResultsStore(tmp_path / "results")):
        assert opened.rows() == [first.rows[0], second.rows[0]]
        assert opened.predictions("one", "toys__ask") == first.predictions
        assert opened.values("one", "toys__ask").tolist() == [1.0, 0.0]
        assert opened.values("two", "toys__ask").tolist() == [0.75, 0.25]
        assert opened.values("two", "toys__ask").dtype == np.float64
        assert opened.done("one", "toys__ask", "validation", "aaa")
        for other in (("three", "toys__ask", "validation", "aaa"), ("one", "x", "validation", "aaa"),
                      ("one", "toys__ask", "train", "aaa"), ("one", "toys__ask", "validation", "b")):
            assert not opened.done(*other)


def test_the_newest_row_counts(tmp_path: pathlib.Path) -> None:
    store = ResultsStore(tmp_path, "mine.jsonl")
    for one in (result(value=0.1), result("two"), result(value=0.9, digest="bbb")):
        store.append(one)
    opened = ResultsStore(tmp_path, "mine.jsonl")
    assert [(row["expert"], row["value"]) for row in opened.rows()] == [("one", 0.9), ("two", 0.5)]
    assert opened.done("one", "toys__ask", "validation", "bbb")
    assert not opened.done("one", "toys__ask", "validation", "aaa")


def test_a_half_written_line_is_dropped_and_written_again(tmp_path: pathlib.Path) -> None:
    store = ResultsStore(tmp_path)
    store.append(result())
    store.append(result("two"))
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[:-20])  # killed while the second row was written
    again = ResultsStore(tmp_path)
    assert [row["expert"] for row in again.rows()] == ["one"]
    assert not again.done("two", "toys__ask", "validation", "aaa")
    again.append(result("two"))
    assert store.path.read_bytes() == whole


def test_killed_between_predictions_and_row_is_not_done(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ResultsStore(tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "append_jsonl", killed)
        with pytest.raises(KeyboardInterrupt):
            store.append(result())
    opened = ResultsStore(tmp_path)
    assert not opened.done("one", "toys__ask", "validation", "aaa")
    assert len(opened.predictions("one", "toys__ask")) == 2


def test_a_row_without_predictions_is_not_done(tmp_path: pathlib.Path) -> None:
    store = ResultsStore(tmp_path)
    store.append(result())
    (tmp_path / "predictions/one/toys__ask.validation.jsonl").unlink()
    assert not store.done("one", "toys__ask", "validation", "aaa")
    with pytest.raises(InputError, match="no predictions"):
        store.predictions("one", "toys__ask")


def test_rows_of_the_older_schema_are_read_but_not_taken_for_done(tmp_path: pathlib.Path) -> None:
    ResultsStore(tmp_path).append(result(version=1))
    store = ResultsStore(tmp_path)
    assert store.rows() == result(version=1).rows and len(store.values("one", "toys__ask")) == 2
    assert not store.done("one", "toys__ask", "validation", "aaa")
    store.append(result())
    assert store.done("one", "toys__ask", "validation", "aaa")


def test_rows_of_schema_2_hold_unless_their_value_changes(tmp_path: pathlib.Path) -> None:
    store = ResultsStore(tmp_path)
    for one in (result(version=2), result("two", metric="rouge_l", version=2), result("plain", version=2)):
        store.append(one)
    plain = [{"index": number, "prediction": "a — “b”", "target": "c", "rouge_l": 0.0} for number in (0, 1)]
    store.append(TaskResult(result("latin", metric="rouge_l", version=2).rows, plain))
    for expert, holds in (("one", True), ("two", False), ("latin", True)):  # two has an umlaut
        assert store.done(expert, "toys__ask", "validation", "aaa") == holds
    assert not store.done("one", "toys__ask", "validation", "aaa", several_right=True)
    assert not store.done("one", "toys__ask", "validation", "aaa", metrics=("acc_norm",))
    assert store.done("one", "toys__ask", "validation", "aaa", metrics=("bleu",))  # of other tasks
    old = {**result(version=2).rows[0], "ci95_low": -0.1, "ci95_high": 1.1}
    assert 0 < store.with_interval(old)["ci95_low"] < store.with_interval(old)["ci95_high"] < 1


def test_foreign_rows_are_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps({"schema_version": 7}) + "\n")
    with pytest.raises(InputError, match=r"schema version(.|\n)*line 1(.|\n)*got: 7(.|\n)*1 or 2 or 3"):
        ResultsStore(tmp_path)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_append_at_once_lose_and_double_nothing(tmp_path: pathlib.Path, count: int) -> None:
    """Each appends results of its own, and one pair that all have scored; stores were opened before."""
    def evaluate(number: int) -> None:
        store = ResultsStore(tmp_path)
        time.sleep(0.1)  # all have read the empty file
        for task in range(10):
            store.append(result(f"own{number}", f"task{task}"))
        store.append(result("shared"))

    jobs = [functools.partial(evaluate, number) for number in range(count)]
    assert many_processes.at_once(jobs) == [""] * count
    store = ResultsStore(tmp_path)
    assert len(store.path.read_text().splitlines()) == len(store.rows()) == 10 * count + 1
    for number in range(count):
        assert all(store.done(f"own{number}", f"task{task}", "validation", "aaa") for task in range(10))
    assert store.done("shared", "toys__ask", "validation", "aaa")


def test_what_another_process_has_added_meanwhile_stands_once(tmp_path, caplog) -> None:
    """Other settings displace it as ever, another value is told, another model is refused."""
    mine, other = ResultsStore(tmp_path), ResultsStore(tmp_path)
    other.append(result(value=0.5))
    mine.append(result(value=0.25))
    assert ResultsStore(tmp_path).rows() == mine.rows() == result(value=0.5).rows
    assert "accuracy 0.5, 0.25 here" in caplog.text
    other.append(result(digest="other"))
    mine.append(result())
    assert [row["settings"] for row in storage.read_jsonl(mine.path)] == ["aaa", "other", "aaa"]
    row = {**result("two").rows[0], "model": "sha256:b"}
    other.append(TaskResult([row], []))
    with pytest.raises(InputError, match=r"another model of the same id meanwhile(.|\n)*got: sha256:b"):
        mine.append(TaskResult([{**row, "model": "sha256:a"}], []))
    assert mine.rows_of("two", "toys__ask", "validation") == [row]
    more = TaskResult([row, {**row, "metric": "acc_norm"}], [{"index": 0}])
    other.append(TaskResult([{**row, "expert": "six"}], []))
    mine.append(TaskResult([{**one, "expert": "six"} for one in more.rows], more.predictions))
    assert [one["metric"] for one in ResultsStore(tmp_path).rows_of("six", "toys__ask", "validation")] == [
        "accuracy", "acc_norm"]
