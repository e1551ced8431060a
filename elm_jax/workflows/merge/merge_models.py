"""Merges experts, and whole models, by this program's own leaf names."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.experts import peft_adapters
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.overlay import read_card, save_leaves_as_expert
from elm_jax.experts.weight_sources import needed_base, reference
from elm_jax.formats import detect
from elm_jax.formats.elm import elm_folders
from elm_jax.formats.hf import hf_models
from elm_jax.formats.model import Model, Origin, Tensors
from elm_jax.formats.peft import adapter_files
from elm_jax.formats.t5x import t5x_writer
from elm_jax.formats.tensors import safetensors_files, streaming
from elm_jax.merging.methods import alike
from elm_jax.merging.methods.method_table import settings_of
from elm_jax.merging.recipes.mergekit_yaml import MergeConfig
from elm_jax.runtime import staging, storage, trees
from elm_jax.workflows.merge import absent_layers, merge_overlays, output_files
from elm_jax.workflows.merge.merge_inputs import CARD_FILE, TensorsSource, unlike_vocabularies
from elm_jax.workflows.merge.merge_plan import MergeOptions, Plan, cast, leaf_merges


def plan_experts(config: MergeConfig, options: MergeOptions) -> Plan:
    """Opens and compares experts' folders, checks fingerprints, and plans how each leaf is merged.

    Raises:
        InputError: folders that are no experts, were changed, or do not fit together or to their base.
    """
    for dtype in (config.dtype, config.out_dtype):
        if dtype not in (None, "float32"):
            raise InputError(describe("An expert's leaves are float32", got=dtype,
                                      cure="leave the dtype out; `elm convert --dtype` casts what it writes"))
    _check_allowed(options, ())
    opened = functools.cache(_base_of_adapters)
    cards, written, tensors, folders = zip(*(
        _adapter(name, config.base, opened) if adapter_files.is_peft(storage.as_path(name))
        else _stored_expert(name) for name in config.models), strict=True)
    merge_overlays.check_alike(cards, [own.specs for own in tensors], config.base is not None)
    _check_fingerprints(folders, tensors, written)
    base = None if config.base is None else _open_base(config.base, cards[0])
    leaves, network = merge_overlays.plan_overlay(
        cards, [TensorsSource(own) for own in tensors], base and TensorsSource(base.tensors), written,
        config.recipe, options.rank)
    card = merge_overlays.make_card(cards, written, network, settings_of(leaves), options.expert_id)
    digests = dict(zip(config.models, written, strict=True))
    digests |= {config.base: cards[0].base["fingerprint"]} if config.base else {}
    return Plan(config, leaves, digests, card=card,
                notes=absent_layers.notes_of(cards, [own.specs for own in tensors]))


def _stored_expert(name: str) -> tuple[ExpertCard, str | None, Tensors, epath.Path]:
    folder, card, written = read_card(name)
    return card, written, elm_folders.ElmTensors(folder / elm_folders.WEIGHTS), folder


def _adapter(name: str, base: str | None, opened: Callable[..., tuple[Model, dict[str, str]]]
             ) -> tuple[ExpertCard, str | None, Tensors, epath.Path]:
    """A PEFT adapter as an expert; `opened` keeps the bases that were opened."""
    folder = storage.as_path(name)
    under, about = opened(base, adapter_files.recorded_base(folder))
    expert, _ = peft_adapters.read_peft(folder, under.config, about, peft_adapters.names_of(under))
    return expert.card, trees.fingerprint(expert.overlay), streaming.ArrayTensors(expert.overlay), folder


def _base_of_adapters(base: str | None, recorded: str | None) -> tuple[Model, dict[str, str]]:
    under = needed_base(recorded or "a PEFT adapter", base, recorded)
    return under, reference(under)


def _check_fingerprints(folders: Sequence[epath.Path], tensors: Sequence[Tensors],
                        written: Sequence[str | None]) -> None:
    with ThreadPoolExecutor(output_files.default_workers()) as pool:
        found = list(pool.map(streaming.fingerprint, tensors))
    for folder, ours, theirs in zip(folders, found, written, strict=True):
        if ours != theirs:
            raise InputError(describe("The expert's weights are not those that were written", where=folder,
                                      got=ours, expected=theirs, cure="copy or train the expert again"))


def _open_base(name: str, card: ExpertCard) -> Model:
    """Opens a base of any kind; its contents are checked before they are used."""
    model = detect.open_model(name)
    found = _model_digest(model)
    if found != card.base["fingerprint"]:
        raise InputError(describe("The experts belong to another base", where=name, got=found,
                                  expected=f"{card.base.get('name')} {card.base['fingerprint']}",
                                  cure="give the base that they were trained on"))
    model.check()
    return model


def plan_models(config: MergeConfig, options: MergeOptions) -> Plan:
    """Opens and compares whole models of any supported kind, by this program's leaf names.

    Raises:
        InputError: models of unlike networks, vocabularies, leaves or dtypes.
    """
    _check_allowed(options, ("vocabularies", "dtypes"))
    folders = [*config.models, *([config.base] if config.base else [])]
    models = [detect.open_model(name) for name in folders]
    first = models[0]
    for other in models[1:]:
        a, b = ({name: value for name, value in model.config.to_dict().items()
                 if name not in merge_overlays.NO_WEIGHTS} for model in (first, other))
        if a != b:
            raise InputError(describe(
                "Models of unlike networks cannot be merged", where=f"{first.where} and {other.where}",
                got="; ".join(f"{key}: {a[key]} and {b.get(key)}" for key in a if a[key] != b.get(key)),
                expected="equal networks"))
        if "vocabularies" not in options.allow and first.vocabulary != other.vocabulary:
            raise unlike_vocabularies(f"{first.where} and {other.where}")
    alike.check_alike([model.tensors.specs for model in models], folders,
                      dtypes="dtypes" not in options.allow)
    with ThreadPoolExecutor(output_files.default_workers()) as pool:
        list(pool.map(lambda model: model.check(), models))
    sources = [cast(TensorsSource(model.tensors), config.dtype, model.where) for model in models]
    digests = {name: _model_digest(model) for name, model in zip(folders, models, strict=True)}
    leaves = leaf_merges(config.recipe, sources[:len(config.models)], sources[-1] if config.base else None,
                         config.models, [digests[name] for name in config.models],
                         config.out_dtype or config.dtype)
    return Plan(config, leaves, digests, model=models[folders.index(config.donor)])


def _model_digest(model: Model) -> str:
    """The fingerprint that a model's folder records, else the one computed from its leaves."""
    known = model.facts.get(elm_folders.FACTS, {}).get("fingerprint")
    return known or streaming.fingerprint(model.tensors)


