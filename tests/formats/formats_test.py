"""Base folders written as a stream, slices, shardings, detection, and what opens nothing."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
import weakref

import hf_folders
import numpy as np
import pytest
import torch

from elm_jax.errors import InputError
from elm_jax.experts import base as base_lib
from elm_jax.experts import weight_sources
from elm_jax.experts.base import base_of, load_base, save_base
from elm_jax.formats import detect, places
from elm_jax.formats.elm import elm_folders
from elm_jax.formats.hf import t5_models
from elm_jax.formats.model import Model
from elm_jax.formats.t5x import t5x_writer
from elm_jax.formats.tensors import in_flight, streaming
from elm_jax.models.t5.network import T5Network
from elm_jax.runtime import sharding, tree_files, trees
from elm_jax.vocabularies.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def source(tmp_path_factory, vocabulary_proto):
    """A Hugging Face folder in bfloat16 with a vocabulary."""
    folder = tmp_path_factory.mktemp("source") / "t5"
    hf_folders.publish(hf_folders.build("t5_1_1", torch.bfloat16), "t5_1_1", folder, shard_size="30KB")
    hf_folders.add_vocabulary(folder, vocabulary_proto)
    return folder


@pytest.fixture(scope="module")
def base_folder(source, tmp_path_factory):
    """The same as a base folder, in chunks so small that every leaf has several."""
    folder = tmp_path_factory.mktemp("base") / "t5"
    chunk, elm_folders.CHUNK_BYTES = elm_folders.CHUNK_BYTES, 256
    elm_folders.write_elm(folder, t5_models.open_hf(source))
    elm_folders.CHUNK_BYTES = chunk
    return folder


def test_orbax_reads_what_is_written_leaf_by_leaf(source, base_folder):
    restored = trees.flatten(tree_files.restore_tree(base_folder / "weights"))
    opened = t5_models.open_hf(source)
    assert sorted(restored) == sorted(opened.tensors.specs)
    for path, leaf in restored.items():
        assert leaf.dtype.name == "bfloat16"
        np.testing.assert_array_equal(leaf.view(np.uint16), opened.tensors.read(path).view(np.uint16))


def test_parts_of_leaves_are_parts_of_the_whole(source, base_folder):
    for opened in (t5_models.open_hf(source), elm_folders.open_elm(base_folder)):
        for path, spec in opened.tensors.specs.items():
            whole = opened.tensors.read(path)
            assert (whole.shape, whole.dtype.name) == (spec.shape, spec.dtype)
            index = tuple(slice(size // 3, size - 1) for size in spec.shape)
            part = opened.tensors.read(path, index)
            np.testing.assert_array_equal(part.view(np.uint16), whole[index].view(np.uint16))


def test_the_order_of_reading_is_the_sources_and_changes_no_result(source, base_folder, tmp_path):
    """A stack of all layers is best read layer after layer; a fingerprint goes by the alphabet."""
    opened = t5_models.open_hf(source)
    recorded = Recorded(opened.tensors)
    order = sorted(opened.tensors.specs, key=lambda path: path[::-1])
    recorded.specs = {path: opened.tensors.specs[path] for path in order}
    model = Model("t5x", "nowhere", opened.config, recorded)
    elm_folders.write_elm(tmp_path / "elm", model)
    assert list(recorded.parts) == order
    assert load_base(tmp_path / "elm").fingerprint == load_base(base_folder).fingerprint
    recorded.parts.clear()
    t5_models.write_hf(tmp_path / "hf", model)
    assert list(recorded.parts) == order
    hf_folders.assert_same_bits(hf_folders.stored(tmp_path / "hf"), hf_folders.stored(source))


def test_bfloat16_on_disk_is_float32_in_memory(source, base_folder, vocabulary_proto):
    base = load_base(base_folder)
    assert {leaf.dtype.name for leaf in trees.flatten(base.params).values()} == {"float32"}
    assert base.fingerprint == trees.fingerprint(base.params) == load_base(source).fingerprint
    assert base.fingerprint == streaming.fingerprint(t5_models.open_hf(source).tensors)
    assert base.vocabulary.size == 312
    for path in (base.vocabulary_path, load_base(source).vocabulary_path):
        with open(path, "rb") as file:
            assert file.read() == vocabulary_proto


def test_a_vocabulary_without_a_file_gets_one(source, tmp_path, texts):
    t5_models.write_hf(tmp_path / "t5", t5_models.open_hf(source))
    (tmp_path / "t5" / "spiece.model").unlink()
    base = load_base(tmp_path / "t5")
    assert Vocabulary.load(base.vocabulary_path).encode(texts[0]) == base.vocabulary.encode(texts[0])


class Recorded:
    """Tensors that remember which parts were asked for."""

    def __init__(self, tensors):
        self.tensors, self.specs, self.origins = tensors, tensors.specs, tensors.origins
        self.parts = {}

    def read(self, path, index=None):
        part = self.tensors.read(path, index)
        self.parts.setdefault(path, []).append(part.shape)
        return part


@pytest.mark.parametrize("kind", ["hf", "elm"])
def test_on_a_mesh_each_leaf_is_read_once(kind, source, base_folder):
    """One process holds all devices here; what several read is for hosts_test.py."""
    opened = detect.open_model(source if kind == "hf" else base_folder)
    recorded = Recorded(opened.tensors)
    mesh = sharding.make_mesh(1, 8)
    facts = {**opened.facts, elm_folders.FACTS: {"fingerprint": "known"}}  # so that nobody reads all for it
    base = base_of(Model(opened.kind, opened.where, opened.config, recorded, None, facts), mesh)
    network = T5Network(opened.config)
    wanted = trees.flatten(sharding.tree_shardings(network.logical_axes(), network.abstract_params(), mesh))
    split = 0
    for path, leaf in trees.flatten(base.params).items():
        assert leaf.sharding == wanted[path] and leaf.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(leaf), opened.tensors.read(path).astype(np.float32))
        assert recorded.parts[path] == [leaf.shape]
        split += not leaf.sharding.is_fully_replicated
    assert split > 10 and base.fingerprint == "known"


@pytest.mark.parametrize(("parts", "box"), [
    ([[range(0, 4), range(0, 6)]] * 3, [range(0, 4), range(0, 6)]),
    ([[range(4, 6), range(0, 6)], [range(6, 8), range(0, 6)]], [range(4, 8), range(0, 6)]),
    ([[range(0, 2), range(0, 3)], [range(0, 2), range(3, 6)], [range(2, 4), range(0, 3)]], None),
    ([[range(0, 2)], [range(4, 6)]], None),
    ([[]], []),
])
def test_parts_are_read_together_if_they_fill_a_box(parts, box):
    assert base_lib._around(parts) == box


@pytest.mark.parametrize("kind", ["hf", "elm"])
def test_one_leaf_at_a_time(kind, source, base_folder, tmp_path, monkeypatch):
    """Whatever is written, and read, no leaf stays in memory: the bound does not grow with the model."""
    opened = detect.open_model(source if kind == "elm" else base_folder)
    alive, most = set(), []

    class Counted(Recorded):
        def read(self, path, index=None):
            array = super().read(path, index)
            alive.add(path)
            most.append(len(alive))
            weakref.finalize(array, alive.discard, path)
            return array

    monkeypatch.setattr(in_flight, "BYTES", 0)
    monkeypatch.setattr(streaming, "AHEAD_BYTES", 0)
    model = Model(opened.kind, opened.where, opened.config, Counted(opened.tensors))
    (t5_models.write_hf if kind == "hf" else elm_folders.write_elm)(tmp_path / "out", model)
    assert len(most) == len(opened.tensors.specs)
    # TensorStore's threads let go of an array a moment after they have written it.
    assert max(most) <= (1 if kind == "hf" else 2)


def test_reading_ahead_keeps_the_order_and_the_bound(monkeypatch):
    """Leaves of 40 bytes, 100 allowed: the one in hand and two that wait; a large one waits for nobody."""
    monkeypatch.setattr(streaming, "AHEAD_BYTES", 100)
    names = [f"{number:02}" for number in range(12)]
    sizes = {name: 100 if name == "05" else 10 for name in names}
    tensors = streaming.ArrayTensors({name: np.full(sizes[name], int(name), np.float32) for name in names})
    recorded = Recorded(tensors)
    ahead = []
    for number, array in enumerate(streaming.read_ahead(recorded, names)):
        time.sleep(0.02)
        assert array[0] == number
        ahead.append(len(recorded.parts) - number - 1)
    assert list(recorded.parts) == names
    assert ahead == [2, 2, 2, 1, 0, 2, 2, 2, 2, 2, 1, 0]
    recorded.tensors = None
    with pytest.raises(AttributeError):
        list(streaming.read_ahead(recorded, names))


def test_a_sharded_base_has_the_fingerprint_of_a_whole_one(source, base_folder):
    mesh = sharding.make_mesh(2, 4)
    whole = load_base(source).fingerprint
    assert load_base(source, mesh=mesh).fingerprint == whole == load_base(base_folder, mesh=mesh).fingerprint


def test_damaged_weights_are_seen_on_a_mesh_too(base_folder, tmp_path):
    """Where one process reads all; several believe what is recorded."""
    spoilt = hf_folders.copy_of(base_folder, tmp_path / "spoilt")
    largest = max((spoilt / "weights").rglob("d/*"), key=lambda path: path.stat().st_size)
    contents = bytearray(largest.read_bytes())
    contents[len(contents) // 2] ^= 1
    largest.write_bytes(contents)
    with pytest.raises(InputError, match="base's weights are not those that were written"):
        load_base(spoilt, mesh=sharding.make_mesh(1, 8))


def test_facts_of_a_base_survive_another_pass(base_folder, tmp_path):
    elm_folders.write_elm(tmp_path / "again", elm_folders.open_elm(base_folder))
    old, new = (json.loads((folder / "base.json").read_text())
                for folder in (base_folder, tmp_path / "again"))
    assert {**old, "created": None} == {**new, "created": None}
    assert old["training"] == {"converted_from": "hf"} and old["facts"]["hf"]["config"]["d_model"] == 24


def test_a_base_that_was_saved_whole_opens_the_same(base_folder, source, tmp_path):
    """save_base writes all leaves at once, in compressed chunks: the older way, and training's."""
    base = load_base(base_folder)
    save_base(tmp_path / "saved", base.params, base.config, base.vocabulary_path, {"steps": 3})
    opened = detect.open_model(tmp_path / "saved")
    assert opened.facts["elm"]["training"] == {"steps": 3}
    part = opened.tensors.read("decoder/logits_dense/kernel", (slice(3, 9), slice(100, 200)))
    np.testing.assert_array_equal(part, base.params["decoder"]["logits_dense"]["kernel"][3:9, 100:200])
    assert load_base(tmp_path / "saved").fingerprint == base.fingerprint


