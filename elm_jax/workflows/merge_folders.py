"""`elm merge` on folders: checkpoints of any network in safetensors, models of ours and of T5X, experts."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from elm_jax import storage
from elm_jax.errors import InputError, describe
from elm_jax.experts.card import ExpertCard, utc_now
from elm_jax.experts.formats import checks, detect, elm, hf, safetensors_files, streaming, t5x
from elm_jax.experts.formats.model import Model, Origin, Tensors
from elm_jax.experts.overlay import read_card, save_leaves_as_expert
from elm_jax.merging import methods
from elm_jax.merging.recipe import Recipe
from elm_jax.merging.stream import CopiedLeaf, LeafMerge, Source
from elm_jax.workflows import merge_experts, merge_files, merge_inputs
from elm_jax.workflows.checks import check_choice, check_positive
from elm_jax.workflows.merge_config import MergeConfig
from elm_jax.workflows.merge_experts import FactorLeaf, settings_of
from elm_jax.workflows.merge_inputs import CARD_FILE, Checkpoint, StoredSource, TensorsSource

SCHEMA_VERSION = 1
CONFIG_COPY = "merge.yaml"
Leaf = LeafMerge | CopiedLeaf | FactorLeaf
_PROCESS_BYTES = 3.2e8
"""Of a process that has compiled and merged a small checkpoint; measured."""


@dataclasses.dataclass(frozen=True)
class MergeOptions:
    """How a merge is carried out.

    Attributes:
        allow: keys of `merge_inputs.ALLOWED`.
        max_shard_bytes: most bytes of a file of weights.
        workers: threads; None for one a core, at most 8.
        quiet: no progress bar.
        target: form of a whole model's folder, a key of `detect.KINDS`; None for the first model's.
        expert_id: name of a merged expert; None makes one of its parents' names.
        rank: of merged LoRA updates; None for what is exact, or the sum of the ranks.
    """

    allow: tuple[str, ...] = ()
    max_shard_bytes: float = hf.DEFAULT_SHARD_BYTES
    workers: int | None = None
    quiet: bool = False
    target: str | None = None
    expert_id: str | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        for name in self.allow:
            check_choice("difference to allow", name, merge_inputs.ALLOWED)
        check_positive(max_shard_bytes=self.max_shard_bytes)
        check_positive(**{name: getattr(self, name) for name in ("workers", "rank")
                          if getattr(self, name) is not None})
        if self.target is not None:
            check_choice("form of the result", self.target, detect.KINDS)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A merge that is ready to begin.

    Attributes:
        config: what is asked for.
        leaves: in the order in which they are written.
        digests: of each parent and of the base, by their folders' names.
        donor: of checkpoints of safetensors, the one whose config.json and tokenizer the result gets.
        ties_heads: False if the result has a head of its own, and the donor's config says otherwise.
        card: of a merged expert.
        model: of whole models, the one whose config, vocabulary and facts the result gets.
    """

    config: MergeConfig
    leaves: list[Leaf]
    digests: dict[str, str]
    donor: Checkpoint | None = None
    ties_heads: bool = True
    card: ExpertCard | None = None
    model: Model | None = None

    def summary(self, workers: int | None) -> dict[str, Any]:
        """What the merge reads, writes and needs, without doing it."""
        kept, each = zip(*(leaf.memory for leaf in self.leaves), strict=True)
        count = workers or merge_files.default_workers()
        return {
            "method": self.config.method, "models": list(self.config.models), "base": self.config.base,
            "num_leaves": len(self.leaves), "num_parameters": sum(leaf.size for leaf in self.leaves),
            "bytes_to_read": sum(leaf.bytes_read for leaf in self.leaves),
            "bytes_to_write": sum(leaf.size * leaf.dtype.itemsize for leaf in self.leaves),
            "workers": count,
            "memory_bytes": int(_PROCESS_BYTES + max(
                (one + count * other for one, other in zip(kept, each, strict=True)), default=0)),
            "notes": list(self.config.notes),
            "leaves": [{"leaf": leaf.path, "shape": list(leaf.shape), "dtype": leaf.dtype.name,
                        "bytes": leaf.size * leaf.dtype.itemsize} for leaf in self.leaves],
        }


