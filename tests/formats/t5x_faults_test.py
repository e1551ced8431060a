"""T5X checkpoints that are half written, damaged, mixed up or of something else: one clear error each."""

import re
import shutil

import numpy as np
import pytest
import t5x_checkpoints as made
from flax import serialization

from elm_jax.errors import InputError
from elm_jax.formats.t5x import t5x_checkpoints, t5x_writer

HALF_WRITTEN = {
    "manifest": ("orbax", "checkpoint_7/state/manifest.ocdbt"),
    "item": ("orbax", "checkpoint_7/state"),
    "list": ("zarr", "checkpoint_7/checkpoint"),
}


@pytest.mark.parametrize("case", HALF_WRITTEN)
def test_a_half_written_checkpoint_is_refused(tmp_path, case):
    writer, gone = HALF_WRITTEN[case]
    made.write(writer, tmp_path, "minimal")
    path = tmp_path / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=r"half written\n.*\n  got: checkpoint_7: it has no"):
        t5x_checkpoints.open_t5x(tmp_path)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="There is no such folder"):
        t5x_checkpoints.open_t5x(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no T5X checkpoint here[^$]*an empty folder"):
        t5x_checkpoints.open_t5x(tmp_path)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-0"')
    with pytest.raises(InputError, match="checkpoint of TensorFlow"):
        t5x_checkpoints.open_t5x(tmp_path)
    (tmp_path / "checkpoint").write_bytes(b"\x81\xa6optimi")
    with pytest.raises(InputError, match="list of tensors cannot be read"):
        t5x_checkpoints.open_t5x(tmp_path)


def test_a_checkpoint_of_optimizer_state_alone_is_refused(tmp_path):
    made.write_zarr(tmp_path, {})
    with pytest.raises(InputError, match=r"holds no parameters[^$]*state\.step[^$]*'target\.'"):
        t5x_checkpoints.open_t5x(tmp_path)


def test_the_step_of_a_resumed_run_is_a_float(tmp_path):
    """Real T5X saves an int32 from a fresh run, and a float32 from one that was restored."""
    made.write_orbax(tmp_path, made.random_leaves(made.config()), np.asarray(32, np.float32))
    assert t5x_checkpoints.open_t5x(tmp_path).facts[t5x_checkpoints.FACTS]["step"] == 32


def test_a_step_that_is_none(tmp_path):
    folder = made.write_zarr(tmp_path, made.random_leaves(made.config()))
    state = serialization.msgpack_restore((folder / "checkpoint").read_bytes())
    for step in (np.float32(7.5), np.float32("nan"), np.int32(-1), np.int32([7, 7])):
        state["optimizer"]["state"]["step"] = np.asarray(step)
        (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(state))
        with pytest.raises(InputError, match=r"step is wrong[^$]*one whole number"):
            t5x_checkpoints.open_t5x(tmp_path)


@pytest.mark.parametrize("form", ["minimal", "scalable"])
def test_scanned_must_be_as_said(tmp_path, form):
    made.write("zarr", tmp_path, form)
    with pytest.raises(InputError, match=r"of the other kind[^$]*got: .*scanned"):
        t5x_checkpoints.open_t5x(tmp_path, scanned=form == "minimal")


def test_scanned_names_with_unscanned_shapes_and_the_reverse(tmp_path):
    network = made.config()
    leaves = made.random_leaves(network)
    stacked = made.as_t5x(leaves, network, "scalable")
    as_if_single = {re.sub(r"^(encoder|decoder)/\1/", r"\1/layers_0/", name): leaf
                    for name, leaf in stacked.items()}
    made.write_zarr(tmp_path / "a", as_if_single)
    wrong = r"wrong shape[^$]*layers_0/mlp/wo/kernel: \[40, 2, 24\][^$]*are stacked"
    with pytest.raises(InputError, match=wrong):
        t5x_checkpoints.open_t5x(tmp_path / "a")
    single = made.as_t5x(leaves, network, "scalable_unscanned")
    as_if_stacked = {re.sub(r"^(encoder|decoder)/layers_0/", r"\1/\1/", name): leaf
                     for name, leaf in single.items() if not re.search("layers_[1-9]", name)}
    made.write_zarr(tmp_path / "b", as_if_stacked)
    with pytest.raises(InputError, match=r"wrong shape[^$]*that they are not"):
        t5x_checkpoints.open_t5x(tmp_path / "b")
    made.write_zarr(tmp_path / "c", {**single, **stacked})
    with pytest.raises(InputError, match="mixes stacked"):
        t5x_checkpoints.open_t5x(tmp_path / "c")


@pytest.mark.parametrize("writer", ["orbax_folders", "zarr"])
def test_all_missing_tensors_are_named_at_once(tmp_path, writer):
    folder, _ = made.write(writer, tmp_path, "minimal")
    arrays = folder if writer == "zarr" else folder / "state"
    gone = ["token_embedder.embedding", "encoder.encoder_norm.scale", "decoder.layers_2.mlp.wi_1.kernel"]
    for name in gone:
        shutil.rmtree(arrays / f"target.{name}")
    with pytest.raises(InputError) as error:
        t5x_checkpoints.open_t5x(tmp_path)
    assert "missing (3)" in str(error.value) and "wrong shape" not in str(error.value)
    assert all(name.replace(".", "/") in str(error.value) for name in gone)


def test_unexpected_names_and_wrong_shapes_are_named_at_once(tmp_path):
    leaves = made.random_leaves(made.config())
    leaves["decoder/layers_1/moe/router/kernel"] = np.ones((3, 4), np.float32)
    leaves["encoder/layers_1/mlp/wo/kernel"] = leaves["encoder/layers_1/mlp/wo/kernel"].T.copy()
    leaves["decoder/decoder_norm/scale"] = np.ones((23,), np.float32)
    del leaves["decoder/layers_3/pre_mlp_layer_norm/scale"]
    made.write_orbax(tmp_path, leaves)
    with pytest.raises(InputError) as error:
        t5x_checkpoints.open_t5x(tmp_path)
    message = str(error.value)
    assert "unexpected (1): decoder/layers_1/moe/router/kernel" in message
    assert "missing (1): decoder/layers_3/pre_mlp_layer_norm/scale" in message
    assert "encoder/layers_1/mlp/wo/kernel: [24, 40] instead of [40, 24]" in message
    assert "decoder/decoder_norm/scale: [23] instead of [24]" in message


def test_integers_are_no_parameters(tmp_path):
    leaves = made.random_leaves(made.config())
    leaves["encoder/encoder_norm/scale"] = np.ones((24,), np.uint16)
    made.write_zarr(tmp_path, leaves)
    with pytest.raises(InputError, match=r"encoder/encoder_norm/scale: uint16"):
        t5x_checkpoints.open_t5x(tmp_path)


def test_biases_of_single_layers_are_refused(tmp_path):
    network = made.config()
    stacked = made.as_t5x(made.random_leaves(network), network, "scalable")
    stacked["decoder/decoder/relpos_bias/rel_embedding"][0, 2, 0] += 1
    made.write_orbax(tmp_path, stacked)
    with pytest.raises(InputError, match=r"umT5[^$]*decoder/relpos_bias[^$]*1 of 4 layers"):
        t5x_checkpoints.open_t5x(tmp_path)


@pytest.mark.parametrize("compressor", ["gzip", "zstd", "blosc"])
def test_truncated_and_missing_chunks_are_named_at_once(tmp_path, compressor):
    folder = made.write_zarr(tmp_path, made.random_leaves(made.config()), compressor=compressor, rows=9)
    chunk = folder / "target.token_embedder.embedding" / "3.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    (folder / "target.encoder.layers_0.mlp.wo.kernel" / "1.0").unlink()
    with pytest.raises(InputError, match="2 chunks") as error:
        t5x_checkpoints.open_t5x(tmp_path)
    assert "token_embedder.embedding/3.0 (truncated)" in str(error.value)
    assert "encoder.layers_0.mlp.wo.kernel/1.0 (missing)" in str(error.value)


@pytest.mark.parametrize("writer", ["orbax", "ours"])
def test_a_truncated_or_missing_file_of_the_database_is_an_error(tmp_path, writer):
    if writer == "orbax":
        folder, _ = made.write("orbax", tmp_path, "minimal")
    else:
        network = made.config()
        t5x_writer.write_t5x(tmp_path / "out", made.memory_model(network, made.random_leaves(network)))
        folder = tmp_path / "out/checkpoint_0"
    largest = max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)
    whole = largest.read_bytes()
    largest.write_bytes(whole[:len(whole) // 4])
    with pytest.raises(InputError, match=r"(not whole|cannot be read)[^$]*(truncated|manifest\.ocdbt)"):
        t5x_checkpoints.open_t5x(folder)
    largest.unlink()
    with pytest.raises(InputError, match=r"(not whole|cannot be read)[^$]*(missing|manifest\.ocdbt)"):
        t5x_checkpoints.open_t5x(folder)


def test_a_damaged_header_is_an_error(tmp_path):
    folder, _ = made.write("zarr", tmp_path, "minimal")
    (folder / "target.token_embedder.embedding/.zarray").write_text("{")
    with pytest.raises(InputError, match=r"Headers[^$]*target\.token_embedder\.embedding"):
        t5x_checkpoints.open_t5x(folder)


@pytest.mark.parametrize("path", ["../other", "/etc", "..", ""])
def test_a_spec_cannot_lead_out_of_the_checkpoint(tmp_path, path):
    folder = made.write_zarr(tmp_path, made.random_leaves(made.config()))
    contents = serialization.msgpack_restore((folder / "checkpoint").read_bytes())
    contents["optimizer"]["target"]["encoder"]["encoder_norm"]["scale"]["kvstore"]["path"] = path
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(contents))
    with pytest.raises(InputError, match=r"outside of its checkpoint[^$]*encoder_norm"):
        t5x_checkpoints.open_t5x(folder)


def test_a_gin_file_beside_the_checkpoint_must_agree(tmp_path):
    made.write("zarr", tmp_path, "minimal")
    gin = tmp_path / "config.gin"
    gin.write_text("network.T5Config.num_heads = %NUM_HEADS\nnetwork.T5Config.num_heads = 3\n"
                   "network.T5Config.mlp_activations = ['gelu', 'linear']\nnetwork.T5Config.head_dim = 5\n")
    t5x_checkpoints.open_t5x(tmp_path)
    gin.write_text("network.T5Config.num_heads = 5\nnetwork.T5Config.mlp_activations = ('silu', 'linear')\n")
    with pytest.raises(InputError, match=r"num_heads: 5 instead of 3; mlp_activations: \('silu'"):
        t5x_checkpoints.open_t5x(tmp_path)
