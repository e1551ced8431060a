"""T5X checkpoints read and written, against Orbax's and TensorStore's own reading and writing.

What real T5X writes and restores is in t5x_real_test.py.
"""

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
import weakref

import numpy as np
import pytest
import t5x_checkpoints as made
import tensorstore as ts
from checkout import HELPERS
from flax import serialization

from elm_jax.errors import InputError
from elm_jax.formats.elm import elm_folders
from elm_jax.formats.t5x import t5x_checkpoints, t5x_writer
from elm_jax.formats.tensors import in_flight, streaming
from elm_jax.models.adapters.config import AdapterConfig
from elm_jax.models.t5 import t5x_names
from elm_jax.vocabularies.vocabulary import train_vocabulary

LAYOUTS = ("orbax", "zarr")


@pytest.fixture(scope="module")
def small_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """A SentencePiece model, and its number of ids."""
    path = tmp_path_factory.mktemp("vocabulary") / "v.model"
    texts = [f"the {word} is number {number}" for number in range(50) for word in ("apple", "pear", "fig")]
    vocabulary = train_vocabulary(texts, path, 30, seed=0)
    return path.read_bytes(), vocabulary.size


@pytest.mark.parametrize("form", made.FORMS)
@pytest.mark.parametrize("writer", made.WRITERS)
def test_reads_every_layout_and_tree(tmp_path, writer, form):
    made.write(writer, tmp_path, form)
    leaves = made.random_leaves(made.config())
    model = t5x_checkpoints.open_t5x(tmp_path)
    assert model.config == made.config() and model.kind == "t5x"
    scanned, own_biases = made.FORMS[form]
    assert model.facts == {"t5x": {"step": 7, "scanned": scanned, "own_biases": own_biases}}
    made.assert_same(made.read_all(model), leaves)
    assert any("gelu x linear" in note and "128" in note for note in model.notes)
    assert any("optimizer" in note for note in model.notes)
    assert sum("once a layer" in note for note in model.notes) == (0 if form == "minimal" else 2)


@pytest.mark.parametrize(("generation", "dtype"), [
    *((generation, "bfloat16") for generation in made.GENERATIONS), ("t5_1_1_untied", "float16")])
@pytest.mark.parametrize("writer", ["orbax", "zarr"])
def test_reads_every_generation_and_dtype(tmp_path, writer, generation, dtype):
    _, leaves = made.write(writer, tmp_path, "scalable", generation, dtype)
    model = t5x_checkpoints.open_t5x(tmp_path)
    assert model.config == made.config(generation)
    made.assert_same(made.read_all(model), leaves)


def test_reads_small_leaves_out_of_the_msgpack_file_and_several_chunks(tmp_path):
    leaves = made.random_leaves(made.config())
    inline = tuple(path for path in leaves if path.endswith("_norm/scale"))
    folder = made.write_zarr(tmp_path, leaves, inline=inline, rows=7)
    assert not (folder / "target.encoder.encoder_norm.scale").exists()
    model = t5x_checkpoints.open_t5x(folder / "checkpoint")
    made.assert_same(made.read_all(model), leaves)


def test_reads_the_spec_of_buckets_and_of_old_tensorstore(tmp_path):
    """Published checkpoints name a bucket that does not exist; the oldest keep the path outside."""
    leaves = made.random_leaves(made.config())
    folder = made.write_zarr(tmp_path, leaves)
    contents = serialization.msgpack_restore((folder / "checkpoint").read_bytes())
    target = contents["optimizer"]["target"]
    for name in ("encoder", "decoder"):
        spec = target[name][f"{name}_norm"]["scale"]
        path = spec["kvstore"].pop("path")
        spec["kvstore"] |= {"driver": "gcs", "bucket": "t5x-dummy-bucket"}
        (spec["kvstore"] if name == "encoder" else spec)["path"] = path
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(contents))
    made.assert_same(made.read_all(t5x_checkpoints.open_t5x(folder)), leaves)


@pytest.mark.parametrize("form", made.FORMS)
@pytest.mark.parametrize("writer", ["orbax", "zarr"])
def test_reads_any_part_of_a_leaf(tmp_path, writer, form):
    _, leaves = made.write(writer, tmp_path, form)
    tensors = t5x_checkpoints.open_t5x(tmp_path).tensors
    rng = np.random.default_rng(1)
    for path, leaf in leaves.items():
        for _ in range(4):
            ends = [sorted(rng.integers(0, size + 1, 2)) for size in leaf.shape]
            index = tuple(slice(int(start), int(stop)) for start, stop in ends)
            part = tensors.read(path, index)
            assert np.array_equal(part, leaf[index]), (path, index)
        whole_but_last = tuple(slice(None, -1) for _ in leaf.shape)
        assert np.array_equal(tensors.read(path, whole_but_last), leaf[whole_but_last])


