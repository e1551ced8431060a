"""Settings of a PEFT (IA)^3 adapter. Source of the rules: PEFT 0.21, `IA3Config`, `IA3Model`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from elm_jax.formats.peft import expressions, lora_settings
from elm_jax.formats.peft.lora_settings import LoraSettings

IA3 = "IA3"
_IGNORED = {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
            "peft_version", "peft_type", "fan_in_fan_out", "init_ia3_weights"}


@dataclasses.dataclass(frozen=True)
class Ia3Settings(LoraSettings):
    """What an adapter_config.json says about an (IA)^3 adapter; its modules are named as LoRA's are.

    Attributes:
        feedforward_modules: ends of names, or a regular expression, of modules whose input is scaled.
    """

    feedforward_modules: tuple[str, ...] | str = ()

    def is_feedforward(self, module: str) -> bool:
        """Whether the input of a module is scaled, in place of its output."""
        wanted = self.feedforward_modules
        if isinstance(wanted, str):
            return expressions.fits(wanted, module)
        return any(module.endswith(name) for name in wanted)


def parse(values: Mapping[str, Any], where: Any) -> Ia3Settings:
    """Parses an adapter_config.json of (IA)^3.

    Raises:
        InputError: settings that are not known, or values of a wrong type; all are named.
    """
    checks = {**lora_settings.MODULE_CHECKS,
              "feedforward_modules": lora_settings.MODULE_CHECKS["target_modules"]}
    faults = lora_settings.unknown_settings(values, {*_IGNORED, *checks})
    lora_settings.raise_unsupported(faults, where, "plain (IA)^3")
    return Ia3Settings(**lora_settings.checked(values, where, checks))
