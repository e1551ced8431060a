"""Networks: T5 with adapters, and its cached decoding."""

from elm_jax.models.decode import greedy
from elm_jax.models.t5 import T5Network, shift_right
from elm_jax.models.t5_config import AdapterConfig, T5Config

__all__ = ["AdapterConfig", "T5Config", "T5Network", "greedy", "shift_right"]
