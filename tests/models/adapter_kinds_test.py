"""Kinds of adapters: a further one is a class and a row; settings without effect are refused."""

import copy
import dataclasses
import pickle
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model as tiny
import tiny_run
from flax.linen.partitioning import param_with_axes

import gin
from elm_jax import AdapterConfig
from elm_jax.cli import gin_config
from elm_jax.errors import InputError
from elm_jax.experts.base import Base
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.overlay import Expert, initial_overlay, load_expert, resolve, save_expert
from elm_jax.models import T5Config, T5Network
from elm_jax.models.adapters.bottleneck import BottleneckConfig
from elm_jax.models.adapters.config import KINDS, adapter_of, attach
from elm_jax.models.adapters.kind import PLACES, AdapterKind
from elm_jax.models.adapters.low_rank import LowRankConfig
from elm_jax.models.blocks.layer_stack import Layout
from elm_jax.models.decode import greedy
from elm_jax.models.network import ADAPTER, GATE
from elm_jax.runtime import trees
from elm_jax.runtime.sharding import Axes
from elm_jax.types import Array, Padded

logits_of = jax.jit(T5Network.logits, static_argnums=0)
BARE = dataclasses.replace(tiny.network(adapter=False).config, num_encoder_layers=2, num_decoder_layers=2)


# A further kind, as it would stand in a file of its own: (IA)^3's scaling vectors, Liu et al.,
# https://arxiv.org/abs/2205.05638, here on the outputs of sub-layers and on the keys. Those of the keys pass
# for gates, so that the kind has a say in its leaves' roles.
@dataclasses.dataclass(frozen=True)
class ScalingConfig(AdapterKind):
    kind: ClassVar[str] = "third"
    start: float = 1.0

    def module(self, place: str, dtype: jnp.dtype) -> nn.Module | None:
        axis = "joined_kv" if place == "key" else "embed"
        return Scaling(self.start, axis) if place in ("attention", "cross_attention", "mlp", "key") else None

    def role_of(self, path: str) -> str | None:
        return GATE if path.endswith("key_adapter/scaling") else super().role_of(path)


class Scaling(nn.Module):
    start: float
    axis: str

    @nn.compact
    def __call__(self, y: Array, x: Array) -> Array:
        init = nn.initializers.constant(self.start)
        factors = param_with_axes("scaling", init, y.shape[-1:], jnp.float32, axes=(self.axis,))
        return y * jnp.broadcast_to(factors.astype(y.dtype), y.shape)


@pytest.fixture(autouse=True)
def third_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "third", ScalingConfig)


def folded(flat: dict) -> dict:
    """Scaled networks' leaves as those of a network without: each vector in the kernel before it."""
    kernels = {"attention": "attention/out", "self_attention": "self_attention/out", "mlp": "mlp/wo",
               "encoder_decoder_attention": "encoder_decoder_attention/out", "key": "key"}
    plain = {path: leaf.astype(np.float64) for path, leaf in flat.items() if "_adapter/" not in path}
    for path, leaf in flat.items():
        if path.endswith("_adapter/scaling"):
            place, name = path.removesuffix("_adapter/scaling").rsplit("/", 1)
            plain[f"{place}/{kernels[name]}/kernel"] *= leaf
    return {path: leaf.astype(np.float32) for path, leaf in plain.items()}


def drawn(config: T5Config) -> dict:
    rng = np.random.default_rng(0)
    return {path: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32) if path.endswith(("scale", "scaling"))
            else rng.normal(0, leaf.shape[0] ** -0.5, leaf.shape).astype(np.float32)
            for path, leaf in trees.flatten(T5Network(config).abstract_params()).items()}


def batch() -> dict:
    rng = np.random.default_rng(1)
    return {"encoder_input_tokens": rng.integers(2, 64, (2, 6)).astype(np.int32),
            "decoder_input_tokens": rng.integers(2, 64, (2, 5)).astype(np.int32)}


