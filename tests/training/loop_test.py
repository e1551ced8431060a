"""The loop: learns, resumes, stops at bad numbers, tells what it does."""

import io
import json

import jax
import numpy as np
import pytest
import tiny_run

from elm_jax.errors import InputError, RunError
from elm_jax.runtime import sharding, storage, trees
from elm_jax.runtime.terminal import progress as progress_lines
from elm_jax.training import metrics_log as metric_files
from elm_jax.training.checkpoint import Checkpoints
from elm_jax.training.optimizers import OptimizerConfig
from elm_jax.training.run_settings import RunConfig
from elm_jax.training.step import num_programs

# At 1e-2 training is chaotic: float32 on another mesh then ends 4% away from float32 itself.
LEARNER = {"network": tiny_run.network(dropout=0.0), "optimizer": OptimizerConfig("adamw", 3e-3)}


def losses(result) -> list[float]:
    return [row["loss"] for row in result.rows]


def stored_rows(model_dir) -> list[dict]:
    return [json.loads(line) for line in (model_dir / "metrics.jsonl").read_text().splitlines()]


def test_learns_and_reports_every_step(tmp_path):
    result = tiny_run.train(str(tmp_path), 60, **LEARNER)
    assert (result.step, result.stopped) == (60, False)
    assert losses(result)[-1] < 0.9 * losses(result)[0]
    rows = stored_rows(tmp_path)
    assert rows == result.rows and rows[-1] == result.metrics
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[0].keys() >= {"loss", "accuracy", "tokens", "grad_norm", "param_norm",
                              "learning_rate"}
    weights = tiny_run.stream().batch(0)["decoder_loss_weights"]
    assert rows[0]["tokens"] == weights.sum()


def test_a_run_in_two_sessions_equals_one(tmp_path):
    whole = tiny_run.train(None, 12)
    tiny_run.train(str(tmp_path), 5)
    again = tiny_run.train(str(tmp_path), 12)
    assert losses(again) == losses(whole)
    assert [row["step"] for row in again.rows] == list(range(1, 13))
    found, expected = jax.device_get((again.overlay, whole.overlay))
    assert trees.fingerprint(found) == trees.fingerprint(expected)


