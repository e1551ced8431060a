"""Keeps the import path `elm_jax.models.t5_config`, which older exported T5X folders name."""

from elm_jax.models.adapters.config import AdapterConfig as AdapterConfig
from elm_jax.models.t5.config import T5Config as T5Config
