"""Files of JSON with anything in them: a folder opens, or one InputError says which file it is."""

import copy
import itertools
import json
import shutil

import hf_folders
import numpy as np
import pytest

from elm_jax.errors import InputError
from elm_jax.experts import hf_adapters, weight_sources
from elm_jax.experts.base import load_base
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.overlay import Expert, initial_overlay, load_expert, save_expert
from elm_jax.formats.elm import elm_folders
from elm_jax.formats.hf import t5_models
from elm_jax.models.adapters.config import AdapterConfig
from elm_jax.runtime import storage

BYTES = {
    "no UTF-8": b"\xff\xfe{\x00}\x00",
    "nested 100,000 deep": b'{"a": ' + b"[" * 100_000,
    "a number of 10,000 digits": b'{"a": ' + b"9" * 10_000 + b"}",
    "cut short": b'{"model_type": "t5"',
    "a list": b"[1, 2]",
    "nothing": b"",
}
VALUES = (None, [], {}, ["relu"], {"a": 1}, "x", "../x", "a\0b", -1, 0, 0.5, True, 10**12, float("inf"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, vocabulary_proto):
    """A Hugging Face folder with a vocabulary and adapters, a base of it, and an expert on the base."""
    root = tmp_path_factory.mktemp("malformed")
    hf_folders.publish(hf_folders.build("t5_1_1"), "t5_1_1", root / "t5", shard_size="30KB")
    hf_folders.add_vocabulary(root / "t5", vocabulary_proto)
    (root / "t5" / "generation_config.json").write_text('{"max_length": 20}')
    opened = t5_models.open_hf(root / "t5")
    elm_folders.write_elm(root / "base", opened)
    base = load_base(root / "base")
    config, overlay, _ = initial_overlay(base, "adapter", adapter=AdapterConfig(3), train_norms=True, seed=0)
    card = ExpertCard("e", "prompt", "adapter", base.reference(), config.to_dict())
    save_expert(root / "expert", Expert(card, overlay))
    hf_adapters.write_hf_expert(root / "hf", opened, load_expert(root / "expert"))
    (root / "hf" / "added_tokens.json").write_text('{"<new>": 312}')
    return root


FILES = [("t5", "config.json"), ("t5", "generation_config.json"), ("t5", "model.safetensors.index.json"),
         ("hf", "tokenizer.json"), ("hf", "added_tokens.json"), ("hf", "adapters.json"),
         ("base", "base.json"), ("expert", "expert.json")]


def open_all(root, kind):
    """Everything that a conversion does before it writes."""
    source = weight_sources.open_source("hf" if kind in ("t5", "hf") else "elm", root / kind)
    source.leaves()


def outcome(root, kind, name):
    """None if the folder opens, else the error's text."""
    try:
        open_all(root, kind)
    except InputError as error:
        text = str(error)
        assert len(text) < 5000
        return text
    return None


@pytest.fixture
def spoilt(folders, tmp_path):
    shutil.copytree(folders, tmp_path / "all")
    text = (tmp_path / "all" / "expert" / "expert.json").read_text()
    (tmp_path / "all" / "expert" / "expert.json").write_text(
        text.replace(str(folders / "base"), str(tmp_path / "all" / "base")))
    # The vocabulary of this folder is to be read from tokenizer.json.
    (tmp_path / "all" / "hf" / "spiece.model").unlink()
    return tmp_path / "all"


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_what_is_no_json_object(spoilt, kind, name):
    path = spoilt / kind / name
    assert outcome(spoilt, kind, name) is None
    for what, contents in BYTES.items():
        path.write_bytes(contents)
        assert name in (outcome(spoilt, kind, name) or ""), what
    path.unlink()
    path.mkdir()
    assert name in outcome(spoilt, kind, name) and "folder" in outcome(spoilt, kind, name)


def places(value, depth=2):
    """Where values lie in a JSON value, down to a depth; of a list, the first entry stands for all."""
    if depth and isinstance(value, dict):
        for key in list(value)[:40]:
            yield (key,)
            yield from ((key, *rest) for rest in places(value[key], depth - 1))
    elif depth and isinstance(value, list) and value:
        yield (0,)
        yield from ((0, *rest) for rest in places(value[0], depth - 1))


def replaced(value, place, new):
    value = copy.deepcopy(value)
    inside = value
    for key in place[:-1]:
        inside = inside[key]
    if new is ...:
        del inside[place[-1]]
    else:
        inside[place[-1]] = new
    return value


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), FILES)
def test_fields_with_odd_values(spoilt, kind, name):
    """Of all fields with all odd values, a sample: those that open may, all others are an InputError."""
    path = spoilt / kind / name
    whole = json.loads(path.read_text())
    cases = list(itertools.product(places(whole, 3), (*VALUES, ...)))
    chosen = np.random.default_rng(0).permutation(len(cases))[:60]
    refused = 0
    for place, new in (cases[number] for number in chosen):
        path.write_text(json.dumps(replaced(whole, place, new)))
        refused += outcome(spoilt, kind, name) is not None
    assert refused or name == "generation_config.json"


