"""Adafactor and AdamW with the settings of the method, built from optax transformations."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.models.network import has_expert_axis
from elm_jax.runtime import trees
from elm_jax.types import Array, Params

SCHEDULES = ("constant", "linear_decay")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser and learning rate; hashable, a static argument of jit.

    Attributes:
        name: 'adafactor' or 'adamw'.
        learning_rate: absolute step size (Adafactor's parameter scaling and relative step are off).
        schedule: 'constant', or 'linear_decay' to zero just after the last step.
        warmup_steps: the rate rises linearly over that many first steps; 0 for none.
        clip_norm: largest global norm of the gradient; None for no clipping.
        weight_decay: decoupled, scaled by the learning rate, on leaves of two or more dimensions
            (never on norms and biases).
        beta1: AdamW's decay of the first moment.
        beta2: AdamW's decay of the second moment.
        epsilon: AdamW's addend to the root of the second moment.
        decay_exponent: Adafactor's second moment decays by ``1 - t^-decay_exponent`` at step t.
        update_clip: Adafactor's largest root mean square of a leaf's update; None for no clipping.
        parameter_scale: whether an update is scaled by the root mean square of its leaf (at least
            1e-3), as T5's own pretraining does; `learning_rate` is then relative. Off in ELM.
        min_dim_size_to_factor: Adafactor factors a leaf whose second largest dimension is at
            least this.
    """

    name: str = "adafactor"
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    clip_norm: float | None = None
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    decay_exponent: float = 0.8
    update_clip: float | None = 1.0
    parameter_scale: bool = False
    min_dim_size_to_factor: int = 128

    def __post_init__(self) -> None:
        if self.name not in _SCALERS:
            raise unknown_name("optimizer", str(self.name), _SCALERS, where="OptimizerConfig.name")
        if self.schedule not in SCHEDULES:
            raise unknown_name(
                "schedule", str(self.schedule), SCHEDULES, where="OptimizerConfig.schedule"
            )
        for field in ("learning_rate", "epsilon", "decay_exponent"):
            self._check(field, lambda value: _is_number(value) and value > 0, "a number above 0")
        for field in ("clip_norm", "update_clip"):
            self._check(field, lambda value: value is None or (_is_number(value) and value > 0),
                        "None or a number above 0")
        for field in ("beta1", "beta2"):
            self._check(field, lambda value: _is_number(value) and 0 <= value < 1,
                        "a number from 0 to below 1")
        self._check("parameter_scale", lambda value: isinstance(value, bool), "True or False")
        self._check("weight_decay", lambda value: _is_number(value) and value >= 0,
                    "a number, at least 0")
        for field, least in (("warmup_steps", 0), ("min_dim_size_to_factor", 1)):
            self._check(field, lambda value, least=least: type(value) is int and value >= least,
                        f"an integer, at least {least}")

    def _check(self, field: str, fits: Callable[[Any], bool], expected: str) -> None:
        value = getattr(self, field)
        if not fits(value):
            raise InputError(
                describe("Optimizer setting is wrong", where=f"OptimizerConfig.{field}",
                         got=repr(value), expected=expected)
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value < float("inf")


def learning_rate(
    config: OptimizerConfig, step: Array, train_steps: Array, peak: Array | None = None
) -> Array:
    """Learning rate f32[] of the update that follows `step` finished updates.

    Args:
        config: schedule and peak rate.
        step: i32[], 0 for the first update.
        train_steps: i32[], the number of updates; may be traced, so that runs of unlike length
            share one compiled program.
        peak: f32[], takes the place of the config's rate; may be traced, for runs of unlike rates.
    """
    step = jnp.asarray(step, jnp.float32)
    rate = jnp.float32(config.learning_rate) if peak is None else jnp.asarray(peak, jnp.float32)
    if config.warmup_steps:
        rate = rate * jnp.minimum(1.0, (step + 1.0) / config.warmup_steps)
    if config.schedule == "linear_decay":
        decay_steps = jnp.maximum(jnp.float32(train_steps) - config.warmup_steps, 1.0)
        done = jnp.maximum(step - config.warmup_steps, 0.0)
        rate = rate * jnp.clip(1.0 - done / decay_steps, 0.0, 1.0)
    return rate


def make_optimizer(
    config: OptimizerConfig, train_steps: Array | int, peak: Array | None = None
) -> optax.GradientTransformation:
    """Makes the optax transformation of a config.

    Args:
        config: what to build.
        train_steps: i32[], the run's number of updates; may be traced.
        peak: f32[], takes the place of the config's rate; may be traced.

    Experts of a sparse layer, which lie in one leaf, are to Adafactor, its clipping and the scaling by
    parameters as many leaves: no expert's update depends on another's gradient but by `clip_norm`.

    Source: Adafactor, https://arxiv.org/abs/1804.04235; AdamW, https://arxiv.org/abs/1711.05101.
    """
    parts = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts.extend(_SCALERS[config.name](config))
    if config.parameter_scale:
        parts.append(_each_expert(optax.scale_by_param_block_rms()))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=_decayed))
    parts.append(
        optax.scale_by_learning_rate(lambda step: learning_rate(config, step, train_steps, peak))
    )
    return optax.chain(*parts)


