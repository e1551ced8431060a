"""SmolLM2's real file and transformers' model of it; tests that need them are skipped where it is missing."""

import os
from typing import Any

import pytest

from elm_jax.workflows.get_base import PACKAGED

FILE = PACKAGED["smollm2"].find()
needs_file = pytest.mark.skipif(FILE is None, reason=f"needs {PACKAGED['smollm2'].install}")


def their_model() -> Any:
    """The file as transformers reads it, in float32."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        os.path.dirname(FILE), gguf_file=os.path.basename(FILE), dtype=torch.float32).eval()