def _check_allowed(options: MergeOptions, known: Sequence[str]) -> None:
    idle = [name for name in options.allow if name not in known]
    if idle:
        raise InputError(describe("This cannot be allowed here",
                                  got=", ".join(f"--allow {name}" for name in idle),
                                  expected=" or ".join(known) or "no --allow: experts must be alike"))


def _merged_tensors(folder: epath.Path) -> streaming.StoredTensors:
    """The merged tensors in a workspace, by this program's leaf names."""
    stored = dict(sorted(safetensors_files.open_tensors(folder).items()))
    return streaming.StoredTensors(stored, {path: Origin(path) for path in stored})


def is_result(plan: Plan, output: epath.Path, facts: Mapping[str, Any], options: MergeOptions) -> bool:
    """Whether a folder holds what this very merge writes; its time and measured figures do not count."""
    try:
        if plan.card is not None:
            card = read_card(output)[1]
            wanted = dataclasses.replace(plan.card, metrics=card.metrics, created=card.created)
            return card.to_dict() == json.loads(json.dumps(wanted.to_dict()))
        found = storage.read_json(output / CARD_FILE, kind="card of a merge", schema_version=None)
        kind = detect.open_model(output).kind
    except InputError:
        return False
    told = json.loads(json.dumps(facts))
    return kind == (options.target or plan.model.kind) and {**found, "created": told["created"]} == told


def write_model(plan: Plan, output: storage.PathLike, work: epath.Path, facts: Mapping[str, Any],
                options: MergeOptions) -> None:
    """Writes an expert, or a model of the requested kind, from the merged tensors in a workspace.

    The workspace is emptied when all of it was read, before the output gets its name: a kill leaves one of
    them.
    """
    tensors = _merged_tensors(work)

    def check() -> None:
        output_files.empty_workspace(work)

    if plan.card is not None:
        error = merge_overlays.factorisation_error(plan.leaves)
        metrics = {} if error is None else {"factorisation_error": error}
        with staging.staged(output) as folder:
            save_leaves_as_expert(folder, dataclasses.replace(plan.card, metrics=metrics), tensors, check)
        return
    model = dataclasses.replace(plan.model, tensors=tensors, check=check, facts={
        **plan.model.facts, elm_folders.FACTS: {"training": {"merged": dict(facts)}}},
        beside={CARD_FILE: facts})
    target = options.target or plan.model.kind
    if target == "elm":
        elm_folders.write_elm(output, model)
    elif target == "t5x":
        t5x_writer.write_t5x(output, model)
    else:
        hf_models.write_model_folder(output, model, max_shard_bytes=options.max_shard_bytes)
