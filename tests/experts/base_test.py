"""A base on disk: what is read is what was written, or an error says which leaf is not."""

import numpy as np
import pytest
import weights

from elm_jax.errors import InputError
from elm_jax.experts.base import load_base, save_base
from elm_jax.models.t5.config import T5Config
from elm_jax.models.t5.network import T5Network
from elm_jax.runtime import storage, tree_files, trees

CONFIG = T5Config(vocab_size=32, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=16, num_encoder_layers=1,
                  num_decoder_layers=1)


@pytest.fixture
def params():
    return weights.drawn(T5Network(CONFIG))


def test_round_trip(tmp_path, params):
    save_base(tmp_path / "base", params, CONFIG, None, {"steps": 3})
    base = load_base(tmp_path / "base")
    assert base.config == CONFIG and base.fingerprint == trees.fingerprint(params)
    assert trees.fingerprint(base.params) == trees.fingerprint(params)


def test_a_base_that_does_not_fit_its_config_names_the_leaf(tmp_path, params):
    save_base(tmp_path / "base", params, CONFIG, None, {})
    path = tmp_path / "base" / "base.json"
    path.write_text(path.read_text().replace('"mlp_dim": 16', '"mlp_dim": 24'))
    with pytest.raises(InputError, match=r"decoder/layers_0/mlp/wi_0/kernel: \[8, 16\] instead of \[8, 24\]"):
        load_base(tmp_path / "base")


def test_changed_weights_are_noticed(tmp_path, params):
    save_base(tmp_path / "base", params, CONFIG, None, {})
    params["token_embedder"]["embedding"] = np.array(params["token_embedder"]["embedding"]) + 1
    storage.remove(tmp_path / "base" / "weights")
    tree_files.save_tree(tmp_path / "base" / "weights", params)
    with pytest.raises(InputError, match="not those that were written"):
        load_base(tmp_path / "base")


def test_a_half_written_base_is_refused(tmp_path, params):
    save_base(tmp_path / "base", params, CONFIG, None, {})
    (tmp_path / "base" / storage.MARKER).unlink()
    with pytest.raises(InputError, match="base model is not whole"):
        load_base(tmp_path / "base")