def leaf_merges(recipe: Recipe, experts: Sequence[Source], base: Source | None, names: Sequence[str],
                marks: Sequence[str], dtype: str | None) -> list[Leaf]:
    """How each leaf is merged, in the first expert's order.

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
    unmatched = recipe.unmatched_filters(paths)
    if unmatched:
        raise InputError(describe("A filter matches no leaf", got="; ".join(unmatched),
                                  expected=f"a part of names such as {', '.join(paths[:3])}"))
    if not any(spec.dtype in checks.FLOAT_DTYPES for spec in experts[0].specs.values()):
        raise InputError(describe("There is nothing to merge", where=names[0],
                                  got=f"{len(paths)} tensors, none of them of floating point"))
    recipes = recipe.plan(paths)
    all_sources, all_names = ((experts, names) if base is None
                              else ([*experts, base], [*names, "the base"]))
    return [LeafMerge(path, recipes[path], experts, base, names, dtype, marks)
            if experts[0].specs[path].dtype in checks.FLOAT_DTYPES
            else CopiedLeaf(path, all_sources, all_names) for path in paths]


def plan_checkpoints(config: MergeConfig, options: MergeOptions) -> Plan:
    """Opens and compares checkpoints of safetensors, and plans how every tensor is merged.

    Raises:
        InputError: see `merge_inputs`.
    """
    folders = [*config.models, *([config.base] if config.base else [])]
    opened = [merge_inputs.open_checkpoint(name) for name in folders]
    alike = merge_inputs.check_checkpoints(opened, options.allow, config.base is not None)
    sources = [_cast(StoredSource(model.stored), config.dtype) for model in alike]
    experts = sources[:len(config.models)]
    base = sources[-1] if config.base else None
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(merge_inputs.sampled_digest, [model.where for model in opened]))
    digests = dict(zip(folders, found, strict=True))
    leaves = leaf_merges(config.recipe, experts, base, config.models, found[:len(experts)],
                         config.out_dtype or config.dtype)
    donor = merge_inputs.open_checkpoint(config.donor)
    ties = not (donor.tied and any(name in alike[0].stored for name in merge_inputs.HEADS))
    return Plan(config, leaves, digests, donor, ties)


def _cast(source: Source, dtype: str | None) -> Source:
    return source if dtype is None else merge_inputs.CastSource(source, dtype)


def plan_experts(config: MergeConfig, options: MergeOptions) -> Plan:
    """Opens and compares experts' folders, checks their fingerprints, and plans how each leaf is merged.

    Raises:
        InputError: folders that are no experts, were changed, or do not fit together or to their base.
    """
    for dtype in (config.dtype, config.out_dtype):
        if dtype not in (None, "float32"):
            raise InputError(describe("An expert's leaves are float32", got=dtype,
                                      cure="leave the dtype out; `elm convert --dtype` casts what it writes"))
    _check_allowed(options, ())
    folders, cards, written = zip(*(read_card(name) for name in config.models), strict=True)
    tensors = [elm.ElmTensors(folder / elm.WEIGHTS) for folder in folders]
    merge_experts.check_alike(cards, [own.specs for own in tensors])
    _check_fingerprints(folders, tensors, written)
    base = None if config.base is None else _open_base(config.base, cards[0])
    leaves, network = merge_experts.plan_overlay(
        cards, [TensorsSource(own) for own in tensors], base and TensorsSource(base.tensors), written,
        config.recipe, options.rank)
    card = merge_experts.make_card(cards, written, network, settings_of(leaves), options.expert_id)
    digests = dict(zip(config.models, written, strict=True))
    digests |= {config.base: cards[0].base["fingerprint"]} if config.base else {}
    return Plan(config, leaves, digests, card=card)


def _check_fingerprints(folders: Sequence[epath.Path], tensors: Sequence[Tensors],
                        written: Sequence[str | None]) -> None:
    with ThreadPoolExecutor(merge_files.default_workers()) as pool:
        found = list(pool.map(streaming.fingerprint, tensors))
    for folder, ours, theirs in zip(folders, found, written, strict=True):
        if ours != theirs:
            raise InputError(describe("The expert's weights are not those that were written", where=folder,
                                      got=ours, expected=theirs, cure="copy or train the expert again"))


def _open_base(name: str, card: ExpertCard) -> Model:
    """A base of any kind; its contents are checked before they are used."""
    model = detect.open_model(name)
    found = model.facts.get(elm.FACTS, {}).get("fingerprint") or streaming.fingerprint(model.tensors)
    if found != card.base["fingerprint"]:
        raise InputError(describe("The experts belong to another base", where=name, got=found,
                                  expected=f"{card.base.get('name')} {card.base['fingerprint']}",
                                  cure="give the base that they were trained on"))
    model.check()
    return model


def plan_models(config: MergeConfig, options: MergeOptions) -> Plan:
    """Opens and compares whole models of any kind that this program reads, by its own leaf names.

    Raises:
        InputError: models of unlike networks, vocabularies, leaves or dtypes.
    """
    _check_allowed(options, ("vocabularies", "dtypes"))
    folders = [*config.models, *([config.base] if config.base else [])]
    models = [detect.open_model(name) for name in folders]
    first = models[0]
    for other in models[1:]:
        a, b = ({name: value for name, value in model.config.to_dict().items()
                 if name not in merge_experts.NO_WEIGHTS} for model in (first, other))
        if a != b:
            raise InputError(describe(
                "Models of unlike networks cannot be merged", where=f"{first.where} and {other.where}",
                got="; ".join(f"{key}: {a[key]} and {b.get(key)}" for key in a if a[key] != b.get(key)),
                expected="equal networks"))
        if "vocabularies" not in options.allow and first.vocabulary != other.vocabulary:
            raise InputError(describe(
                "The models have different vocabularies", where=f"{first.where} and {other.where}",
                expected="one vocabulary: row i of the embeddings must be one token in all",
                cure="--allow vocabularies, if only unused parts of these files differ"))
    methods.check_alike([model.tensors.specs for model in models], folders,
                        dtypes="dtypes" not in options.allow)
    with ThreadPoolExecutor(merge_files.default_workers()) as pool:
        list(pool.map(lambda model: model.check(), models))
    sources = [_cast(TensorsSource(model.tensors), config.dtype) for model in models]
    digests = {name: _model_digest(model) for name, model in zip(folders, models, strict=True)}
    leaves = leaf_merges(config.recipe, sources[:len(config.models)], sources[-1] if config.base else None,
                         config.models, [digests[name] for name in config.models],
                         config.out_dtype or config.dtype)
    return Plan(config, leaves, digests, model=models[folders.index(config.donor)])


def _model_digest(model: Model) -> str:
    """The fingerprint that the folder records, or that of its leaves."""
    known = model.facts.get(elm.FACTS, {}).get("fingerprint")
    return known or streaming.fingerprint(model.tensors)


def plan_merge(config: MergeConfig, options: MergeOptions) -> Plan:
    """Plans a merge of whatever lies in the folders: experts, checkpoints of safetensors, or models.

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
        return plan_experts(config, options)
    folders = [*config.models, *([config.base] if config.base else [])]
    if options.target in (None, "hf") and all(merge_inputs.is_checkpoint(name) for name in folders):
        return plan_checkpoints(config, options)
    return plan_models(config, options)


