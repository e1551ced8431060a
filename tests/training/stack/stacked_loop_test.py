"""The loop of a stack: who enters, who leaves, what is on disk, what a kill and a bad loss change."""

import dataclasses

import numpy as np
import pytest
import tiny_run
import tiny_stack

from elm_jax.errors import InputError
from elm_jax.runtime import storage, trees
from elm_jax.training.checkpoint import Checkpoints
from elm_jax.training.early_end import EarlyEnd, Patience
from elm_jax.training.stack import stacked_step

TABLE = tiny_stack.table()
STEP = 1e-6


def losses(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows]


def steps_in(folder, row: tiny_stack.Row) -> list[int]:
    return [one["step"] for one in tiny_stack.rows_in(folder / row.id)]


def assert_solo(ended: dict, rows: list[tiny_stack.Row]) -> None:
    """What the stack made of these experts is what each would have become alone."""
    for row in rows:
        alone, found = tiny_stack.solo(row), ended[row.id]
        assert [one["step"] for one in found.rows] == [one["step"] for one in alone.rows]
        assert found.step == found.ended_at == alone.step == row.train_steps
        for name in alone.metrics:
            if name != "tokens_per_second":
                np.testing.assert_allclose([one[name] for one in found.rows],
                                           [one[name] for one in alone.rows],
                                           rtol=5 * STEP * row.train_steps, err_msg=name)
        overlay = trees.flatten(alone.overlay)
        for path, leaf in trees.flatten(found.overlay).items():
            np.testing.assert_allclose(leaf, overlay[path], rtol=0, atol=5 * STEP * row.train_steps)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The table in two slots, with a folder."""
    folder = tmp_path_factory.mktemp("whole")
    ended, result = tiny_stack.stack(TABLE, 2, str(folder))
    return folder, ended, result


def test_experts_leave_and_enter_and_each_is_its_solo_run(whole):
    folder, ended, result = whole
    assert_solo(ended, [TABLE[0], TABLE[2]])  # one that was there from the start, one that entered later
    assert (result.failed, result.stopped) == ({}, False)
    assert result.ended == ["a", "b", "c", "e", "d"] and result.ticks == 20
    for row in TABLE:
        assert steps_in(folder, row) == list(range(1, row.train_steps + 1))


@pytest.mark.slow
def test_entering_compiles_nothing_and_the_width_changes_no_result(whole):
    _, ended, _ = whole
    stacked_step.compile_stack.cache_clear()  # whatever other tests have compiled
    again, _ = tiny_stack.stack(TABLE, 2)
    assert stacked_step.num_programs() == 1
    wide, _ = tiny_stack.stack(TABLE, 4)
    assert stacked_step.num_programs() == 2
    for row in TABLE:
        assert trees.fingerprint(again[row.id].overlay) == trees.fingerprint(ended[row.id].overlay)
        np.testing.assert_allclose(losses(wide[row.id].rows), losses(ended[row.id].rows),
                                   rtol=STEP * row.train_steps)


class Stopping:
    """A stream that raises at a step: the process dies there, as far as the files can tell."""

    def __init__(self, inner, at: int) -> None:
        self._inner, self._at, self.batch_size = inner, at, inner.batch_size

    def batch(self, step: int, rows=None) -> dict:
        if step == self._at:
            raise KeyboardInterrupt
        return self._inner.batch(step, rows)

    def facts(self) -> dict:
        return self._inner.facts()


def interrupted(folder, expert: str, at: int, size: int = 2) -> None:
    def stream_of(row):
        inner = tiny_stack.stream_of(row)
        return Stopping(inner, at) if row.id == expert else inner

    with pytest.raises(KeyboardInterrupt):
        tiny_stack.stack(TABLE, size, str(folder), stream_of=stream_of, checkpoint_period=3)


def test_a_session_that_dies_changes_no_bit(whole, tmp_path):
    """Once while an expert was finished after the last checkpoint, and once in the middle."""
    folder, ended, _ = whole
    interrupted(tmp_path, "c", 2)
    assert Checkpoints(tmp_path / "stack", {}).steps()
    interrupted(tmp_path, "d", 9)
    again, result = tiny_stack.stack(TABLE, 2, str(tmp_path), checkpoint_period=3)
    assert result.failed == {}
    for row in TABLE:
        written = storage.read_json(tmp_path / row.id / "ended.json", kind="end", schema_version=1)
        assert written["fingerprint"] == trees.fingerprint(ended[row.id].overlay), row.id
        assert tiny_stack.rows_in(tmp_path / row.id) == tiny_stack.rows_in(folder / row.id)
    assert "d" in again


@pytest.mark.slow
def test_it_goes_on_in_a_wider_stack_and_not_in_one_too_narrow(whole, tmp_path):
    _, ended, _ = whole
    interrupted(tmp_path, "a", 5)
    with pytest.raises(InputError, match=r"narrower than the checkpoint[\s\S]*at least 2"):
        tiny_stack.stack(TABLE, 1, str(tmp_path))
    tiny_stack.stack(TABLE, 4, str(tmp_path))
    for row in TABLE:
        assert steps_in(tmp_path, row) == list(range(1, row.train_steps + 1))
        np.testing.assert_allclose(losses(tiny_stack.rows_in(tmp_path / row.id)),
                                   losses(ended[row.id].rows), rtol=STEP * row.train_steps)


def test_a_slot_of_another_config_is_refused(tmp_path):
    interrupted(tmp_path, "a", 5)
    changed = [dataclasses.replace(TABLE[0], learning_rate=9e-9), *TABLE[1:]]
    with pytest.raises(InputError, match=r"'config_digest' differs[\s\S]*a in"):
        tiny_stack.stack(changed, 2, str(tmp_path))


class Poisoned:
    """A stream whose batch `bad` makes the loss infinite."""

    def __init__(self, inner, bad: int) -> None:
        self._inner, self._bad, self.batch_size = inner, bad, inner.batch_size

    def batch(self, step: int, rows=None) -> dict:
        batch = dict(self._inner.batch(step, rows))
        if step == self._bad:
            batch["decoder_loss_weights"] = np.full_like(batch["decoder_loss_weights"], np.inf)
        return batch

    def facts(self) -> dict:
        return self._inner.facts()


def test_a_loss_that_is_not_finite_fails_one_expert_and_no_other(whole):
    _, ended, _ = whole
    told = []
    found, result = tiny_stack.stack(
        TABLE, 2, stream_of=lambda row: Poisoned(tiny_stack.stream_of(row), 3 if row.id == "b" else -1),
        on_fail=lambda run, message: told.append((run.id, message)))
    assert list(result.failed) == ["b"] and not result.stopped
    assert told == [("b", result.failed["b"])]
    assert "at step 4" in result.failed["b"] and "loss=" in result.failed["b"]
    assert sorted(found) == ["a", "c", "d", "e"]
    for name, one in found.items():
        assert losses(one.rows) == losses(ended[name].rows)


def validation_of(row: tiny_stack.Row) -> list[dict]:
    """Of "wild" the targets are others than those that it learns: after a while, learning is harmful."""
    found = [dict(tiny_run.stream(seed=100 + row.data, size=30).batch(step)) for step in range(2)]
    if row.id == "wild":
        for batch in found:
            batch["decoder_target_tokens"] = (batch["decoder_target_tokens"] * 7 + 11) % 60
    return found


def test_early_end_keeps_the_best_weights_and_lets_the_next_one_in(tmp_path):
    """One expert's validation loss rises before its last step; the other one trains to its end."""
    rows = [tiny_stack.Row("wild", 120, learning_rate=0.02), tiny_stack.Row("calm", 12, seed=1, data=1)]
    rule = EarlyEnd(every=4, patience=2)
    found, result = tiny_stack.stack(rows, 2, str(tmp_path), early_end=rule, validation_of=validation_of,
                                     log_period=100)
    wild, calm = found["wild"], found["calm"]
    validated = [one["validation_loss"] for one in wild.rows]
    best = int(np.argmin(validated))
    assert wild.ended_at == 4 * (best + 1 + 2) == 4 * len(validated) < 120 and wild.step == 4 * (best + 1)
    assert wild.metrics["validation_loss"] == min(validated)
    # The weights are those after the best evaluation: what a rule that looks only then keeps as well.
    rare, _ = tiny_stack.stack(rows[:1], 2, early_end=EarlyEnd(every=wild.step, patience=1),
                               validation_of=validation_of)
    assert rare["wild"].step == wild.step
    for path, leaf in trees.flatten(rare["wild"].overlay).items():
        np.testing.assert_allclose(leaf, trees.flatten(wild.overlay)[path], rtol=0, atol=1e-5)
    assert calm.ended_at == 12 and len(calm.rows) == 3
    assert result.ended == ["calm", "wild"] or result.ended == ["wild", "calm"]


