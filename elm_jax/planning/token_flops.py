"""What a token costs in a network: operations of the forward pass, parameters in all and those in use.

Matrix products only, two operations a multiply-add, as the mathematics needs them: padding of experts'
places, norms and activations do not count. Of a sparse layer a token uses the router and K of the E experts.
"""

import dataclasses
import math
from collections.abc import Mapping

from elm_jax.models.layers.sparse_config import TOKENS, SparseConfig
from elm_jax.models.network import Network, has_expert_axis
from elm_jax.runtime import trees

LOOKED_UP = ("token_embedder/embedding", "rel_embedding", "position_embedder/embedding")


@dataclasses.dataclass(frozen=True)
class TokenCost:
    """Cost of a token, of a row of S input and T target tokens.

    Attributes:
        total: parameters.
        active: parameters that a token uses: all but the experts that it does not choose.
        flops: operations of the forward pass a token, the mean over the row's S + T tokens.
    """

    total: int
    active: int
    flops: float


def token_cost(network: Network, source: int, target: int) -> TokenCost:
    """Computes the cost of a token in a network, attention over rows of these lengths included.

    Args:
        network: without adapters.
        source: S, tokens of the inputs.
        target: T, tokens of the targets.
    """
    sparse = network.config.sparse
    sizes, products, share = {}, 0.0, share_in_use(sparse)
    for path, leaf in trees.flatten(network.abstract_params()).items():
        sizes[path] = math.prod(leaf.shape)
        used = sizes[path] * (share if has_expert_axis(path) else 1.0)
        products += used * _tokens_of(path, len(leaf.shape), source, target, network)
    flops = 2 * (products + _attention(network, source, target))
    return TokenCost(sum(sizes.values()), active_parameters(sparse, sizes), flops / (source + target))


def share_in_use(sparse: SparseConfig | None) -> float:
    """Share of a layer's experts that a token has: K of E, or, where experts choose, the mean; 1 if dense."""
    if sparse is None:
        return 1.0
    chosen = sparse.experts_per_token if sparse.choice == TOKENS else sparse.capacity_factor
    return min(1.0, chosen / sparse.num_experts)


def active_parameters(sparse: SparseConfig | None, sizes: Mapping[str, int]) -> int:
    """Number of parameters that a token uses: all but the experts that it does not have.

    Args:
        sparse: settings of the network's sparse layers; None for a dense one.
        sizes: number of values of each leaf, by its path.
    """
    experts = sum(size for path, size in sizes.items() if has_expert_axis(path))
    return sum(sizes.values()) - round(experts * (1 - share_in_use(sparse)))


def _tokens_of(path: str, dimensions: int, source: int, target: int, network: Network) -> int:
    """Number of a row's tokens that a leaf is multiplied with; 0 for what is looked up or added."""
    account = network.account(source, target)
    if path == account.table:
        return account.predicted if account.head is None else 0
    if dimensions < 2 or path.endswith(LOOKED_UP) or not path.endswith("kernel"):
        return 0
    if path == account.head:
        return account.predicted
    if "encoder_decoder_attention/key" in path or "encoder_decoder_attention/value" in path:
        return source
    if path.startswith("encoder/"):
        return source
    return target if account.attention_inputs else source + target


def _attention(network: Network, source: int, target: int) -> float:
    """Multiply-adds of queries with keys and of weights with values, of one row; half where it is causal."""
    account, config = network.account(source, target), network.config
    if not account.attention_inputs:  # one stack, causal
        return config.num_layers * (source + target) ** 2 * account.heads
    inside = config.num_encoder_layers * 2 * source * source
    causal = config.num_decoder_layers * target * target
    across = config.num_decoder_layers * 2 * target * source
    return account.heads * (inside + causal + across)