def test_a_slice_reads_only_its_own_chunks(tmp_path):
    leaves = made.random_leaves(made.config())
    folder = made.write_zarr(tmp_path, leaves, rows=6)
    tensors = t5x_checkpoints.open_t5x(folder).tensors
    kernel = "encoder/layers_1/mlp/wi_0/kernel"
    (folder / f"target.{kernel.replace('/', '.')}" / "2.0").write_bytes(b"damaged")
    assert np.array_equal(tensors.read(kernel, (slice(0, 12), slice(3, 5))), leaves[kernel][:12, 3:5])
    with pytest.raises(InputError, match=r"cannot be read\n.*encoder\.layers_1\.mlp\.wi_0\.kernel"):
        tensors.read(kernel, (slice(0, 13), slice(3, 5)))


@pytest.mark.parametrize(("generation", "dtype"), [
    *((generation, "float32") for generation in made.GENERATIONS), ("t5_1_1_untied", "bfloat16")])
@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_bit_identical(tmp_path, layout, scanned, generation, dtype):
    network = made.config(generation)
    leaves = made.random_leaves(network, dtype)
    model = made.memory_model(network, leaves, facts={"t5x": {"step": 1100000}})
    origins = t5x_writer.write_t5x(tmp_path / "out", model, layout=layout, scanned=scanned)
    read = t5x_checkpoints.open_t5x(tmp_path / "out", scanned=scanned)
    assert read.config == network and read.facts["t5x"]["step"] == 1100000
    assert read.tensors.origins == origins
    made.assert_same(made.read_all(read), leaves)
    assert read.where == str(tmp_path / "out" / "checkpoint_1100000")


@pytest.mark.parametrize("scanned", [False, True])
def test_orbax_itself_reads_what_is_written(tmp_path, scanned):
    network = made.config()
    leaves = made.random_leaves(network, "bfloat16")
    t5x_writer.write_t5x(tmp_path / "out", made.memory_model(network, leaves), scanned=scanned, step=3)
    wanted = made.as_t5x(leaves, network, "scalable" if scanned else "minimal")
    made.assert_same(made.read_tree(tmp_path / "out", 3), wanted)


@pytest.mark.parametrize("scanned", [False, True])
def test_tensorstore_itself_reads_what_is_written(tmp_path, scanned):
    network = made.config()
    leaves = made.random_leaves(network)
    model = made.memory_model(network, leaves)
    t5x_writer.write_t5x(tmp_path / "out", model, layout="zarr", scanned=scanned, step=0)
    folder = tmp_path / "out" / "checkpoint_0"
    contents = serialization.msgpack_restore((folder / "checkpoint").read_bytes())
    assert contents["version"] == 3 and set(contents) == {"version", "optimizer"}
    assert contents["optimizer"]["state"]["step"].dtype == np.int32

    def read(spec: dict) -> np.ndarray:
        spec["kvstore"]["path"] = f"{folder}/{spec['kvstore']['path']}"
        return ts.open(spec, open=True).result().read().result()

    def visit(node: dict, prefix: str) -> dict[str, np.ndarray]:
        if "driver" in node:
            return {prefix: read(node)}
        return {path: leaf for key, child in node.items() for path, leaf in
                visit(child, f"{prefix}/{key}" if prefix else key).items()}

    wanted = made.as_t5x(leaves, network, "scalable" if scanned else "minimal")
    made.assert_same(visit(contents["optimizer"]["target"], ""), wanted)


def test_a_layer_of_a_written_stack_is_a_chunk_of_its_own(tmp_path):
    network = made.config()
    model = made.memory_model(network, made.random_leaves(network))
    t5x_writer.write_t5x(tmp_path / "out", model, layout="zarr", scanned=True)
    header = tmp_path / "out/checkpoint_0/target.decoder.decoder.mlp.wo.kernel/.zarray"
    facts = json.loads(header.read_text())
    assert (facts["shape"], facts["chunks"], facts["compressor"]) == ([40, 4, 24], [40, 1, 24], None)


def test_adapters_travel(tmp_path):
    network = dataclasses.replace(made.config(), adapter=AdapterConfig(7))
    leaves = made.random_leaves(network)
    leaves["encoder/layers_0/mlp_adapter/up/bias"][:] = 0  # as adapters begin
    folder = made.write_zarr(tmp_path / "in", leaves)
    model = t5x_checkpoints.open_t5x(folder)
    assert model.config == network
    made.assert_same(made.read_all(model), leaves)
    for layout in LAYOUTS:
        t5x_writer.write_t5x(tmp_path / layout, model, layout=layout)
        made.assert_same(made.read_all(t5x_checkpoints.open_t5x(tmp_path / layout)), leaves)


