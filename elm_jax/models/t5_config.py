"""Keeps T5X folders readable that were exported when the configs of a T5 stood here."""

from elm_jax.models.adapters.config import AdapterConfig as AdapterConfig
from elm_jax.models.t5.config import T5Config as T5Config
