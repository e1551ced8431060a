"""Settings of the sparse layers of a T5X checkpoint: what names and shapes say, and gin, and nobody.

T5X's networks with experts are flaxformer's (`flaxformer.architectures.moe`): minimal T5's names, beside them
``mlp/router``, ``mlp/expert`` and, in ST-MoE, ``extra_mlp``. How many experts a token has, and how many
tokens an expert, is in the run's gin alone.
"""

import ast
import re
from collections.abc import Collection, Mapping
from typing import Any

from elm_jax.errors import InputError, describe
from elm_jax.models.layers.sparse_config import (
    CHOICE,
    EXPERTS,
    POSITION,
    PROBABILITY,
    TOKENS,
    SparseConfig,
    steps_of,
)

_ROUTER = re.compile(r"(encoder|decoder)/layers_(\d+)/mlp/router/router_weights/w/kernel")
_SCANNED_BLOCK = re.compile(r"(encoder|decoder)/\1/subblock_\d+/.+")
_EXPERTS_PER_TOKEN = "NUM_SELECTED_EXPERTS"
_MACROS = {_EXPERTS_PER_TOKEN: "experts_per_token", "TRAIN_EXPERT_CAPACITY_FACTOR": "capacity_factor",
           "JITTER_NOISE": "jitter", "EXPERT_DROPOUT_RATE": "expert_dropout",
           "moe_layers.MoeLayer.min_expert_capacity": "min_capacity"}
_EVAL_FACTOR, _COUNT = "EVAL_EXPERT_CAPACITY_FACTOR", "NUM_EXPERTS"
_BY_PROBABILITY = "sparse_encoder/routing.TokensChooseMaskedRouter.batch_prioritized_routing"
_ENCODER_ROUTER = "sparse_encoder/moe_layers.MoeLayer.router"
_BY_EXPERTS = "@sparse_encoder/routing.ExpertsChooseMaskedRouter()"
_LINE = re.compile(r"^([\w./]+)\s*=\s*(.+?)\s*$", re.MULTILINE)


def sparse_settings(found: Mapping[str, tuple[int, ...]], layers: Mapping[str, int], gin: str = "",
                    experts_per_token: int | None = None, where: Any = None) -> SparseConfig | None:
    """The settings of a checkpoint's sparse layers; None if it has none.

    Outside of training nothing is dropped, unless experts choose: T5X's groups join rows, and depend on the
    number of chips.

    Args:
        found: shape of every tensor by T5X's name, without ``target``.
        layers: of ``encoder`` and ``decoder``.
        gin: the run's gin config; empty if there is none.
        experts_per_token: K; None takes the config's, or 1.
        where: for errors.

    Raises:
        InputError: layers are scanned in blocks; sparse layers are not at equal distances; the config says
            another number of experts, or what a setting cannot be.
    """
    if any(map(_SCANNED_BLOCK.fullmatch, found)):
        raise InputError(describe("T5X scans this network in blocks of several layers", where=where,
                                  got=next(filter(_SCANNED_BLOCK.fullmatch, found)),
                                  expected="one tensor a layer, encoder/layers_0/...",
                                  cure="restore it with scan_layers = False, and save it"))
    routers = {match.group(0): match for match in map(_ROUTER.fullmatch, found) if match}
    if not routers:
        return None
    sparse = {stack: {int(match[2]) for match in routers.values() if match[1] == stack} for stack in layers}
    said = _bindings(gin)
    count = found[min(routers)][-1]
    if said.get(_COUNT, count) != count:
        raise InputError(describe("The checkpoint holds another number of experts than its gin config says",
                                  where=where, got=f"{min(routers)}: {count} experts",
                                  expected=f"{_COUNT} = {said[_COUNT]}"))
    fields = {"capacity_factor": 1.25}
    fields |= {field: said[macro] for macro, field in _MACROS.items() if macro in said}
    if experts_per_token is not None:
        fields["experts_per_token"] = experts_per_token
    by_experts = said.get(_ENCODER_ROUTER) == _BY_EXPERTS
    if by_experts:
        fields["eval_capacity_factor"] = said.get(_EVAL_FACTOR, fields["capacity_factor"])
    several = fields.get("experts_per_token", 1) != 1
    order = PROBABILITY if said.get(_BY_PROBABILITY) is True else CHOICE if several else POSITION
    return SparseConfig(
        num_experts=count, choice=EXPERTS if by_experts else TOKENS, capacity_counts_choices=False,
        order=POSITION if by_experts else order, dense_sublayer=any("/extra_mlp/" in name for name in found),
        **_steps(sparse, layers, where), **fields)


def note(sparse: SparseConfig, gin: str, experts_per_token: int | None) -> str:
    """A sentence on what is known of sparse layers, and from where; the arguments of `sparse_settings`."""
    told = _EXPERTS_PER_TOKEN in _bindings(gin)
    source = "as was asked for" if experts_per_token is not None else (
        "as its gin config says" if told else "assumed: no gin config says it")
    use = "nothing is dropped" if sparse.choice == TOKENS else "the encoder's experts choose"
    return (f"A token has {sparse.experts_per_token} of {sparse.num_experts} experts ({source}); outside of "
            f"training {use}")


def _bindings(gin: str) -> dict[str, Any]:
    """Plain values of macros and bindings, and references to configurables as text."""
    found = {}
    for name, value in _LINE.findall(re.sub(r"\\\n\s*", "", gin)):
        if value.startswith("@"):
            found[name] = value
            continue
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue  # a macro, or the first line of a longer value
    return found


def _steps(sparse: Mapping[str, Collection[int]], layers: Mapping[str, int], where: Any) -> dict[str, Any]:
    """Steps and offset of sparse layers, by T5X's rule if it is that."""
    found = steps_of(sparse["encoder"], layers["encoder"], sparse["decoder"], layers["decoder"])
    if found is None:
        told = "; ".join(f"{stack} {sorted(numbers)} of {layers[stack]}" for stack, numbers in sparse.items())
        raise InputError(describe("The sparse layers are not at equal distances", where=where, got=told,
                                  expected="one of every so many layers, the same one in both stacks"))
    return found
