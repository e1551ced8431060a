"""Tells which transformers wrote a config.json; imports no network."""

from collections.abc import Mapping
from typing import Any


def by_transformers_5(values: Mapping[str, Any]) -> bool:
    """Whether transformers 5 or newer wrote a T5's config: it says that the head is tied, whatever it is."""
    major = str(values.get("transformers_version", "")).partition(".")[0]
    return "scale_decoder_outputs" in values or (major.isdecimal() and int(major) >= 5)
