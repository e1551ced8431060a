"""Path under which gin files of older versions import `elm_jax.workflows.convert.for_t5x`."""

from elm_jax.workflows.convert.for_t5x import *  # noqa: F403
