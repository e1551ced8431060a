"""Checks a PEFT adapter's tensors against its config and its base; tells which of the two they do not fit."""

from collections.abc import Mapping, Sequence
from typing import Any

from elm_jax.errors import InputError, describe
from elm_jax.formats import tree_checks
from elm_jax.formats.peft import adapter_files
from elm_jax.formats.peft.base_modules import Modules

FACTOR_A, FACTOR_B, VECTOR = ".lora_A.weight", ".lora_B.weight", ".ia3_l"
"""Ends of the names of an adapter's tensors, behind the name of a module."""
Shapes = Mapping[str, Sequence[int]]


def check_tensors(found: Shapes, wanted: Shapes, modules: Modules, where: Any) -> None:
    """Raises InputError unless an adapter has the tensors that its config describes, of the base's sizes.

    Args:
        found: shapes of the tensors in the file, by their names below the base.
        wanted: those that config and base call for.
        modules: of the base.
        where: the adapter's folder.

    Raises:
        InputError: names what is missing, unexpected or of another shape. Where all tensors fit the base it
            says that config and tensors disagree, else that the adapter does not fit the base.
    """
    if _are_of_base(found, modules) and _is_configs_fault(found, wanted):
        tree_checks.check_leaves(
            "The adapter's config and its tensors disagree", f"{where}: {adapter_files.CONFIG_FILE} (r, "
            "rank_pattern, target_modules, layers_to_transform, modules_to_save, bias)", found, wanted,
            f"take {adapter_files.CONFIG_FILE} and {adapter_files.WEIGHTS_FILE} of one adapter, as it was "
            "saved; what the tensors are of is in this base")
    place = f"{where}: {adapter_files.CONFIG_FILE}, {adapter_files.WEIGHTS_FILE}"
    tree_checks.check_leaves("The adapter does not fit the base", place, found, wanted,
                             "give the base that it was trained on")


def none_of_config(found: Shapes, modules: Modules, where: Any, targets: str) -> InputError | None:
    """The error for a config that names no module of the base, if the tensors are of the base; else None."""
    if not found or not _are_of_base(found, modules):
        return None
    has = sorted({module_of(name).rpartition(".")[2] for name in found})
    return InputError(describe(
        "The adapter's config and its tensors disagree",
        where=f"{where}: target_modules, layers_to_transform", got=f"target_modules {targets}",
        expected=f"the modules of the tensors: {', '.join(has)}",
        cure=f"take {adapter_files.CONFIG_FILE} and {adapter_files.WEIGHTS_FILE} of one adapter"))


def module_of(name: str) -> str:
    """Name of the module that a tensor belongs to."""
    end = next((end for end in (FACTOR_A, FACTOR_B, VECTOR) if name.endswith(end)), None)
    return name.rpartition(".")[0] if end is None else name.removesuffix(end)


def _are_of_base(found: Shapes, modules: Modules) -> bool:
    """Whether each tensor is of a module of the base, and of its size but for a rank."""
    return all(_is_of_base(name, tuple(shape), modules) for name, shape in found.items())


def _is_of_base(name: str, shape: tuple[int, ...], modules: Modules) -> bool:
    if name in modules.parameters:
        return shape == tuple(modules.shape(name))
    module = module_of(name)
    if module not in modules.projections:
        return False
    parts = modules.parts(module)
    inner, outer = parts[0][1][0], sum(size[1] for _, size in parts)
    sizes = {FACTOR_A: (shape[-1:], inner), FACTOR_B: (shape[:1], outer)}
    for end, (size, expected) in sizes.items():
        if name.endswith(end):
            return len(shape) == 2 and size == (expected,)
    return name.endswith(VECTOR) and shape in ((1, inner), (outer, 1))


def _is_configs_fault(found: Shapes, wanted: Shapes) -> bool:
    """Whether tensors that all fit the base differ from what the config says.

    Whole layers without a tensor are no such fault: then the base may have more layers than the adapter's.
    """
    kinds = {_kind(name) for name in found}
    return (any(name not in wanted for name in found)
            or any(tuple(found[name]) != tuple(wanted[name]) for name in wanted if name in found)
            or any(_kind(name) not in kinds or _other(name) in found for name in wanted if name not in found))


def _kind(name: str) -> str:
    """What a tensor is of in every layer: ``q_proj.lora_A.weight``."""
    module = module_of(name)
    return module.rpartition(".")[2] + name.removeprefix(module)


def _other(name: str) -> str:
    """Name of the other factor of an update."""
    if name.endswith(FACTOR_A):
        return module_of(name) + FACTOR_B
    return module_of(name) + FACTOR_A