def test_casting_rounds_and_there_and_back_is_the_same(source):
    tensors = t5_models.open_hf(source).tensors
    wide = streaming.CastTensors(tensors, "float32", "there")
    narrow = streaming.CastTensors(wide, "bfloat16", "there")
    for path in tensors.specs:
        assert wide.specs[path].dtype == "float32" == wide.read(path).dtype.name
        np.testing.assert_array_equal(narrow.read(path).view(np.uint16), tensors.read(path).view(np.uint16))


def test_a_cast_reads_large_leaves_in_boxes(source, base_folder, monkeypatch):
    """Of no leaf is there more than a box in its old dtype; parts of a leaf are cast as the whole is."""
    monkeypatch.setattr(streaming, "AHEAD_BYTES", 512)
    for opened in (t5_models.open_hf(source), elm_folders.open_elm(base_folder)):
        recorded = Recorded(opened.tensors)
        wide = streaming.CastTensors(recorded, "float32", "there")
        for path, spec in wide.specs.items():
            whole = wide.read(path)
            np.testing.assert_array_equal(whole, opened.tensors.read(path).astype(np.float32))
            assert all(2 * np.prod(shape) <= 512 for shape in recorded.parts[path])
            index = tuple(slice(size // 3, size - 1) for size in spec.shape)
            np.testing.assert_array_equal(wide.read(path, index), whole[index])


# What a folder is, and what is none.


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: (folder / "notes.txt").write_text("x")])
def test_folders_of_nothing_say_what_is_there(tmp_path, make):
    make(tmp_path)
    with pytest.raises(InputError, match=r"no model that this program reads(.|\n)*(empty folder|notes.txt)"):
        detect.open_model(tmp_path)