def _decayed(params: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def _adafactor(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    parts = [
        _each_expert(optax.scale_by_factored_rms(
            decay_rate=config.decay_exponent,
            min_dim_size_to_factor=config.min_dim_size_to_factor,
        ), _FACTORED_AXES)
    ]
    if config.update_clip is not None:
        parts.append(_each_expert(optax.clip_by_block_rms(config.update_clip)))
    return parts


_FACTORED_AXES = {"count": None}
"""Statistics of Adafactor that all experts share."""


def _each_expert(inner: optax.GradientTransformation, shared: dict[str, None] | None = None
                 ) -> optax.GradientTransformation:
    """Applies a transformation of leaves to each expert's part [...] of the leaves [E, ...] of experts.

    The state has the same form as without, and trees without experts are left to `inner`.

    Args:
        inner: treats every leaf alone.
        shared: fields of its state, a named tuple whose others are trees as of the parameters, that are not
            each leaf's own.
    """

    def axes(state: Any) -> Any:
        return state._replace(**{name: (shared or {}).get(name, 0) for name in state._fields})

    def joined(rest: Any, experts: Any) -> Any:
        return rest._replace(**{
            name: trees.merge(getattr(rest, name), getattr(experts, name))
            for name in rest._fields if name not in (shared or {})})

    def parted(state: Any) -> tuple[Any, Any]:
        parts = {name: trees.split(getattr(state, name), has_expert_axis)
                 for name in state._fields if name not in (shared or {})}
        return tuple(state._replace(**{name: part[which] for name, part in parts.items()})
                     for which in (0, 1))

    def init(params: Params) -> Any:
        experts, rest = trees.split(params, has_expert_axis)
        if not experts:
            return inner.init(params)
        state = inner.init(rest)
        return joined(state, jax.vmap(inner.init, out_axes=axes(state))(experts))

    def update(updates: Params, state: Any, params: Params) -> tuple[Params, Any]:
        experts, rest = trees.split(updates, has_expert_axis)
        if not experts:
            return inner.update(updates, state, params)
        own, others = parted(state)
        own_params, other_params = trees.split(params, has_expert_axis)
        found = jax.vmap(inner.update, in_axes=(0, axes(own), 0), out_axes=(0, axes(own)))(
            experts, own, own_params)
        left = inner.update(rest, others, other_params)
        return trees.merge(left[0], found[0]), joined(left[1], found[1])

    return optax.GradientTransformation(init, update)


def _adamw(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    return [optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)]


_SCALERS: dict[str, Callable[[OptimizerConfig], list[optax.GradientTransformation]]] = {
    "adafactor": _adafactor,
    "adamw": _adamw,
}