def test_a_third_kind_has_leaves_axes_and_roles():
    config = BARE.with_adapter(AdapterConfig(kind="third"))
    network, bare = T5Network(config), trees.flatten(T5Network(BARE).abstract_params())
    found = trees.flatten(network.abstract_params())
    roles = {path: network.role_of(path) for path in found}
    assert {path: roles.pop(path) for path in bare} == {path: T5Network(BARE).role_of(path) for path in bare}
    own = {path: (network.axes_of(path), role) for path, role in roles.items()}
    attentions = {"encoder": ["attention"], "decoder": ["self_attention", "encoder_decoder_attention"]}
    places = {f"{stack}/layers_{layer}/{name}_adapter/scaling": axis
              for stack, names in attentions.items() for layer in range(2)
              for name, axis in [("mlp", "embed"), *((each, "embed") for each in names),
                                 *((f"{each}/key", "joined_kv") for each in names)]}
    assert own == {path: (Axes((axis,)), GATE if axis == "joined_kv" else ADAPTER)
                   for path, axis in places.items()}


@pytest.mark.parametrize("layout", [Layout(), Layout("layer", scan_layers=True)], ids=["plain", "scanned"])
def test_a_third_kind_computes_what_it_says(layout):
    """Its vectors folded into the kernels before them, in float64 numpy: the bare network says the same."""
    config = BARE.with_adapter(AdapterConfig(kind="third"))
    flat = drawn(config)
    found = logits_of(T5Network(config, layout), trees.unflatten(flat), batch())
    bare = logits_of(T5Network(BARE), trees.unflatten(folded(flat)), batch())
    np.testing.assert_allclose(found, bare, atol=2e-4)
    plain = {path: leaf for path, leaf in flat.items() if "_adapter/" not in path}
    assert np.abs(found - logits_of(T5Network(BARE), trees.unflatten(plain), batch())).max() > 1e-2


def test_a_third_kind_decodes():
    config = BARE.with_adapter(AdapterConfig(kind="third"))
    flat, inputs = drawn(config), Padded(batch()["encoder_input_tokens"], np.array([6, 6], np.int32))
    found = greedy(T5Network(config), trees.unflatten(flat), inputs, max_length=6)
    bare = greedy(T5Network(BARE), trees.unflatten(folded(flat)), inputs, max_length=6)
    np.testing.assert_array_equal(found, bare)


def test_a_third_kind_trains_and_is_saved_as_an_expert(tmp_path):
    bare = tiny_run.network(adapter=False, dropout=0.0)
    base = Base("tiny", tiny_run.parameters(bare), bare.config, trees.fingerprint(tiny_run.parameters(bare)))
    config, overlay, frozen = initial_overlay(base, "adapter", adapter=AdapterConfig(kind="third"),
                                              train_norms=True, seed=0)
    fresh = logits_of(T5Network(config), trees.merge(frozen, overlay), batch())
    np.testing.assert_array_equal(fresh, logits_of(bare, base.params, batch()))

    result = tiny_run.train(None, 20, network=T5Network(config), base=trees.merge(frozen, overlay))
    trained = {path: np.asarray(leaf) for path, leaf in trees.flatten(result.overlay).items()}
    assert trained.keys() == trees.flatten(overlay).keys()
    scaling = [leaf for path, leaf in trained.items() if T5Network(config).role_of(path) in (ADAPTER, GATE)]
    assert len(scaling) == 8 and all(np.any(leaf != 1) for leaf in scaling)
    assert result.rows[-1]["loss"] < result.rows[0]["loss"]

    card = ExpertCard(id="scaled", kind="prompt", form="adapter", base=base.reference(),
                      network=config.to_dict(), tasks=("copy",))
    save_expert(tmp_path / "expert", Expert(card, trees.unflatten(trained)))
    network, params = resolve(base, load_expert(tmp_path / "expert"))
    assert network.config == config and adapter_of(card.network) == ScalingConfig()
    after = trees.flatten(params)
    wanted = trees.flatten(frozen) | trained
    assert after.keys() == wanted.keys()
    assert all(np.array_equal(after[path], leaf) for path, leaf in wanted.items())


