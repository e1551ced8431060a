"""Losses of sparse layers: balance of the experts' load, and the size of the router's logits.

Both are per layer over the whole batch, and the mean over layers counts. Padding takes no part.
Sources: Switch, https://arxiv.org/abs/2101.03961, equations 4 to 6; ST-MoE, https://arxiv.org/abs/2202.08906,
equation 5.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from elm_jax.models.layers.gates import RouterSums
from elm_jax.models.losses import LossConfig, LossSums
from elm_jax.types import Array

BALANCE, Z = "balance_loss", "router_z_loss"
"""Names of the losses: of the settings in `LossConfig`, in `LossSums.auxiliary` and in metrics."""


def balance_loss(reports: Mapping[str, RouterSums]) -> Array:
    """Balance loss f32[]: mean over layers of ``E sum_e (choices_e / tokens) (probs_e / tokens)``.

    It is K for even loads, and up to E for K = 1 where one expert gets all. Its gradient comes through the
    probabilities: numbers of choices have none.

    Args:
        reports: of each sparse layer; at least one.
    """
    return _mean([len(sums.choices) * jnp.sum(sums.choices * sums.probs) / jnp.square(_tokens(sums))
                  for sums in reports.values()])


def router_z_loss(reports: Mapping[str, RouterSums]) -> Array:
    """Router's z-loss f32[]: mean over tokens, then layers, of ``logsumexp(logits)^2``.

    Args:
        reports: of each sparse layer; at least one.
    """
    return _mean([sums.z / _tokens(sums) for sums in reports.values()])


def with_router_losses(sums: LossSums, reports: Mapping[str, RouterSums], settings: LossConfig) -> LossSums:
    """Adds the losses of sparse layers to the sums of a batch, and the layers' reports.

    Args:
        sums: of the tokens.
        reports: of each sparse layer above a frozen trunk; none for a dense network.
        settings: the coefficients.
    """
    if not reports:
        return sums
    losses = {BALANCE: (settings.balance_loss, balance_loss), Z: (settings.router_z_loss, router_z_loss)}
    auxiliary = {name: coefficient * loss(reports) * sums.weight
                 for name, (coefficient, loss) in losses.items() if coefficient}
    return dataclasses.replace(sums, auxiliary={**sums.auxiliary, **auxiliary}, router=dict(reports))


def _tokens(sums: RouterSums) -> Array:
    return jnp.maximum(sums.tokens, 1.0)


def _mean(values: list[Array]) -> Array:
    return jnp.mean(jnp.stack(values))