def test_adapters_are_restored_by_our_module(tmp_path):
    """T5X's own networks have none, the stacked one least of all."""
    network = dataclasses.replace(made.config(), adapter=AdapterConfig(7))
    facts = {"t5x": {"step": 3, "scanned": True}}  # of a base that lay stacked
    model = made.memory_model(network, made.random_leaves(network), facts=facts)
    with pytest.raises(InputError, match=r"no adapters(.|\n)*--no-scanned"):
        t5x_writer.write_t5x(tmp_path / "out", model, scanned=True)
    t5x_writer.write_t5x(tmp_path / "out", model)
    text = (tmp_path / "out" / "network.gin").read_text()
    assert "t5x_module.T5XTransformer.config = @t5x_module.T5Config()" in text and "t5x.examples" not in text
    assert "t5x_module.AdapterConfig.bottleneck = 7" in text


@pytest.mark.parametrize(("form", "layout"), [
    pytest.param(form, layout, marks=() if (form, layout) in (("scalable", "orbax"), ("minimal", "zarr"))
                 else pytest.mark.slow)
    for form in made.FORMS for layout in LAYOUTS])
def test_a_checkpoint_comes_back_as_it_lay(tmp_path, form, layout):
    """t5x -> elm -> t5x without a word about its form: the very tree that T5X had."""
    _, leaves = made.write(layout, tmp_path / "in", form, dtype="bfloat16")
    elm_folders.write_elm(tmp_path / "base", t5x_checkpoints.open_t5x(tmp_path / "in"))
    t5x_writer.write_t5x(tmp_path / "out", elm_folders.open_elm(tmp_path / "base"))
    made.assert_same(made.read_tree(tmp_path / "out"), made.as_t5x(leaves, made.config(), form))
    for scanned in (True, False):
        t5x_writer.write_t5x(tmp_path / str(scanned), elm_folders.open_elm(tmp_path / "base"),
                             scanned=scanned)
        wanted = made.as_t5x(leaves, made.config(), "scalable" if scanned else "minimal")
        made.assert_same(made.read_tree(tmp_path / str(scanned)), wanted)


def test_vocabulary_and_network_travel(tmp_path, small_vocabulary):
    proto, pieces = small_vocabulary
    network = dataclasses.replace(made.config(), vocab_size=pieces + 28)
    model = made.memory_model(network, made.random_leaves(network), vocabulary=proto)
    t5x_writer.write_t5x(tmp_path / "out", model)
    assert t5x_checkpoints.open_t5x(tmp_path / "out").vocabulary == proto
    assert f"network.T5Config.vocab_size = {pieces + 28}" in (tmp_path / "out/network.gin").read_text()
    (tmp_path / "out/vocabulary.model").rename(tmp_path / "elsewhere.model")
    assert t5x_checkpoints.open_t5x(tmp_path / "out").vocabulary is None
    assert t5x_checkpoints.open_t5x(tmp_path / "out", tmp_path / "elsewhere.model").vocabulary == proto
    with pytest.raises(InputError, match="There is no such vocabulary"):
        t5x_checkpoints.open_t5x(tmp_path / "out", tmp_path / "nowhere.model")


def test_a_vocabulary_of_another_size_is_refused(tmp_path, small_vocabulary):
    proto, _ = small_vocabulary
    (tmp_path / "it.model").write_bytes(proto)
    made.write("zarr", tmp_path / "in", "minimal")
    with pytest.raises(InputError, match=r"vocabulary is not that of the embedding[^$]*50 rows"):
        t5x_checkpoints.open_t5x(tmp_path / "in", tmp_path / "it.model")


@pytest.mark.parametrize("writer", ["orbax", "zarr"])
def test_takes_the_newest_whole_checkpoint_and_says_so(tmp_path, writer):
    made.write(writer, tmp_path, "minimal", step=20)
    step, leaves = made.write(writer, tmp_path, "minimal", step=100)
    shutil.copytree(step, tmp_path / "checkpoint_300.orbax-checkpoint-tmp-17")
    cut = tmp_path / "checkpoint_200"
    shutil.copytree(step, cut)
    (cut / ("checkpoint" if writer == "zarr" else "state/_METADATA")).unlink()
    model = t5x_checkpoints.open_t5x(tmp_path)
    assert model.facts["t5x"]["step"] == 100
    made.assert_same(made.read_all(model), leaves)
    notes = " ".join(model.notes)
    assert "Read checkpoint_100, the newest whole one of 3" in notes
    assert "checkpoint_200 (it has no" in notes and "tmp-17 (still being written)" in notes
    with pytest.raises(InputError, match="half written"):
        t5x_checkpoints.open_t5x(cut)
    with pytest.raises(InputError, match="half written"):
        t5x_checkpoints.open_t5x(tmp_path / "checkpoint_300.orbax-checkpoint-tmp-17")