def test_without_its_row_there_is_no_third_kind(monkeypatch):
    card = BARE.with_adapter(ScalingConfig(2.0)).to_dict()
    assert T5Config.from_dict(card).adapter == ScalingConfig(2.0)
    monkeypatch.delitem(KINDS, "third")
    with pytest.raises(InputError, match="Unknown kind of adapter 'third'"):
        T5Config.from_dict(card)


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, BottleneckConfig(None)), ({"bottleneck": 3}, BottleneckConfig(3)),
    ({"kind": "lora"}, LowRankConfig(8)), ({"kind": "lora", "rank": 2, "alpha": 4.0}, LowRankConfig(2, 4.0)),
    ({"kind": "third", "start": 0.5}, ScalingConfig(0.5)),
    # what a file that lists every setting says of the other kinds
    ({"kind": "bottleneck", "bottleneck": 3, "rank": 8, "alpha": None}, BottleneckConfig(3)),
    ({"kind": "lora", "bottleneck": None, "rank": 2, "alpha": None}, LowRankConfig(2)),
])
def test_settings_build_their_kind_in_python_cards_and_gin(settings, expected):
    assert AdapterConfig(**settings) == expected
    assert AdapterConfig(**expected.to_dict()) == expected
    assert adapter_of({"adapter": settings}) == expected
    assert pickle.loads(pickle.dumps(expected)) == expected
    assert hash(copy.deepcopy(expected)) == hash(expected)
    lines = [f"AdapterConfig.{name} = {value!r}" for name, value in settings.items()]
    network = [f"T5Config.{name} = {getattr(BARE, name)!r}" for name in
               ("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers",
                "num_decoder_layers")]
    gin_config.parse([], [*network, "T5Config.adapter = @AdapterConfig()", *lines])
    assert gin_config.build("T5Config") == BARE.with_adapter(expected)


@pytest.mark.parametrize("module", ["t5x_module", "t5_config"])
def test_t5x_builds_them_by_the_names_in_exported_folders(module):
    gin.clear_config()
    with gin.unlock_config():
        gin.parse_config("\n".join([
            "from __gin__ import dynamic_registration", f"from elm_jax.models import {module}",
            f"{module}.AdapterConfig.kind = 'lora'", f"{module}.AdapterConfig.rank = 3",
            f"FOUND = @{module}.AdapterConfig()"]))
    found = copy.deepcopy(gin.query_parameter("%FOUND"))
    gin.clear_config()
    assert found == LowRankConfig(3)


@pytest.mark.parametrize(("settings", "message"), [
    ({"rank": 4}, r"no effect(?s:.*)AdapterConfig\.rank(?s:.*)4 with kind 'bottleneck'(?s:.*)kind 'lora'"),
    ({"alpha": 8.0}, r"no effect(?s:.*)AdapterConfig\.alpha"),
    ({"kind": "lora", "bottleneck": 8}, r"no effect(?s:.*)AdapterConfig\.bottleneck"),
    ({"start": 2.0}, r"no effect(?s:.*)AdapterConfig\.start(?s:.*)kind 'third'"),
    ({"rnk": 4}, "Unknown AdapterConfig field 'rnk'(?s:.*)nearest: rank"),
    ({"kind": "lara"}, r"AdapterConfig\.kind(?s:.*)nearest: lora"),
    ({"kind": ["lora"]}, r"AdapterConfig\.kind"),
])
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        AdapterConfig(**settings)


def test_no_adapter_leaves_what_comes_and_knows_its_places():
    y, x = np.ones(3), np.zeros(3)
    for place in PLACES:
        assert attach(None, place, jnp.float32)(y, x) is y
    own = {BottleneckConfig(): ["attention", "mlp"], LowRankConfig(): ["query", "value"]}
    for adapter, places in own.items():
        assert [place for place in PLACES if adapter.module(place, jnp.float32) is not None] == places
    with pytest.raises(InputError, match=r"Unknown place of an adapter 'mpl'(?s:.*)nearest: mlp"):
        attach(None, "mpl", jnp.float32)