CARD = {"id": "mine", "form": "full", "base": {"name": "t5", "path": "bases/t5"}}
OTHER_FOLDERS = [
    ("expert.json", CARD, r"expert's folder(.|\n)*expert mine(.|\n)*--base bases/t5 --expert (.|\n)*--to hf"),
    ("expert/expert.json", {"id": "mine"}, r"expert's folder(.|\n)*--base BASE --expert \S+$"),
    ("adapter_config.json", {"base_model_name_or_path": "me/base"},
     r"PEFT adapter(.|\n)*of base me/base(.|\n)*elm convert --from peft(.|\n)*--expert EXPERT"),
    ("base/base.json", {}, r"run folder of `elm pretrain`(.|\n)*give \S+/base$"),
]


@pytest.mark.parametrize(("file", "values", "message"), OTHER_FOLDERS)
def test_folders_that_hold_no_base_say_what_they_are_and_what_to_give(tmp_path, file, values, message):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(json.dumps(values))
    if "expert" in file:
        (tmp_path / "COMMITTED.json").write_text("{}")  # a folder that is whole is no base for that
    with pytest.raises(InputError, match=message):
        load_base(tmp_path)


@pytest.mark.parametrize("name", ["missing.gguf", "owner/missing.gguf", "a/b/missing.gguf"])
def test_a_file_that_is_missing_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "_fetch", None)
    for look in (detect.open_model, functools.partial(weight_sources.open_source, "gguf")):
        with pytest.raises(InputError, match=rf"There is no such file(.|\n)*{name}"):
            look(name)
    with pytest.raises(InputError, match="There is no such file"):
        weight_sources.open_source("gguf", "owner/model")