def test_the_folder_of_the_arrays_may_be_given(tmp_path):
    folder, leaves = made.write("orbax", tmp_path, "minimal")
    model = t5x_checkpoints.open_t5x(folder / "state")
    assert model.where == str(folder) and model.facts["t5x"]["step"] == 7
    made.assert_same(made.read_all(model), leaves)


def test_nothing_is_written_if_something_is_wrong(tmp_path):
    network = made.config()
    leaves = made.random_leaves(network)
    model = made.memory_model(network, leaves)
    target = tmp_path / "out"
    far = dataclasses.replace(network, relative_attention_max_distance=256)
    half = "encoder/layers_1/mlp/wo/kernel"
    mixed = {**leaves, half: leaves[half].astype(np.float16)}
    lacking = {path: leaf for path, leaf in leaves.items() if "norm" not in path}
    for wrong, options, message in (
        (model, {"layout": "orbaks"}, "nearest: orbax"),
        (model, {"step": -1}, "whole number from 0"),
        (made.memory_model(far, leaves), {}, "up to distance 256"),
        (made.memory_model(network, mixed), {"scanned": True}, r"dtypes[^$]*encoder/encoder/mlp/wo/kernel"),
        (made.memory_model(network, lacking), {}, r"missing \(18\)"),
    ):
        with pytest.raises(InputError, match=message):
            t5x_writer.write_t5x(target, wrong, **options)
        assert list(tmp_path.iterdir()) == []
    target.mkdir()
    (target / "something").touch()
    with pytest.raises(InputError, match="exists already"):
        t5x_writer.write_t5x(target, model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_interrupted_writing_leaves_nothing_under_the_name(tmp_path, layout, monkeypatch):
    network = made.config()
    model = made.memory_model(network, made.random_leaves(network))
    read = made.MemoryTensors.read

    def fail(self, path, index=None):
        if path == "encoder/layers_1/mlp/wo/kernel":
            raise KeyboardInterrupt
        return read(self, path, index)

    monkeypatch.setattr(made.MemoryTensors, "read", fail)
    with pytest.raises(KeyboardInterrupt):
        t5x_writer.write_t5x(tmp_path / "out", model, layout=layout)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_disk_is_one_clear_error(tmp_path):
    """A file-size limit stands in for a full disk."""
    program = f"""
import resource, signal, sys
sys.path.insert(0, {str(HELPERS)!r})
import t5x_checkpoints as made
from elm_jax.formats.t5x import t5x_writer
from elm_jax.errors import RunError
network = made.config()
model = made.memory_model(network, made.random_leaves(network))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
try:
    t5x_writer.write_t5x({str(tmp_path / "out")!r}, model, layout="zarr")
except RunError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert "Cannot write a tensor" in done.stdout and "target." in done.stdout, done.stderr[-2000:]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scanned", [False, True])
def test_one_leaf_is_in_memory_at_a_time(tmp_path, scanned, monkeypatch):
    network = made.config()
    model = made.memory_model(network, made.random_leaves(network))
    held: list[weakref.ref] = []
    most = 0
    read = made.MemoryTensors.read

    def watch(self, path, index=None):
        nonlocal most
        leaf = read(self, path, index)
        most = max(most, sum(other() is not None for other in held))
        held.append(weakref.ref(leaf))
        return leaf

    monkeypatch.setattr(made.MemoryTensors, "read", watch)
    # Small leaves are written together, and read ahead; here every leaf counts as a large one.
    monkeypatch.setattr(in_flight, "BYTES", 0)
    monkeypatch.setattr(streaming, "AHEAD_BYTES", 0)
    t5x_writer.write_t5x(tmp_path / "out", model, scanned=scanned)
    # TensorStore's threads let go of an array a moment after they have written it.
    assert len(held) == len(model.tensors.specs) and most <= 2


def test_specs_keep_the_layers_of_a_stack_together(tmp_path):
    made.write("orbax", tmp_path, "scalable")
    origins = list(t5x_checkpoints.open_t5x(tmp_path).tensors.origins.values())
    names = [origin.name for origin in origins]
    assert [name for name, _ in itertools.groupby(names)] == sorted(set(names))


@pytest.mark.parametrize("module", ["formats.t5x.t5x_checkpoints", "models.t5.t5x_names"])
def test_tensorflow_is_not_imported(module):
    code = (f"import sys, elm_jax.{module}; "
            "print([name for name in ('tensorflow', 'torch', 't5x') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]


@pytest.mark.parametrize("form", [t5x_names.MINIMAL, t5x_names.SCALABLE, t5x_names.Form(False, True)])
def test_names_and_shapes_are_found_again(form):
    for generation in made.GENERATIONS:
        network = made.config(generation)
        shapes = t5x_names.tensor_shapes(network, form)
        tree = t5x_names.read_tree(shapes, "here")
        assert (tree.config, tree.form, tree.wanted) == (network, form, shapes)