def test_rows_beyond_the_restored_step_are_dropped(tmp_path):
    tiny_run.train(str(tmp_path), 7)
    storage.append_jsonl(tmp_path / "metrics.jsonl", [{"step": 8, "loss": -1.0}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # killed in the middle of a line
    result = tiny_run.train(str(tmp_path), 9)
    assert [row["step"] for row in stored_rows(tmp_path)] == list(range(1, 10))
    assert -1.0 not in losses(result)


def test_a_finished_run_does_nothing_more(tmp_path):
    first = tiny_run.train(str(tmp_path), 4)
    again = tiny_run.train(str(tmp_path), 4)
    assert again.step == 4 and not again.stopped and again.metrics == first.metrics
    np.testing.assert_array_equal(
        *(result.overlay["encoder"]["encoder_norm"]["scale"] for result in (first, again))
    )


def test_resumes_on_another_mesh(tmp_path):
    whole = tiny_run.train(None, 10)
    tiny_run.train(str(tmp_path), 5)
    again = tiny_run.train(str(tmp_path), 10, mesh=sharding.make_mesh(2, 4))
    np.testing.assert_allclose(losses(again), losses(whole), rtol=1e-5)


def test_another_stream_or_seed_is_refused(tmp_path):
    tiny_run.train(str(tmp_path), 2)
    with pytest.raises(InputError, match=r"settings differ[\s\S]*stream.seed: 5 there, 6 here"):
        tiny_run.train(str(tmp_path), 4, stream=tiny_run.stream(seed=6))
    with pytest.raises(InputError, match=r"settings differ[\s\S]*seed: \d there, 9 here"):
        tiny_run.train(str(tmp_path), 4, random_seed=9)
    with pytest.raises(InputError, match=r"on other rows[\s\S]*num_examples: 48 there, 47 here"):
        tiny_run.train(str(tmp_path), 4, stream=tiny_run.stream(size=47))
    with pytest.raises(InputError, match="setting 'config_digest' differs"):
        tiny_run.train(str(tmp_path), 4, config_digest="other")


class PoisonedStream:
    """A stream whose batch `bad` makes the loss infinite."""

    def __init__(self, bad: int) -> None:
        self._inner, self._bad = tiny_run.stream(), bad
        self.batch_size = self._inner.batch_size

    def batch(self, step: int, rows=None) -> dict:
        batch = dict(self._inner.batch(step, rows))
        if step == self._bad:
            batch["decoder_loss_weights"] = np.full_like(batch["decoder_loss_weights"], np.inf)
        return batch

    def facts(self) -> dict:
        return self._inner.facts()


@pytest.mark.parametrize("bad", [9, 13])  # step 14 would also have been saved
def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path, bad):
    with pytest.raises(RunError, match=rf"at step {bad + 1}[\s\S]*checkpoints/7") as caught:
        tiny_run.train(str(tmp_path), 20, stream=PoisonedStream(bad))
    assert "loss=" in str(caught.value)
    assert Checkpoints(tmp_path, {}).steps() == [7]
    assert [row["step"] for row in stored_rows(tmp_path)] == list(range(1, bad + 1))
    healed = tiny_run.train(str(tmp_path), 14)
    assert losses(healed) == losses(tiny_run.train(None, 14))


def test_many_runs_of_equal_shapes_compile_one_program():
    tiny_run.train(None, 2)
    before = num_programs()
    for seed in range(3):
        source = tiny_run.stream(seed=seed, size=20 + seed)
        tiny_run.train(None, 3 + seed, random_seed=seed, stream=source)
    assert num_programs() == before


def test_linear_decay_of_unlike_lengths_shares_the_program_too():
    config = OptimizerConfig("adamw", 1e-3, schedule="linear_decay")
    rates = [
        tiny_run.train(None, steps, optimizer=config).rows[1]["learning_rate"] for steps in (2, 4)
    ]
    np.testing.assert_allclose(rates, [0.5e-3, 0.75e-3], rtol=1e-6)


def test_base_of_another_network_is_refused():
    base = tiny_run.parameters(tiny_run.network(adapter=False))
    with pytest.raises(InputError, match=r"not the network's parameters[\s\S]*adapter"):
        tiny_run.train(None, 2, base=base)


@pytest.mark.parametrize("wrong", [{"train_steps": 0}, {"train_steps": 2.0}, {"keep_checkpoints": 0},
                                   {"random_seed": -1}, {"log_period": "1"}])
def test_wrong_settings_are_input_errors(wrong):
    with pytest.raises(InputError, match=f"RunConfig.{next(iter(wrong))}"):
        RunConfig(**{"train_steps": 1, **wrong})


@pytest.mark.slow
def test_bfloat16_activations_stay_finite_and_end_where_float32_ends():
    final = {}
    for dtype in ("float32", "bfloat16"):
        result = tiny_run.train(
            None, 200, **{**LEARNER, "network": tiny_run.network(dtype=dtype, dropout=0.0)}
        )
        assert np.isfinite(losses(result)).all()
        final[dtype] = np.mean(losses(result)[-10:])
    assert final["float32"] < 0.5 * losses(result)[0]  # it learned: a flat loss would agree too
    assert final["bfloat16"] == pytest.approx(final["float32"], rel=0.02)
    assert final["float32"] != final["bfloat16"]  # the setting reached the network


def read_events(folder) -> list[tuple[int, float]]:
    """(step, train/loss) of TensorBoard's files: records of length, checksum, event, checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            values = [value for value in event.summary.value if value.tag == "train/loss"]
            found += [(event.step, value.simple_value) for value in values]
            data = data[16 + size :]
    return sorted(found)


def test_tensorboard_holds_the_losses(tmp_path):
    tiny_run.train(str(tmp_path), 3, tensorboard=True)
    result = tiny_run.train(str(tmp_path), 5, tensorboard=True)
    events = read_events(tmp_path / "tensorboard")
    assert [step for step, _ in events] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose([loss for _, loss in events], losses(result), rtol=1e-6)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_line(monkeypatch):
    clock = iter([0.0, 2.0, 4.0, 6.0])
    monkeypatch.setattr(progress_lines.time, "monotonic", lambda: next(clock))
    stream = Terminal()
    progress = metric_files.Progress("cosmos_qa", 10, 110, stream)
    assert progress.update(11, 2.5, 500.0) == 250.0
    line = "cosmos_qa  step 11/110  loss 2.5000  250 tokens/s  0:03:18 left"
    assert stream.getvalue() == f"\r{line}\x1b[K"
    progress.update(12, 2.0, 500.0)
    progress.close()
    assert stream.getvalue().count("\r") == 2 and stream.getvalue().endswith("\n")


def test_progress_elsewhere_writes_plain_lines_now_and_then(monkeypatch):
    clock = iter([0.0, 1.0, 20.0, 21.0, 22.0])
    monkeypatch.setattr(progress_lines.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = metric_files.Progress("rte", 0, 4, stream)
    for step in range(1, 5):
        progress.update(step, 1.0, 10.0)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["2/4", "4/4"]
    assert "\r" not in stream.getvalue()
