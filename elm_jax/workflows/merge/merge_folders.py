"""Merges folders: safetensors checkpoints of any network; models and experts with `merge_models`."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.formats import places
from elm_jax.formats.hf.config_json import CONFIG_FILE, main_dtype
from elm_jax.formats.peft import adapter_files
from elm_jax.merging.methods.method_table import settings_of, shares_of
from elm_jax.merging.recipes.mergekit_yaml import MergeConfig
from elm_jax.runtime import records, staging, storage
from elm_jax.runtime.storage import utc_now
from elm_jax.workflows.merge import merge_inputs, output_files
from elm_jax.workflows.merge.merge_inputs import CARD_FILE, StoredSource
from elm_jax.workflows.merge.merge_plan import MergeOptions, Plan, cast, leaf_merges

SCHEMA_VERSION = 1
CONFIG_COPY = "merge.yaml"
_DEFAULTS = MergeOptions()


def _models() -> ModuleType:
    """Imports `merge_models`, which needs networks, only for models and experts."""
    from elm_jax.workflows.merge import merge_models

    return merge_models


def plan_checkpoints(config: MergeConfig, options: MergeOptions) -> Plan:
    """Opens and compares safetensors checkpoints, and plans how every tensor is merged.

    Raises:
        InputError: see `merge_inputs`.
    """
    folders = [*config.models, *([config.base] if config.base else [])]
    opened = [merge_inputs.open_checkpoint(name) for name in folders]
    alike = merge_inputs.check_checkpoints(opened, options.allow, config.base is not None)
    sources = [cast(StoredSource(model.stored), config.dtype, str(model.where)) for model in alike]
    experts = sources[:len(config.models)]
    base = sources[-1] if config.base else None
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(merge_inputs.sampled_digest, [model.where for model in opened]))
    digests = dict(zip(folders, found, strict=True))
    leaves = leaf_merges(config.recipe, experts, base, config.models, found[:len(experts)],
                         config.out_dtype or config.dtype)
    donor = merge_inputs.open_checkpoint(config.donor)
    ties = not (donor.says_tied and alike[0].head is not None)
    return Plan(config, leaves, digests, donor, ties)


def plan_merge(config: MergeConfig, options: MergeOptions) -> Plan:
    """Plans a merge of folders: experts, safetensors checkpoints, or models.

    Raises:
        InputError: folders of unlike kinds that do not go together; see the three kinds.
    """
    experts = [_is_expert(name) for name in config.models]
    if any(experts):
        if not all(experts):
            raise InputError(describe("Experts and whole models cannot be merged", got=", ".join(
                f"{name} ({'expert' if own else 'model'})"
                for name, own in zip(config.models, experts, strict=True))))
        _check_target(options, ("elm",), "merged experts")
        return _models().plan_experts(config, options)
    folders = [*config.models, *([config.base] if config.base else [])]
    if options.target in (None, "hf") and all(merge_inputs.is_checkpoint(name) for name in folders):
        return plan_checkpoints(config, options)
    return _models().plan_models(config, options)


def _is_expert(name: str) -> bool:
    if places.is_on_hub(name):
        return False
    folder = storage.as_path(name)
    return any((folder / place / places.EXPERT_FILE).exists() for place in ("", "expert")) or is_adapter(name)


def is_adapter(name: str) -> bool:
    """Whether a folder holds a PEFT adapter, without a model beside it."""
    if places.is_on_hub(name):
        return False
    folder = storage.as_path(name)
    return adapter_files.is_peft(folder) and not (folder / CONFIG_FILE).exists()


def _check_target(options: MergeOptions, known: Sequence[str], what: str) -> None:
    if options.target not in (None, *known):
        raise InputError(describe(f"This is no form of {what}", got=f"--to {options.target}", expected=known,
                                  cure="`elm convert` writes other forms"))


def merge_folders(config: MergeConfig, output: storage.PathLike,
                  options: MergeOptions = _DEFAULTS) -> dict[str, Any]:
    """Merges folders into a new folder, which gets its name when it is whole.

    Args:
        config: what is merged, and how.
        output: folder that does not exist, or is empty. A killed run of the same merge is resumed.
        options: of the execution.

    Returns:
        What was merged, by which settings, and the ``seconds`` that it took.

    Raises:
        InputError: what cannot be merged; values that are not finite.
        RunError: the disk is full.
    """
    start = time.monotonic()
    whole = (storage.as_path(output) / output_files.JOURNAL).exists()  # killed when only its journal was left
    work = storage.as_path(f"{str(output).rstrip('/')}.merging")
    emptied = not whole and _num_entries(output) > 0 == _num_entries(work)  # or when this folder was left
    if not whole and not emptied:
        staging.check_free(output)
    plan = plan_merge(config, options)
    facts = make_facts(plan)
    if whole:
        facts = _finished_before(storage.as_path(output), identity(plan, options))
    elif emptied:
        if plan.donor is not None or not _models().is_result(plan, storage.as_path(output), facts, options):
            staging.check_free(output)
        work.rmdir()
    elif plan.donor is not None:
        with staging.resumable(output, output_files.JOURNAL) as folder:
            _write_leaves(folder, plan, options)
            _write_rest(folder, plan, facts)
        output_files.end_journal(storage.as_path(output))
    else:
        with staging.workspace(work, output_files.JOURNAL) as folder:
            _write_leaves(folder, plan, options)
            _models().write_model(plan, output, folder, facts, options)
    return {**facts, "output": str(output), "seconds": round(time.monotonic() - start, 3)}


def _num_entries(folder: storage.PathLike) -> int:
    """Number of entries in a folder; -1 if there is no folder."""
    folder = storage.as_path(folder)
    return len(list(folder.iterdir())) if folder.is_dir() else -1


@dataclasses.dataclass(frozen=True)
class ParentFacts:
    """A parent in the card of a merge; its weight is null if it differs by leaf."""

    path: str
    weight: float | None


@dataclasses.dataclass(frozen=True)
class StoredFacts:
    """Fields of ``merge.json`` that are read again."""

    method: str
    parents: list[ParentFacts]
    num_leaves: int
    num_parameters: int
    notes: list[str] = dataclasses.field(default_factory=list)


def _finished_before(output: epath.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of an output that a killed run had finished; removes that run's journal. None if there is none.

    Raises:
        InputError: it is of another merge.
    """
    if not output_files.has_journal_of(output, wanted):
        staging.check_free(output)
    facts = records.read_record(output / CARD_FILE, StoredFacts, kind="card of a merge",
                                schema_version=SCHEMA_VERSION)
    output_files.end_journal(output)
    return facts


