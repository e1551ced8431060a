"""A model is called by the name that its user knows it by."""

import os

import pytest
import t5x_checkpoints as made

from elm_jax.errors import InputError
from elm_jax.experts.base import load_base
from elm_jax.experts.card import ExpertCard
from elm_jax.formats import leaf_names
from elm_jax.formats.t5x import t5x_writer
from elm_jax.models.adapters.config import AdapterConfig

CACHED = "/root/.cache/huggingface/hub/models--google--t5-v1_1-small/snapshots/" + 40 * "a"


@pytest.mark.parametrize(("where", "name"), [
    ("models/t5_small", "t5_small"), ("/data/t5_small/", "t5_small"), ("runs/xl_lm/checkpoint_7", "xl_lm"),
    ("gs://bucket/t5x/xl_lm/checkpoint_7", "xl_lm"), ("gs://bucket/t5x/xl_lm", "xl_lm"),
    ("runs/x/../y", "y"), ("checkpoint_of_mine", "checkpoint_of_mine"), (CACHED, "google/t5-v1_1-small"),
    ("models--gpt--x", "models--gpt--x"),
])
def test_names(where, name):
    assert leaf_names.name_of(where) == name


def test_names_from_within(tmp_path, monkeypatch):
    folder = tmp_path / "xl_lm" / "checkpoint_7"
    folder.mkdir(parents=True)
    for there, where in ((folder, "."), (folder.parent, "checkpoint_7"), (folder.parent, ".")):
        monkeypatch.chdir(there)
        assert leaf_names.name_of(where) == "xl_lm"
    os.symlink(folder.parent, tmp_path / "latest")
    assert leaf_names.name_of(tmp_path / "latest") == "latest"


def test_what_finds_a_model_again():
    assert leaf_names.address_of("runs/xl_lm/checkpoint_7") == "runs/xl_lm/checkpoint_7"
    assert leaf_names.address_of(CACHED) == "hf://google/t5-v1_1-small"


@pytest.mark.parametrize(("name", "made_of_it"), [
    ("ag_news__classify", "ag_news__classify"), ("google/t5 small", "google_t5_small"), ("..x", "x"),
    ("---", "expert"), ("é" * 300, "_"),
])
def test_names_as_ids(name, made_of_it):
    assert leaf_names.as_id(name) == made_of_it
    ExpertCard(made_of_it, "prompt", "adapter", {"fingerprint": "x"}, {})


def test_a_t5x_base_is_called_as_its_run(tmp_path):
    step, _ = made.write("orbax", tmp_path / "xl_lm", "minimal")
    for where in (step, tmp_path / "xl_lm", step / "state"):
        base = load_base(where)
        assert (base.name, base.path) == ("xl_lm", str(step))
        assert base.reference() == {"name": "xl_lm", "fingerprint": base.fingerprint, "path": str(step)}


def test_a_checkpoint_with_adapters_is_no_base(tmp_path):
    network = made.config().with_adapter(AdapterConfig(7))
    model = made.memory_model(network, made.random_leaves(network))
    t5x_writer.write_t5x(tmp_path / "run", model)
    words = (r"no base: it holds the adapters[^$]*run/checkpoint_0\n"
             r"[^$]*adapters: {'bottleneck': 7}[^$]*--from t5x --to elm")
    with pytest.raises(InputError, match=words):
        load_base(tmp_path / "run")
