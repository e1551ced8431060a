"""What a run says of its routers: lines and what is in them, sessions, stacks, TensorBoard, damage."""

import dataclasses
import functools
import json
import math
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny_run
import tiny_stack
from sklearn.metrics import mutual_info_score
from sparse_loop import group_gates, places_of

from elm_jax.data.arrays.batch_forms import form_of
from elm_jax.data.arrays.cursor import MixtureSource, TrainStream
from elm_jax.errors import InputError
from elm_jax.models import families
from elm_jax.models.layers import gates
from elm_jax.models.layers.gates import RouterSums
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.training import router_log
from elm_jax.training.router_log import RouterTotals

SPARSE = SparseConfig(5, 2, capacity_factor=0.8, min_capacity=1, step=1, decoder_step=0)
NETWORK = families.network_of(dataclasses.replace(tiny_run.network(dropout=0.0).config, sparse=SPARSE))
TASKS = ("sums", "notes")
COUNTING = families.network_of(dataclasses.replace(
    NETWORK.config, sparse=dataclasses.replace(SPARSE, tasks=TASKS)))
LAYER = "encoder/layers_0"
CLOSE = functools.partial(pytest.approx, rel=1e-5, abs=1e-5)


def lines_of(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / router_log.FILE).read_text().splitlines()]


