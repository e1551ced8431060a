"""LoRA experts with updates in unlike layers, against numpy in float64 with zeros for what is absent."""

import dataclasses
import functools

import merge_cases as cases
import merge_made as made
import numpy as np
import pytest
import weights

from elm_jax.errors import InputError
from elm_jax.experts.base import Base
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.overlay import Expert, load_expert, resolve, save_expert
from elm_jax.merging.methods.method_table import METHODS
from elm_jax.models import AdapterConfig, families
from elm_jax.models.adapters.kind import is_adapter_leaf
from elm_jax.models.decoder.config import DecoderConfig
from elm_jax.models.network import NORM
from elm_jax.runtime import trees
from elm_jax.workflows.merge.in_memory import merge
from elm_jax.workflows.merge.search_merge import mergeable

CONFIG = DecoderConfig(29, 16, 2, 1, 8, 24, 4, 64)
LORA = {
    "low": AdapterConfig(kind="lora", rank=2, alpha=6.0, targets=("query", "value"), layers=(0, 1)),
    "high": AdapterConfig(kind="lora", rank=3, targets=("query", "wi_0"), layers=(1, 2)),
}
SCALES, WEIGHTS = {"low": 3.0, "high": 1.0}, (0.5, 0.3)
PLACES = {"query": "attention", "value": "attention", "wi_0": "mlp"}


@functools.cache
def base() -> Base:
    params = weights.drawn(families.network_of(CONFIG))
    return Base("tiny", params, CONFIG, trees.fingerprint(params), made.base().vocabulary)


def expert(name: str, adapter: AdapterConfig, norms: bool = True) -> Expert:
    """With the norms that training would leave in it: those above the lowest adapter."""
    network = families.network_of(CONFIG.with_adapter(adapter))
    drawn = weights.drawn(network, 7 + len(name))
    overlay, _ = trees.split(drawn, lambda path: is_adapter_leaf(path) or (
        norms and network.role_of(path) == NORM and network.depth_of(path) >= min(adapter.layers)))
    card = ExpertCard(id=name, kind="prompt", form="adapter", base=base().reference(),
                      network=network.config.to_dict(), tasks=(f"toys__{name}",))
    return Expert(card, overlay)


@functools.cache
def both(norms: bool = True) -> tuple[Expert, Expert]:
    return tuple(expert(name, adapter, norms) for name, adapter in LORA.items())


def update(one: Expert, layer: int, place: str, scale: float) -> np.ndarray | None:
    """``scale * down @ up`` in float64; None where the expert has none."""
    flat = trees.flatten(one.overlay)
    start = f"decoder/layers_{layer}/{PLACES[place]}/{place}_adapter/"
    factors = [flat.get(f"{start}{end}/kernel") for end in ("down", "up")]
    return None if factors[0] is None else scale * np.matmul(*(each.astype(np.float64) for each in factors))


@pytest.mark.parametrize("method", ["mean", "task_arithmetic", "ties", "slerp"])
def test_an_absent_update_is_zero_and_an_absent_norm_is_the_bases(method):
    rank = None if METHODS[method].is_weighted_sum else 64  # all of it: no method is cut
    merged = merge(both(), method=method, weights=WEIGHTS, base=base(), rank=rank)
    network, params = resolve(base(), merged)
    adapter = network.config.adapter
    assert adapter.layers == (0, 1, 2) and trees.first_difference(params, network.abstract_params()) is None
    if rank is None:
        assert [adapter.rank_of(place) for place in PLACES] == [5, 2, 3]  # of layer 1, which has both
    seen = 0
    for layer in range(3):
        for place in PLACES:
            own = [update(one, layer, place, SCALES[one.card.id]) for one in both()]
            found = update(merged, layer, place, adapter.scale_of(place))
            wide = [np.zeros_like(found) if each is None else each for each in own]
            under = np.zeros_like(found) if METHODS[method].needs_base else None
            wanted = cases.REFERENCE[method](cases.Case(method, wide, under, WEIGHTS)).values
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5, err_msg=f"{layer} {place}")
            seen += any(each is not None for each in own)
            assert np.any(found) == any(each is not None for each in own)
    assert seen == 7  # of nine: values of layer 2 and wi_0 of layer 0 are nobody's
    leaf = "decoder/layers_0/pre_attention_norm/scale"  # below the lowest update of the second
    mine, under = trees.flatten(both()[0].overlay)[leaf], trees.flatten(base().params)[leaf]
    assert leaf not in trees.flatten(both()[1].overlay)
    wanted = cases.REFERENCE[method](cases.Case(
        method, [mine, under], under if METHODS[method].needs_base else None, WEIGHTS)).values
    np.testing.assert_allclose(trees.flatten(merged.overlay)[leaf], wanted, rtol=1e-6)


def test_what_the_merge_says_and_what_it_refuses(tmp_path, capsys):
    with pytest.raises(InputError, match=r"Norms that some experts trained(.|\n)*--method task_arithmetic"):
        merge(both())
    with pytest.raises(InputError, match=r"cannot be searched(.|\n)*low: \[0, 1\], high: \[1, 2\]"):
        mergeable(base(), both(), "mean")
    bottleneck = [expert(name, AdapterConfig(4, layers=layers)) for name, layers in
                  (("low", (0, 1)), ("high", (1, 2, 3)))]
    with pytest.raises(InputError, match=r"kind bottleneck in unlike layers(.|\n)*layers 0 to 1 and layers 1 "
                                         r"to 3(.|\n)*ADAPTER_LAYERS"):
        merge(bottleneck, base=base())
    for one in both(norms=False):
        save_expert(tmp_path / one.card.id, one)
    status, out, _ = made.run(capsys, tmp_path / "low", tmp_path / "high", "--output", tmp_path / "merged")
    assert status == 0 and out.count("note: ") == 2 and "its update counts as zero" in out
    assert "note: low has low-rank updates in layers 0 to 1, the result in layers 0 to 2" in out
    assert trees.fingerprint(load_expert(tmp_path / "merged").overlay) == trees.fingerprint(
        merge(both(norms=False)).overlay)
    whole = dataclasses.replace(LORA["low"], layers=None)
    wide = merge([expert("whole", dataclasses.replace(whole, layers=(0, 1, 2, 3)), norms=False),
                  both(norms=False)[1]])
    assert resolve(base(), wide)[0].config.adapter.layers is None