def test_patience_counts_evaluations_without_improvement():
    patience, rule = Patience(), EarlyEnd(every=1, patience=2, min_improvement=0.1)
    losses = [3.0, 2.0, 1.95, 1.85, 1.9]
    taken = [patience.take(rule, step, loss) for step, loss in enumerate(losses, start=1)]
    assert taken == [True, True, False, True, False]
    assert (patience.best, patience.best_step, patience.bad) == (1.85, 4, 1)
    assert not patience.ends(rule) and not patience.take(rule, 6, float("nan")) and patience.ends(rule)


@pytest.mark.parametrize("wrong", [{"every": 0}, {"patience": 1.5}, {"rows": -1}, {"min_improvement": -1.0}])
def test_wrong_early_ends_are_input_errors(wrong):
    with pytest.raises(InputError, match=f"EarlyEnd.{next(iter(wrong))}"):
        EarlyEnd(**wrong)


def test_an_overlay_of_another_shape_is_refused():
    rows = [TABLE[0], dataclasses.replace(TABLE[1], id="other")]

    def overlay_of(row, base, real=tiny_stack.overlay_of):
        overlay = real(row, base)
        return overlay if row.id == "a" else {"decoder": overlay["decoder"]}

    before, tiny_stack.overlay_of = tiny_stack.overlay_of, overlay_of
    try:
        with pytest.raises(InputError, match=r"overlays of one shape[\s\S]*where: other"):
            tiny_stack.stack(rows, 2)
    finally:
        tiny_stack.overlay_of = before
