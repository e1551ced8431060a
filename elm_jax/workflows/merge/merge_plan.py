"""Plans of merges of folders: the inputs, the settings, and how every leaf is merged."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from elm_jax.errors import InputError, describe
from elm_jax.experts.card import ExpertCard
from elm_jax.formats.hf.config_json import DEFAULT_SHARD_BYTES
from elm_jax.formats.model import FLOAT_DTYPES, Model
from elm_jax.merging.methods.method_table import notes_on_signs, settings_of
from elm_jax.merging.recipes.mergekit_yaml import MergeConfig
from elm_jax.merging.recipes.recipe import MergeRecipe
from elm_jax.merging.stream import CopiedLeaf, LeafMerge, LeafSource
from elm_jax.runtime.config_checks import check_choice, check_positive, items_of
from elm_jax.workflows.choices import ALLOWED, WRITTEN_KINDS
from elm_jax.workflows.merge import merge_inputs, output_files
from elm_jax.workflows.merge.merge_inputs import Checkpoint

_PROCESS_BYTES = 3.2e8
"""Bytes of a process that has compiled and merged a small checkpoint; measured."""


@dataclasses.dataclass(frozen=True)
class MergeOptions:
    """Options of a merge's execution: they decide files and threads, not values.

    Attributes:
        allow: keys of `choices.ALLOWED`.
        max_shard_bytes: most bytes of a file of weights.
        workers: threads; None for one a core, at most 8.
        quiet: no progress bar.
        target: form of a whole model's folder, one of `choices.WRITTEN_KINDS`; None for the first model's.
        expert_id: name of a merged expert; None makes one of its parents' names.
        rank: of merged LoRA updates; None for the sum of the ranks, which is exact for weighted sums.
    """

    allow: tuple[str, ...] = ()
    max_shard_bytes: float = DEFAULT_SHARD_BYTES
    workers: int | None = None
    quiet: bool = False
    target: str | None = None
    expert_id: str | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "allow", items_of(self.allow))
        for name in self.allow:
            check_choice("difference to allow", name, ALLOWED)
        check_positive(max_shard_bytes=self.max_shard_bytes)
        check_positive(**{name: getattr(self, name) for name in ("workers", "rank")
                          if getattr(self, name) is not None})
        if self.target is not None:
            check_choice("form of the result", self.target, WRITTEN_KINDS)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A merge of folders that is ready to run.

    Attributes:
        config: of the merge.
        leaves: `LeafMerge` and what is used as one, in the order in which they are written.
        digests: of each parent and of the base, by their folders' names.
        donor: of checkpoints of safetensors, the one whose config.json and tokenizer the result gets.
        ties_heads: False if the result has a head of its own, and the donor's config says otherwise.
        card: of a merged expert.
        model: of whole models, the one whose config, vocabulary and facts the result gets.
        notes: what the inputs bring with them that a reader should know, one sentence each.
    """

    config: MergeConfig
    leaves: list[Any]
    digests: dict[str, str]
    donor: Checkpoint | None = None
    ties_heads: bool = True
    card: ExpertCard | None = None
    model: Model | None = None
    notes: tuple[str, ...] = ()

    @property
    def all_notes(self) -> tuple[str, ...]:
        """What a user should know of the config, of the inputs and of the weights, one sentence each."""
        return (*self.config.notes, *self.notes, *notes_on_signs(settings_of(self.leaves)))

    def summary(self, workers: int | None) -> dict[str, Any]:
        """What the merge reads, writes and needs, for a dry run."""
        kept, each = zip(*(leaf.memory for leaf in self.leaves), strict=True)
        count = workers or output_files.default_workers()
        return {
            "method": self.config.method, "models": list(self.config.models), "base": self.config.base,
            "num_leaves": len(self.leaves), "num_parameters": sum(leaf.size for leaf in self.leaves),
            "bytes_to_read": sum(leaf.bytes_read for leaf in self.leaves),
            "bytes_to_write": sum(leaf.size * leaf.dtype.itemsize for leaf in self.leaves),
            "workers": count,
            # The buffer of a leaf that was kept whole stays allocated while others are merged.
            "memory_bytes": int(_PROCESS_BYTES + max(kept, default=0) + count * max(each, default=0)),
            "notes": list(self.all_notes),
            "leaves": [{"leaf": leaf.path, "shape": list(leaf.shape), "dtype": leaf.dtype.name,
                        "bytes": leaf.size * leaf.dtype.itemsize} for leaf in self.leaves],
        }


def leaf_merges(recipe: MergeRecipe, experts: Sequence[LeafSource], base: LeafSource | None,
                names: Sequence[str], marks: Sequence[str], dtype: str | None
                ) -> list[LeafMerge | CopiedLeaf]:
    """Makes the merge of each leaf, in the first expert's order.

    Args:
        recipe: weights and parameters of every leaf.
        experts: with the same leaves.
        base: None for none.
        names: of the experts.
        marks: their digests.
        dtype: of the result; None for the first expert's.

    Raises:
        InputError: a filter that no leaf matches, or a setting that a leaf's method does not take.
    """
    paths = list(experts[0].specs)
    recipe.check_filters(paths)
    if not any(spec.dtype in FLOAT_DTYPES for spec in experts[0].specs.values()):
        raise InputError(describe("There is nothing to merge", where=names[0],
                                  got=f"{len(paths)} tensors, none of them of floating point"))
    recipes = recipe.plan(paths)
    all_sources, all_names = ((experts, names) if base is None
                              else ([*experts, base], [*names, "the base"]))
    return [LeafMerge(path, recipes[path], experts, base, names, dtype, marks)
            if experts[0].specs[path].dtype in FLOAT_DTYPES
            else CopiedLeaf(path, all_sources, all_names) for path in paths]


def cast(source: LeafSource, dtype: str | None, where: str) -> LeafSource:
    """Rounds the values of a folder's source to a dtype, unless it is None."""
    return source if dtype is None else merge_inputs.CastSource(source, dtype, where)
