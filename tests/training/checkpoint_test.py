"""Checkpoints: whole or not there, the last n, of this run, onto any mesh, disk full."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_run

from elm_jax.errors import InputError, RunError
from elm_jax.runtime import sharding, storage, trees
from elm_jax.training import state as states
from elm_jax.training.checkpoint import Checkpoints

FACTS = {"config_digest": "abc", "seed": 1}


def make_state(step: int, optimizer=tiny_run.ADAFACTOR, seed: int = 0) -> states.TrainState:
    """A state with random numbers in every leaf."""
    shapes = states.abstract_state(tiny_run.network().abstract_params(), optimizer)
    rng = np.random.default_rng([seed, step])
    state = jax.tree.map(
        lambda leaf: jax.numpy.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes
    )
    return state.replace(step=jax.numpy.int32(step))


def like(mesh: tuple[int, int] = (1, 1), optimizer=tiny_run.ADAFACTOR) -> states.TrainState:
    net, mesh = tiny_run.network(), sharding.make_mesh(*mesh)
    params = net.abstract_params()
    return jax.tree.map(
        lambda leaf, target: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target),
        states.abstract_state(params, optimizer),
        states.shardings_of_state(net, params, optimizer, mesh),
    )


def assert_equal(found: states.TrainState, expected: states.TrainState) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("optimizer", [tiny_run.ADAFACTOR, tiny_run.ADAMW])
def test_round_trip_onto_another_mesh(tmp_path, optimizer):
    state = make_state(5, optimizer)
    with Checkpoints(tmp_path, FACTS) as saver:
        assert saver.restore(like(optimizer=optimizer)) is None
        saver.save(state)
        saver.wait()
        restored = saver.restore(like((2, 4), optimizer))
    assert_equal(restored, state)
    kernel = restored.overlay["encoder"]["layers_0"]["mlp"]["wi_0"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(32, 16)}


def test_keeps_the_last_n_and_nothing_half_written(tmp_path):
    (tmp_path / "checkpoints" / "7" / "state").mkdir(parents=True)  # of a killed run
    (tmp_path / "checkpoints" / "2024" / "photos").mkdir(parents=True)  # of somebody else
    with Checkpoints(tmp_path, FACTS, keep_checkpoints=2) as saver:
        for step in (1, 2, 10, 9):
            saver.save(make_state(step))
    assert saver.steps() == [9, 10]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10", "2024", "9"]


def test_half_written_steps_are_ignored_and_written_anew(tmp_path):
    with Checkpoints(tmp_path, FACTS) as saver:
        saver.save(make_state(1))
        saver.save(make_state(2))
    # What a kill leaves: Orbax's files are there, our marker, written last, is not.
    (tmp_path / "checkpoints" / "2" / storage.MARKER).unlink()
    (tmp_path / "checkpoints" / "3" / "state").mkdir(parents=True)
    with Checkpoints(tmp_path, FACTS) as saver:
        assert saver.steps() == [1]
        assert_equal(saver.restore(like()), make_state(1))
        saver.save(make_state(2, seed=9))
        saver.wait()
        assert_equal(saver.restore(like()), make_state(2, seed=9))
        saver.save(make_state(3))
    assert saver.steps() == [2, 3]


def test_marker_comes_after_the_last_byte_of_the_state(tmp_path, monkeypatch):
    seen = []
    commit = storage.commit

    def spy(folder, info=None):
        seen.append((folder / "state" / "commit_success.txt").exists())
        commit(folder, info)

    monkeypatch.setattr(storage, "commit", spy)
    with Checkpoints(tmp_path, FACTS) as saver:
        saver.save(make_state(1))
        assert saver._saving is not None  # under way: save does not wait
    assert seen == [True]
    marker = tmp_path / "checkpoints/1" / storage.MARKER
    written = json.loads(marker.read_text())
    assert written["step"] == 1
    for damaged, message in (({**written, "step": 2}, "not the one that was written(.|\n)*: step\n  got: 2"),
                             ({"schema_version": 1}, "marker of a checkpoint is missing(.|\n)*: step\n"),
                             ({}, "commit marker of this folder is damaged"), ([], "not a JSON object")):
        marker.write_text(json.dumps(damaged))
        with Checkpoints(tmp_path, FACTS) as saver, pytest.raises(InputError, match=message):
            saver.restore(like())


def test_checkpoint_of_another_run_names_the_first_difference(tmp_path):
    with Checkpoints(tmp_path, FACTS) as saver:
        saver.save(make_state(1))
    with Checkpoints(tmp_path, {**FACTS, "config_digest": "xyz"}) as saver:
        with pytest.raises(InputError, match=r"setting 'config_digest' differs[\s\S]*got: 'abc'"):
            saver.restore(like())
    with Checkpoints(tmp_path, FACTS) as saver:
        changed = like()
        flat = trees.flatten(changed.overlay)
        del flat["encoder/encoder_norm/scale"]
        flat["decoder/decoder_norm/scale"] = jax.ShapeDtypeStruct((7,), np.float32)
        changed = changed.replace(overlay=trees.unflatten(flat))
        with pytest.raises(
            InputError,
            match=r"leaf 'decoder/decoder_norm/scale' differs[\s\S]*float32\[32\]"
            r"[\s\S]*float32\[7\]",
        ):
            saver.restore(changed)
        with pytest.raises(InputError, match="leaf 'opt_state"):
            saver.restore(like(optimizer=tiny_run.ADAMW))


FULL_DISK = """
import resource, signal, sys
import jax, numpy as np
from elm_jax.errors import RunError
from elm_jax.training.checkpoint import Checkpoints
from elm_jax.training.state import TrainState
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
state = TrainState(jax.numpy.int32(1), {"w": jax.random.normal(jax.random.key(0), (99999,))}, ())
try:
    with Checkpoints(sys.argv[1], {}) as saver:
        saver.save(state)
        saver.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        saver.save(state.replace(step=jax.numpy.int32(2)))
except RunError as error:
    print(saver.steps(), error)
"""


def test_full_disk_is_one_clear_error_and_keeps_the_earlier_checkpoint(tmp_path):
    """A limit on file sizes stands for a full disk: the system refuses the write likewise."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True,
        timeout=120, check=True,
    )
    assert done.stdout.startswith("[1] Cannot write")
    assert f"where: {tmp_path}/checkpoints/2" in done.stdout


def test_keep_checkpoints_must_be_positive(tmp_path):
    with pytest.raises(InputError, match="keep_checkpoints must be at least 1"):
        Checkpoints(tmp_path, FACTS, keep_checkpoints=0)


def test_folder_that_cannot_be_made_is_a_run_error(tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(RunError, match="Cannot write"):
        with Checkpoints(tmp_path / "run", FACTS) as saver:
            saver.save(make_state(1))