@pytest.mark.parametrize(("kind", "name", "change", "words"), [
    ("t5", "config.json", {"feed_forward_proj": ["relu"]}, r"feed_forward_proj(.|\n)*config.json"),
    ("t5", "config.json", {"vocab_size": 10**12}, r"config.json(.|\n)*vocab_size(.|\n)*1000000000000"),
    ("t5", "config.json", {"num_layers": 10**9}, r"config.json(.|\n)*num_encoder_layers"),
    ("t5", "config.json", {"num_heads": 2**20, "d_kv": 2**20}, r"config.json(.|\n)*head_dim"),
    ("t5", "config.json", {"tie_word_embeddings": "false"}, r"config.json(.|\n)*'false'(.|\n)*true or false"),
    ("base", "base.json", {"network": None}, r"base.json(.|\n)*network: None"),
    ("base", "base.json", {"network": ...}, r"base.json(.|\n)*no network"),
    ("base", "base.json", {"vocabulary": "../x"}, r"same folder(.|\n)*base.json(.|\n)*\.\./x"),
    ("base", "base.json", {"facts": {"t5x": {"step": "7"}}}, r"step is wrong(.|\n)*base.json(.|\n)*'7'"),
    ("base", "base.json", {"facts": {"t5x": {"step": 10**12}}}, r"step is wrong(.|\n)*2147483647"),
    ("base", "base.json", {"facts": {"hf": {"tokenizer": {"../../evil.json": {}}}}},
     r"tokenizer is wrong(.|\n)*base.json(.|\n)*evil"),
    ("base", "base.json", {"facts": {"hf": {"tokenizer": [1]}}}, r"tokenizer is wrong(.|\n)*base.json"),
    ("base", "base.json", {"facts": {"hf": {"added_tokens": {"x": {"content": "y"}}}}},
     r"tokenizer is wrong"),
    ("base", "base.json", {"facts": {"hf": {"added_tokens": {"312": {"content": "y", "special": 1}}}}},
     r"tokenizer is wrong"),
    ("t5", "config.json", {"x": float("nan")}, r"config.json(.|\n)*NaN is no number"),
    ("t5", "generation_config.json", {"x": float("inf")}, r"generation_config.json(.|\n)*Infinity is no"),
    ("t5", "config.json", {"_name_or_path": "a\ud800"}, r"config.json(.|\n)*surrogates"),
    ("base", "base.json", {"facts": {"hf": {"config": {}}}}, r"no network that(.|\n)*base.json"),
    ("hf", "added_tokens.json", {"<new>": "7"}, r"added tokens(.|\n)*added_tokens.json(.|\n)*'<new>': '7'"),
    ("hf", "tokenizer.json", {"added_tokens": [{"id": 400}]}, r"added tokens(.|\n)*tokenizer.json"),
    ("hf", "tokenizer.json", {"model": {"type": "Unigram", "vocab": [["<pad>", 0], ["\ud800", 0]]}},
     r"tokenizer(.|\n)*tokenizer.json(.|\n)*surrogates"),
    ("expert", "expert.json", {"base": {"fingerprint": "x", "path": 7}},
     r"expert.json: base/path(.|\n)*got: 7"),
    ("expert", "expert.json", {"base": {"name": "x"}}, r"names no base"),
])
def test_what_the_error_says(spoilt, kind, name, change, words):
    path = spoilt / kind / name
    values = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    with pytest.raises(InputError, match=words):
        open_all(spoilt, kind)


@pytest.mark.parametrize("name", ["_METADATA", "_CHECKPOINT_METADATA"])
@pytest.mark.parametrize("contents", [*BYTES.values(), b'{"tree_metadata": {"x": {"key_metadata": 7}}}'])
def test_orbax_s_own_descriptions(spoilt, name, contents):
    """Damaged, they are one error of the reader; what Orbax can do without, it may."""
    path = spoilt / "base" / "weights" / name
    assert path.exists()
    path.write_bytes(contents)
    try:
        open_all(spoilt, "base")
    except InputError as error:
        assert str(spoilt / "base") in str(error) and len(str(error)) < 5000
    else:
        assert name == "_CHECKPOINT_METADATA"


@pytest.mark.parametrize(("kind", "name"), [("t5", "spiece.model"), ("base", "vocabulary.model"),
                                            ("t5", "model-00001-of-00004.safetensors"),
                                            ("hf", "model.safetensors"), ("hf", "adapters.safetensors")])
def test_a_folder_in_place_of_a_file(spoilt, kind, name):
    names = [path.name for path in (spoilt / kind).iterdir()]
    name = next(each for each in names if each.startswith(name.partition("-of-")[0]))
    (spoilt / kind / name).unlink()
    (spoilt / kind / name).mkdir()
    with pytest.raises(InputError, match=rf"file is expected(.|\n)*{name}(.|\n)*a folder"):
        open_all(spoilt, kind)


def test_a_vocabulary_that_is_a_folder(spoilt):
    with pytest.raises(InputError, match="file is expected"):
        weight_sources.open_source("hf", spoilt / "t5", vocabulary=spoilt)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "a\0b", None, 7, ["x"]])
def test_names_that_are_none(name):
    with pytest.raises(InputError, match="must be the name of a file in the same folder"):
        storage.require_name(name, "here", "vocabulary")
    assert storage.require_name("a.model", "here", "vocabulary") == "a.model"
