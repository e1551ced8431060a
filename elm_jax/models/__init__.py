"""Networks, their adapters, and cached decoding. Each name is imported on first use."""

from typing import TYPE_CHECKING

from elm_jax.runtime import lazy

if TYPE_CHECKING:  # for type checkers and editors; at run time `_MODULES` says the same
    from elm_jax.models.adapters.config import AdapterConfig
    from elm_jax.models.decode import greedy
    from elm_jax.models.families import FAMILIES
    from elm_jax.models.t5.network import shift_right

    T5Config, T5Network = FAMILIES["t5"]

_MODULES = {
    "AdapterConfig": "elm_jax.models.adapters.config",
    "T5Config": "elm_jax.models.t5.config",
    "T5Network": "elm_jax.models.t5.network",
    "greedy": "elm_jax.models.decode",
    "shift_right": "elm_jax.models.t5.network",
}
"""Where each public name is defined."""
__getattr__, __dir__ = lazy.exports(__name__, _MODULES)

__all__ = ["AdapterConfig", "T5Config", "T5Network", "greedy", "shift_right"]