def drop_after(folder: pathlib.Path, step: int) -> None:
    """Leaves what a process leaves that is killed after the checkpoint of a step, in the middle of a line."""
    for path in (folder / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


def loop_of(logits, real, tasks):
    """Line of one layer from logits [G, N, E] of each step, in float64, one token at a time."""
    found = {"tokens": 0, "dropped": 0, "entropy": 0.0, "z": 0.0}
    choices, mean = np.zeros(SPARSE.num_experts), np.zeros(SPARSE.num_experts)
    pairs = []
    for rows, masks, ids in zip(logits, real, tasks, strict=True):
        for row, mask, numbers in zip(np.asarray(rows, np.float64), masks, ids, strict=True):
            probs = np.exp(row) / np.exp(row).sum(-1, keepdims=True)
            _, kept, chosen = group_gates(SPARSE, probs, mask, places_of(SPARSE, len(row), True))
            for n in np.flatnonzero(mask):
                found["tokens"] += 1
                found["dropped"] += (chosen[n] & ~kept[n]).sum()
                found["entropy"] -= sum(p * math.log(p) for p in probs[n])
                found["z"] += math.log(sum(map(math.exp, row[n]))) ** 2
                choices += chosen[n]
                pairs += [(TASKS[numbers[n]], expert) for expert in np.flatnonzero(chosen[n])]
                mean += probs[n]
    tokens = found["tokens"]
    load = choices / (2 * tokens)
    return {"tokens": tokens, "load": load, "dropped": found["dropped"] / (2 * tokens),
            "z": found["z"] / tokens, "entropy": found["entropy"] / tokens,
            "entropy_share": found["entropy"] / tokens / math.log(5),
            "balance": 5 * sum(f / tokens * p / tokens for f, p in zip(choices, mean, strict=True)),
            "max_load": max(load), "min_load": min(load), "by_task": shares_of(pairs),
            "mutual_information": mutual_info_score(*zip(*pairs, strict=True))}


def shares_of(pairs):
    """`TaskLoad` by task, from (task, expert) of each choice."""
    counts = {task: [pairs.count((task, expert)) for expert in range(SPARSE.num_experts)] for task in TASKS}
    return {task: {"choices": sum(own), "load": [count / sum(own) for count in own]}
            for task, own in counts.items() if any(own)}


def spy(monkeypatch):
    """The logits and masks that the one sparse layer sees, step by step."""
    seen, original = [], gates.router_sums

    def spying(logits, chosen, kept, real):
        jax.debug.callback(lambda *found: seen.append(list(map(np.array, found))), logits, real)
        return original(logits, chosen, kept, real)

    monkeypatch.setattr(gates, "router_sums", spying)
    return seen


def test_a_line_is_of_all_steps_since_the_one_before(tmp_path, monkeypatch):
    seen, source = spy(monkeypatch), MixtureSource(
        [tiny_run.CopySource(30, 1), tiny_run.CopySource(18, 2)], seed=0, tasks=[1, 0])
    batches = TrainStream(source, form=form_of(COUNTING), batch_size=8, lengths=tiny_run.LENGTHS, seed=5,
                          pack=True)
    tiny_run.train(str(tmp_path), 7, network=COUNTING, log_period=3, tensorboard=True, stream=batches)
    jax.effects_barrier()
    lines = lines_of(tmp_path)
    assert [(line["step"], line["steps"], line["layer"]) for line in lines] == [
        (step, steps, LAYER) for step, steps in ((3, 3), (6, 3), (7, 1))]
    for step, found in enumerate(seen):
        found.append(batches.batch(step)["encoder_task_ids"])
    for line, steps in zip(lines, (seen[:3], seen[3:6], seen[6:]), strict=True):
        expected = loop_of(*zip(*steps, strict=True))
        by_task = expected.pop("by_task")
        assert {name: line[name] for name in expected} == {
            name: CLOSE(value) for name, value in expected.items()}
        assert line["by_task"] == {task: {"choices": own["choices"], "load": CLOSE(own["load"])}
                                   for task, own in by_task.items()}
        assert line["dropped"] > 0.05 and line["mutual_information"] > 0 and len(by_task) == 2
    scalars = events_of(tmp_path / "tensorboard")
    for name in ("dropped", "entropy", "balance", "max_load", "mutual_information"):
        assert scalars[f"router/{LAYER}/{name}"] == CLOSE({line["step"]: line[name] for line in lines})


def events_of(folder):
    """{tag: {step: value}} of TensorBoard's files."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = {}
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at:at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12:at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_a_killed_run_ends_with_the_same_file(tmp_path):
    """The checkpoint of step 5 holds the sums of step 5, which no line has yet."""
    run = functools.partial(tiny_run.train, network=NETWORK, log_period=4, checkpoint_period=5,
                            keep_checkpoints=9, random_seed=18)
    run(str(tmp_path / "a"), 11)
    whole = (tmp_path / "a" / router_log.FILE).read_bytes()
    assert [line["step"] for line in lines_of(tmp_path / "a")] == [4, 8, 11]
    drop_after(tmp_path / "a", 5)
    with open(tmp_path / "a" / router_log.FILE, "a") as file:
        file.write('{"step": 12, "lay')
    run(str(tmp_path / "a"), 11)
    assert (tmp_path / "a" / router_log.FILE).read_bytes() == whole
    drop_after(tmp_path / "a", 5)
    marker = tmp_path / "a" / "checkpoints" / "5" / "COMMITTED.json"
    kept = json.loads(marker.read_text())
    assert kept["note"]["router"]["steps"] == 1
    kept["note"]["router"]["layers"][LAYER]["probs"] = [1.0]
    marker.write_text(json.dumps(kept))
    with pytest.raises(InputError, match=rf"(?s)of another network.*{LAYER}.*\(1,\).*\(5,\)"):
        run(str(tmp_path / "a"), 11)
    lines = (tmp_path / "a" / router_log.FILE).read_text().splitlines()
    for wrong, told in ((lines[1][:-20], "not valid JSON|not JSON"),
                        (lines[1].replace('"load": [', '"load": ["x", '), "line 2: load/0")):
        (tmp_path / "a" / router_log.FILE).write_text("\n".join([lines[0], wrong, lines[2], ""]))
        kept["note"] = None
        marker.write_text(json.dumps(kept))
        with pytest.raises(InputError, match=rf"(?s)({told}).*|router\.jsonl, line 2"):
            run(str(tmp_path / "a"), 11)


@pytest.mark.slow
def test_experts_of_a_stack_have_the_lines_of_their_solo_runs(tmp_path):
    rows = [tiny_stack.Row("a", 6, 3), tiny_stack.Row("b", 3, 1, data=1), tiny_stack.Row("c", 2, 1)]
    run = functools.partial(tiny_stack.stack, rows, 2, str(tmp_path), network=NETWORK, log_period=2,
                            checkpoint_period=3, keep_checkpoints=9)
    run()
    whole = {row.id: (tmp_path / row.id / router_log.FILE).read_bytes() for row in rows}
    assert [line["step"] for line in lines_of(tmp_path / "b")] == [2, 3]
    for row in rows[:2]:
        tiny_stack.solo(row, str(tmp_path / "solo" / row.id), network=NETWORK, log_period=2)
        lines = zip(lines_of(tmp_path / row.id), lines_of(tmp_path / "solo" / row.id), strict=True)
        for line, alone in lines:
            assert {name: line[name] for name in alone} == {
                name: value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=2e-3)
                for name, value in alone.items()}
    drop_after(tmp_path / "stack", 3)
    for name in "ac":
        (tmp_path / name / "ended.json").unlink()
    run()
    assert whole == {row.id: (tmp_path / row.id / router_log.FILE).read_bytes() for row in rows}


@pytest.mark.parametrize("tasks, experts", [(1, 4), (3, 1), (3, 4), (7, 5)])
def test_mutual_information_is_that_of_the_joint_counts(tasks, experts):
    rng = np.random.default_rng(tasks)
    counts = rng.integers(0, 9, (tasks, experts)) * rng.integers(0, 2, (tasks, 1))
    pairs = [(task, expert) for task in range(tasks) for expert in range(experts)
             for _ in range(counts[task, expert])]
    expected = mutual_info_score(*zip(*pairs, strict=True)) if pairs else 0.0
    assert router_log.mutual_information(counts) == pytest.approx(expected, abs=1e-12)


def test_mutual_information_is_between_nothing_and_a_task_an_expert():
    assert router_log.mutual_information(np.zeros((3, 4))) == 0.0
    assert router_log.mutual_information(np.outer([1, 5, 2], [3, 1, 4])) == pytest.approx(0.0, abs=1e-12)
    assert router_log.mutual_information(7 * np.eye(6)) == pytest.approx(math.log(6))


def sums_of(choices, **others):
    """Sums with these choices, and zeros elsewhere."""
    empty = dict.fromkeys(RouterSums._fields, np.zeros(()))
    return RouterSums(**{**empty, "choices": np.asarray(choices), "probs": np.zeros(len(choices)),
                         "by_task": None, **others})


def test_tokens_that_no_expert_takes_are_a_share_of_the_tokens():
    """Where experts choose in the encoder; a decoder's tokens choose."""
    totals = RouterTotals(SparseConfig(2, 1, choice="experts", eval_capacity_factor=1.0))
    sums = sums_of([30.0, 10.0], tokens=np.asarray(80.0), dropped=np.asarray(50.0))
    fewer = sums._replace(dropped=np.asarray(10.0))
    totals.add({"decoder/layers_10": fewer, "decoder/layers_2": fewer, "encoder/layers_1": sums})
    found = [(row["layer"], row["dropped"]) for row in totals.take_rows(9)]
    assert found == [
        ("encoder/layers_1", 50 / 80), ("decoder/layers_2", 10 / 40), ("decoder/layers_10", 10 / 40)]
    assert totals.note() is None and totals.take_rows(10) == []


def test_a_layer_without_tokens_has_a_line_of_zeros():
    totals = RouterTotals(SparseConfig(1, 1))
    totals.add({LAYER: sums_of([0.0])})
    row, = totals.take_rows(1)
    assert (row["load"], row["entropy_share"], row["balance"], row["tokens"]) == ([0.0], 0.0, 0.0, 0.0)