def test_a_sub_folder_called_weights_makes_no_base(source, tmp_path):
    """A Hugging Face folder may hold one; a base of this program has Orbax's files in it."""
    folder = hf_folders.copy_of(source, tmp_path / "t5")
    (folder / "weights").mkdir()
    (folder / "weights" / "notes.txt").write_text("x")
    assert detect.open_model(folder).kind == "hf"
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="no model that this program reads"):
        detect.open_model(folder)


def test_an_expert_that_lies_in_a_models_folder_does_not_hide_the_model(source, tmp_path):
    folder = hf_folders.copy_of(source, tmp_path / "t5")
    (folder / "expert").mkdir()
    (folder / "expert" / "expert.json").write_text(json.dumps(CARD))
    assert detect.open_model(folder).kind == "hf"


def test_a_file_is_no_folder(source):
    with pytest.raises(InputError, match="folder, not a file"):
        detect.open_model(source / "config.json")


def test_a_missing_path(tmp_path):
    with pytest.raises(InputError, match="There is no model here"):
        detect.open_model(tmp_path / "nowhere")


def test_hub_names(source, tmp_path, monkeypatch):
    """Offline, a name is looked up in the hub's cache; one that is not there is one clear error."""
    import huggingface_hub

    snapshot = tmp_path / "models--some--t5" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    hf_folders.copy_of(source, snapshot)
    (tmp_path / "models--some--t5" / "refs").mkdir()
    (tmp_path / "models--some--t5" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    base = load_base("some/t5")
    there = load_base(source).fingerprint
    assert (base.name, base.path, base.fingerprint) == ("some/t5", "hf://some/t5", there)
    # What a card says of its base finds it again, where a folder's name could not be taken for the hub's.
    assert weight_sources.needed_base("an expert", None, base.reference()["path"]).name == "some/t5"
    assert load_base("hf://some/t5").name == load_base(snapshot).name == "some/t5"
    with pytest.raises(InputError, match=r"hub does not give such a model(.|\n)*some/other"):
        load_base("some/other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="need the package huggingface_hub"):
        load_base("some/t5")


def test_a_base_whose_leaves_are_damaged(base_folder, tmp_path):
    spoilt = hf_folders.copy_of(base_folder, tmp_path / "spoilt")
    files = sorted((spoilt / "weights").rglob("d/*"), key=lambda path: path.stat().st_size)
    for file in files:
        # Half of it: which leaf lies at a file's end, or none, differs from run to run.
        file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
    with pytest.raises(InputError, match="weights cannot be read"):
        load_base(spoilt)


def test_missing_leaves_and_wrong_shapes_of_a_base_are_all_named(base_folder, tmp_path):
    spoilt = hf_folders.copy_of(base_folder, tmp_path / "spoilt")
    text = (spoilt / "base.json").read_text()
    (spoilt / "base.json").write_text(text.replace('"mlp_dim": 40', '"mlp_dim": 48')
                                      .replace('"num_encoder_layers": 2', '"num_encoder_layers": 3'))
    words = r"missing \(9\): encoder/layers_2(.|\n)*wrong shape \(15\)"
    with pytest.raises(InputError, match=words) as caught:
        load_base(spoilt)
    assert "decoder/layers_2/mlp/wo/kernel: [40, 24] instead of [48, 24]" in str(caught.value)


WRITE = """
import sys, time
from elm_jax.formats.elm import elm_folders
from elm_jax.formats.hf import t5_models
from elm_jax.formats.t5x import t5x_writer
from elm_jax.formats.tensors import streaming
opened = t5_models.open_hf(sys.argv[1])
read, count = streaming.StoredTensors.read, [0]
def slowly(self, path, index=None):
    count[0] += 1
    if count[0] == 40:
        print("half", flush=True)
        time.sleep(60)
    return read(self, path, index)
streaming.StoredTensors.read = slowly
{"hf": lambda: t5_models.write_hf(sys.argv[3], opened, max_shard_bytes=30000),
 "elm": lambda: elm_folders.write_elm(sys.argv[3], opened),
 "t5x": lambda: t5x_writer.write_t5x(sys.argv[3], opened)}[sys.argv[2]]()
"""


@pytest.mark.parametrize("kind", ["elm", *(
    pytest.param(kind, marks=pytest.mark.slow) for kind in ("hf", "t5x"))])
def test_a_killed_conversion_leaves_nothing_that_opens(kind, source, tmp_path):
    target = tmp_path / "out"
    writing = subprocess.Popen([sys.executable, "-c", WRITE, str(source), kind, str(target)],
                               stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert writing.stdout.readline() == "half\n"
    with pytest.raises(InputError, match=r"Another process is writing this folder(.|\n)*out.partial"):
        t5_models.write_hf(target, t5_models.open_hf(source))
    time.sleep(0.2)
    os.kill(writing.pid, signal.SIGKILL)
    writing.wait()
    assert not target.exists()
    left = tmp_path / "out.partial"
    assert left.exists() and any(left.rglob("*"))
    with pytest.raises(InputError):
        load_base(left)
    # The next attempt does not stumble over what is left.
    opened = t5_models.open_hf(source)
    {"hf": t5_models.write_hf, "elm": elm_folders.write_elm, "t5x": t5x_writer.write_t5x}[kind](target,
                                                                                                opened)
    assert not left.exists() and load_base(target).fingerprint == load_base(source).fingerprint


def test_a_wrong_path_below_a_folder_that_is_there_is_no_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError, match="There is no model here"):
        places.locate("runs/bsae")