def _check_allowed(options: MergeOptions, known: Sequence[str]) -> None:
    idle = [name for name in options.allow if name not in known]
    if idle:
        raise InputError(describe("This cannot be allowed here",
                                  got=", ".join(f"--allow {name}" for name in idle),
                                  expected=" or ".join(known) or "no --allow: experts must be alike"))


def _is_expert(name: str) -> bool:
    if detect.is_on_hub(name):
        return False
    folder = storage.as_path(name)
    return any((folder / place / "expert.json").exists() for place in ("", "expert"))


def _check_target(options: MergeOptions, known: Sequence[str], what: str) -> None:
    if options.target not in (None, *known):
        raise InputError(describe(f"This is no form of {what}", got=f"--to {options.target}", expected=known,
                                  cure="`elm convert` writes other forms"))


def merge_folders(config: MergeConfig, output: storage.PathLike,
                  options: MergeOptions = MergeOptions()) -> dict[str, Any]:
    """Merges folders into another one, which appears when it is whole.

    Args:
        config: what is merged, and how.
        output: folder that does not exist, or is empty. What a killed run of the same merge left beside it
            is gone on with.
        options: how it is carried out.

    Returns:
        What was merged, by which settings, and the ``seconds`` that it took.

    Raises:
        InputError: what cannot be merged; values that are not finite.
        RunError: the disk is full.
    """
    start = time.monotonic()
    whole = (storage.as_path(output) / merge_files.JOURNAL).exists()  # killed when only its journal was left
    if not whole:
        storage.check_free(output)
    plan = plan_merge(config, options)
    facts = make_facts(plan)
    if whole:
        facts = _finished_before(storage.as_path(output), identity(plan, options))
    elif plan.donor is not None:
        with storage.resumable(output, merge_files.JOURNAL) as folder:
            _write_leaves(folder, plan, options)
            _write_rest(folder, plan, facts)
        merge_files.end_journal(storage.as_path(output))
    else:
        with storage.workspace(f"{str(output).rstrip('/')}.merging", merge_files.JOURNAL) as folder:
            _write_leaves(folder, plan, options)
            _write_model(plan, output, folder, facts, options)
    return {**facts, "output": str(output), "seconds": round(time.monotonic() - start, 3)}