def _write_leaves(folder: epath.Path, plan: Plan, options: MergeOptions) -> None:
    output_files.write_merged(folder, plan.leaves, identity(plan, options), options.max_shard_bytes,
                              workers=options.workers, quiet=options.quiet)


def identity(plan: Plan, options: MergeOptions) -> dict[str, Any]:
    """Identity of a merge: a run resumes only an interrupted run of equal identity."""
    config = plan.config
    folders = [*config.models, *([config.base] if config.base else [])]
    givers = [config.donor, config.tokenizer]
    return {"schema_version": SCHEMA_VERSION, "with_base": config.base is not None,
            "parents": [[name, plan.digests[name]] for name in folders],  # a list: their order counts
            "files": [merge_inputs.changed_at(places.locate(name))
                      for name in dict.fromkeys((*folders, *givers))],
            "donor_and_tokenizer": givers, "settings": settings_of(plan.leaves),
            "leaves": [[leaf.path, list(leaf.shape), leaf.dtype.name] for leaf in plan.leaves],
            "cast": config.dtype, "allow": sorted(options.allow), "rank": options.rank,
            "max_shard_bytes": options.max_shard_bytes}


def make_facts(plan: Plan) -> dict[str, Any]:
    """Facts of a merge for its card: parents, method, weights and digests."""
    config, settings = plan.config, settings_of(plan.leaves)
    shares = shares_of(settings)
    return {
        "schema_version": SCHEMA_VERSION, "method": config.method,
        "parents": [{**({"id": plan.card.parents[number]["id"]} if plan.card else {}), "path": name,
                     "digest": plan.digests[name], "weight": share}
                    for number, (name, share) in enumerate(zip(config.models, shares, strict=True))],
        "base": {"path": config.base, "digest": plan.digests[config.base]} if config.base else None,
        "settings": settings, "num_leaves": len(plan.leaves),
        "num_parameters": sum(leaf.size for leaf in plan.leaves), "created": utc_now(),
        **({"notes": list(plan.all_notes)} if plan.all_notes else {}),
    }


def _write_rest(folder: epath.Path, plan: Plan, facts: Mapping[str, Any]) -> None:
    """Writes the files beside the weights: the donor's config and tokenizer, the card, the merge's config."""
    storage.write_json(folder / CARD_FILE, facts)
    copied = {path.name: path for name in (plan.config.donor, plan.config.tokenizer)  # whose files come first
              for path in merge_inputs.copied_files(places.locate(name))}
    for name, path in copied.items():
        storage.write_bytes(folder / name, path.read_bytes())
    if plan.config.source_text:
        storage.write_text(folder / CONFIG_COPY, plan.config.source_text)
    if plan.donor.config:
        storage.write_json(folder / CONFIG_FILE, _config_json(plan))


def _config_json(plan: Plan) -> Mapping[str, Any]:
    """The donor's config, with the result's dtype and head."""
    values = dict(plan.donor.config)
    dtype = main_dtype({leaf.path: leaf for leaf in plan.leaves})
    for name in [name for name in ("torch_dtype", "dtype") if name in values] or ["torch_dtype"]:
        values[name] = np.dtype(dtype).name
    if not plan.ties_heads:
        values["tie_word_embeddings"] = False
    return values