def _finished_before(output: epath.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of an output that got its name in a run that was killed right then; its journal goes.

    Raises:
        InputError: it is of another merge.
    """
    if not merge_files.has_journal_of(output, wanted):
        storage.check_free(output)
    facts = storage.read_json(output / CARD_FILE, kind="card of a merge", schema_version=SCHEMA_VERSION)
    merge_files.end_journal(output)
    return facts


def _write_leaves(folder: epath.Path, plan: Plan, options: MergeOptions) -> None:
    merge_files.write_merged(folder, plan.leaves, identity(plan, options), options.max_shard_bytes,
                             workers=options.workers, quiet=options.quiet)


def _merged_tensors(folder: epath.Path) -> streaming.StoredTensors:
    """What lies in a workspace, by this program's leaf names."""
    stored = dict(sorted(safetensors_files.open_tensors(folder).items()))
    return streaming.StoredTensors(stored, {path: Origin(path) for path in stored})


def _write_model(plan: Plan, output: storage.PathLike, work: epath.Path, facts: Mapping[str, Any],
                 options: MergeOptions) -> None:
    """Writes an expert, or a model in the form that is asked for, from what lies in the workspace.

    That is emptied when all of it was read, before the output gets its name: a kill leaves one of the two.
    """
    tensors = _merged_tensors(work)

    def check() -> None:
        merge_files.empty_workspace(work)

    if plan.card is not None:
        error = merge_experts.factorisation_error(plan.leaves)
        metrics = {} if error is None else {"factorisation_error": error}
        with storage.staged(output) as folder:
            save_leaves_as_expert(folder, dataclasses.replace(plan.card, metrics=metrics), tensors, check)
        return
    model = dataclasses.replace(plan.model, tensors=tensors, check=check, facts={
        **plan.model.facts, elm.FACTS: {"training": {"merged": dict(facts)}}}, beside={CARD_FILE: facts})
    target = options.target or plan.model.kind
    if target == "elm":
        elm.write_elm(output, model)
    elif target == "t5x":
        t5x.write_t5x(output, model)
    else:
        hf.write_hf(output, model, max_shard_bytes=options.max_shard_bytes)


def identity(plan: Plan, options: MergeOptions) -> dict[str, Any]:
    """What makes two merges the same: a run goes on only with what such a one left."""
    config = plan.config
    folders = [*config.models, *([config.base] if config.base else [])]
    return {"schema_version": SCHEMA_VERSION, "with_base": config.base is not None,
            "parents": [[name, plan.digests[name]] for name in folders],  # a list: their order counts
            "files": [merge_inputs.changed_at(detect.locate(name)) for name in folders],
            "settings": settings_of(plan.leaves),
            "leaves": [[leaf.path, list(leaf.shape), leaf.dtype.name] for leaf in plan.leaves],
            "cast": config.dtype, "allow": sorted(options.allow), "rank": options.rank,
            "max_shard_bytes": options.max_shard_bytes}


def make_facts(plan: Plan) -> dict[str, Any]:
    """Parents, method, weights and digests of what is merged, as its card keeps them."""
    config, settings = plan.config, settings_of(plan.leaves)
    shares = merge_experts.shares_of(settings)
    return {
        "schema_version": SCHEMA_VERSION, "method": config.method,
        "parents": [{**({"id": plan.card.parents[number]["id"]} if plan.card else {}), "path": name,
                     "digest": plan.digests[name], "weight": share}
                    for number, (name, share) in enumerate(zip(config.models, shares, strict=True))],
        "base": {"path": config.base, "digest": plan.digests[config.base]} if config.base else None,
        "settings": settings, "num_leaves": len(plan.leaves),
        "num_parameters": sum(leaf.size for leaf in plan.leaves), "created": utc_now(),
    }


def _write_rest(folder: epath.Path, plan: Plan, facts: Mapping[str, Any]) -> None:
    """What stands beside the weights: the donor's config and tokenizer, the card, the config of the merge."""
    storage.write_json(folder / CARD_FILE, facts)
    copied = {path.name: path for name in (plan.config.donor, plan.config.tokenizer)  # whose files come first
              for path in merge_inputs.copied_files(merge_inputs.open_checkpoint(name).where)}
    for name, path in copied.items():
        storage.write_bytes(folder / name, path.read_bytes())
    if plan.config.source_text:
        storage.write_text(folder / CONFIG_COPY, plan.config.source_text)
    if plan.donor.config:
        storage.write_json(folder / hf.CONFIG_FILE, _config_json(plan))


def _config_json(plan: Plan) -> Mapping[str, Any]:
    """The donor's config, with the result's dtype and head."""
    values = dict(plan.donor.config)
    dtype = hf.main_dtype({leaf.path: leaf for leaf in plan.leaves})
    for name in [name for name in ("torch_dtype", "dtype") if name in values] or ["torch_dtype"]:
        values[name] = np.dtype(dtype).name
    if not plan.ties_heads:
        values["tie_word_embeddings"] = False
    return values
