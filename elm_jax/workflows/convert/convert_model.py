"""Converts models and experts from one kind of folder to another, tensor by tensor."""

import contextlib
import dataclasses
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from elm_jax.errors import InputError, RunError, describe
from elm_jax.experts import hf_adapters, peft_export
from elm_jax.experts.overlay import save_leaves_as_expert, write_expert
from elm_jax.experts.weight_sources import Source, open_source
from elm_jax.formats.elm import elm_folders
from elm_jax.formats.hf import folder_files, hf_models
from elm_jax.formats.hf.config_json import DEFAULT_SHARD_BYTES
from elm_jax.formats.model import Index, Origin, Tensors
from elm_jax.formats.peft import adapter_files
from elm_jax.formats.t5x import t5x_writer
from elm_jax.formats.tensors import leaf_values, streaming
from elm_jax.models import families
from elm_jax.models.adapters.bottleneck import BottleneckConfig
from elm_jax.models.adapters.config import adapter_of
from elm_jax.models.t5.config import T5Config
from elm_jax.runtime import staging, storage, trees
from elm_jax.runtime.config_checks import DEFAULT_MODULES, check_choice, check_positive, check_types
from elm_jax.workflows.choices import DTYPES, FOLDER_KINDS, LAYOUTS, WRITTEN_FOLDERS
from elm_jax.workflows.convert import peft_peer, t5x_expert, verify

logger = logging.getLogger(__name__)
REPORT_FILE = "conversion_report.json"
SCHEMA_VERSION = 1
_PROGRESS_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Settings of one conversion.

    Attributes:
        source: folder of a model or of an expert; for ``hf`` also a hub name. source_kind: one of
        `choices.FOLDER_KINDS`. target: folder to write; does not exist, or is empty. target_kind: likewise.
        base: folder of an expert's base; None for the one that it names. dtype: cast to
        this type; None keeps every tensor's own. max_shard_bytes: most bytes of a file of weights, for
        ``hf``. layout: of a T5X checkpoint to write: ``orbax``, or ``zarr``, the older one. scanned: whether
        layers are stacked, as in T5X's scalable T5. It applies to a T5X target: None keeps the
            form of a T5X source and writes any other model unstacked. Otherwise it applies to a T5X source:
            True or False requires that form, None accepts both.
        step: of a T5X checkpoint to write; None takes the source's, or 0.
        experts_per_token: of a T5X source with experts; None takes what its gin config says, or 1.
        vocabulary: its file (`Vocabulary.load`), for a source that carries none.
        verify: whether the logits of source and target are compared afterwards.
        expert_id: name of the expert; None keeps its own.
        kind: of the expert that a T5X run trained, one of `choices.EXPERT_KINDS`; None asks its tasks.
        modules: task registries, for the card of such an expert.
    """

    source: storage.PathLike
    source_kind: str
    target: storage.PathLike
    target_kind: str
    base: storage.PathLike | None = None
    dtype: str | None = None
    max_shard_bytes: float = DEFAULT_SHARD_BYTES
    layout: str = "orbax"
    scanned: bool | None = None
    step: int | None = None
    experts_per_token: int | None = None
    vocabulary: storage.PathLike | None = None
    verify: bool = False
    expert_id: str | None = None
    kind: str | None = None
    modules: tuple[str, ...] = DEFAULT_MODULES

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("kind of source", self.source_kind, FOLDER_KINDS)
        check_choice("kind of target", self.target_kind, WRITTEN_FOLDERS)
        check_choice("layout", self.layout, LAYOUTS)
        check_positive(max_shard_size=self.max_shard_bytes, experts_per_token=self.experts_per_token)
        if self.experts_per_token is not None and self.source_kind != "t5x":
            raise InputError(describe("--experts_per_token is for T5X's checkpoints, which do not say it",
                                      got=f"--from {self.source_kind}", cure="leave it out"))
        if self.dtype is not None:
            check_choice("dtype", self.dtype, DTYPES)


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Converts a model or an expert, writes the report beside it, and verifies it if the config says so.

    Returns:
        The report, as `REPORT_FILE` in the target holds it.

    Raises:
        InputError: a fault of the source, found before the target gets its name; the target is taken.
        RunError: the disk is full; the two models do not compute the same.
    """
    staging.check_free(config.target)
    if config.verify and storage.is_local(config.target):
        staging.check_free(unverified(config.target))
    if config.verify and _with_peft(config):
        peft_peer.require()
    found = open_named(config)
    check_dtype(found, config)
    # An expert's leaves are float32, as `elm train` saves them.
    source = cast(found, "float32" if writes_full_expert(found, config) else config.dtype)
    by_orbax = config.target_kind == "elm" and source.expert is not None
    with staging.staged(config.target, late_writes=by_orbax) as folder:  # until the report is there too
        start = time.monotonic()
        origins = write(watch(source), dataclasses.replace(config, target=folder))
        report = make_report(found, source, config, origins, time.monotonic() - start)
        storage.write_json(folder / REPORT_FILE, report)
        if config.verify:
            with set_aside_on_error(folder, config.target):
                report["verified"] = verified = compare(source, str(folder), config)
                storage.write_json(folder / REPORT_FILE, {**report, "verified": _finite(verified)})
                check_verified(verified, config.target)
    return report


def compare(source: Source, folder: str, config: ConvertConfig) -> dict[str, Any]:
    """Compares the logits of a conversion's source and of what was written, as `verify.compare`."""
    if _with_peft(config):
        return peft_peer.compare(source, config.source_kind, folder, config.target_kind)
    return verify.compare(source, config.source_kind, folder, config.target_kind,
                          as_it_lies=config.dtype is None)


def _with_peft(config: ConvertConfig) -> bool:
    return adapter_files.KIND in (config.source_kind, config.target_kind)


def unverified(target: storage.PathLike) -> epath.Path:
    """Folder into which a conversion is moved if its verification failed."""
    target = storage.as_path(target)
    return target.parent / f"{target.name}.unverified"


@contextlib.contextmanager
def set_aside_on_error(folder: storage.PathLike, target: storage.PathLike) -> Iterator[None]:
    """Moves a local folder that would become `target` to `unverified` if the block ends with any error.

    Scripts do not find it there by mistake.
    """
    try:
        yield
    except BaseException:
        if storage.is_local(target):
            os.replace(storage.as_path(folder), unverified(target))
        raise


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with infinities and NaN as text, which JSON does not have."""
    return {name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()}


def open_named(config: ConvertConfig) -> Source:
    """Opens the source of a conversion under its new name; a T5X checkpoint with a base is an expert.

    Raises:
        InputError: as `weight_sources.open_source` and `t5x_expert.as_expert`; a name for what is no expert.
    """
    source = open_source(config.source_kind, config.source, base=config.base, vocabulary=config.vocabulary,
                         scanned=None if config.target_kind == "t5x" else config.scanned,
                         experts_per_token=config.experts_per_token)
    family = source.model.config.family
    forms = {"elm": [family], "hf": list(hf_models.FORMATS), "t5x": [T5Config.family],
             adapter_files.KIND: [name for name, row in families.FAMILIES.items() if row.hf_parameters]}
    if family not in forms[config.target_kind]:
        fitting = " or ".join(f"--to {kind}" for kind, known in forms.items() if family in known)
        raise InputError(describe(f"Networks of family {family!r} have no such form", where=config.source,
                                  got=f"--to {config.target_kind}", expected=fitting))
    adapter = None if source.expert is None else adapter_of(source.expert.card.network)
    if config.target_kind == adapter_files.KIND:
        if source.expert is None:
            raise InputError(describe("PEFT's folders hold adapters, and this has none", where=config.source,
                                      cure="--to hf writes a whole model"))
        peft_export.check_form(source.expert)
    elif config.target_kind != "elm" and not isinstance(adapter, BottleneckConfig | None):
        raise InputError(describe(f"Adapters of kind {adapter.kind!r} have no such form", where=config.source,
                                  got=f"--to {config.target_kind}",
                                  expected="--to elm or peft, or an expert with bottleneck adapters"))
    if config.target_kind == "t5x" and adapter is not None and adapter.layers is not None:
        raise InputError(describe("T5X's config has adapters in all layers", where=config.source,
                                  got=f"adapters in the layers {list(adapter.layers)}",
                                  expected="--to elm or hf, or an expert with adapters in all layers"))
    of_t5x = config.source_kind == "t5x" and (config.base is not None or source.model.config.adapter)
    if of_t5x:
        naming = t5x_expert.Naming(config.expert_id, config.kind, config.modules)
        return t5x_expert.as_expert(source, config.base, naming)
    if config.kind is not None:
        raise InputError(describe("--kind is for the expert that a T5X run trained", where=config.source,
                                  cure="--from t5x, with the run's base as --base"))
    if config.expert_id is None:
        return source
    if source.expert is None and source.card is None:
        raise InputError(describe("--id names an expert, and this is a whole model", where=config.source,
                                  cure="leave it out; a T5X run's expert needs --base"))
    return source.named(config.expert_id)


def check_dtype(source: Source, config: ConvertConfig) -> None:
    """Raises InputError for another dtype of an expert than float32 in this program's folders."""
    alone = config.target_kind in ("elm", adapter_files.KIND)  # without its base
    is_expert = alone and (source.expert is not None or source.card is not None)
    if is_expert and config.dtype not in (None, "float32"):
        raise InputError(describe("An expert's leaves are float32 where its base is not written with it",
                                  where=config.source, got=f"--dtype {config.dtype}",
                                  expected="no --dtype, or --to hf or t5x"))


def writes_full_expert(source: Source, config: ConvertConfig) -> bool:
    """Whether the target is an expert's folder with every leaf."""
    return source.card is not None and config.target_kind == "elm"


def cast(source: Source, dtype: str | None) -> Source:
    """Casts a source to another floating-point type, also in the config.json that it carries.

    The leaves of a prompt expert stay as they are.
    """
    if dtype is None:
        return source
    model = source.model
    facts = dict(model.facts)
    kept = facts.get(folder_files.FACTS, {})
    if "config" in kept:
        named = {name: dtype for name in ("torch_dtype", "dtype") if name in kept["config"]}
        named = named or {"torch_dtype": dtype}
        facts[folder_files.FACTS] = {**kept, "config": {**kept["config"], **named}}
    return dataclasses.replace(source, model=dataclasses.replace(
        model, tensors=streaming.CastTensors(model.tensors, dtype, model.where), facts=facts))


def write(source: Source, config: ConvertConfig) -> dict[str, Origin]:
    """Writes a source as the requested kind; returns each leaf's new place."""
    model, expert = source.model, source.expert
    if config.target_kind == "elm" and expert is not None:
        with staging.staged(config.target) as target:
            write_expert(target, expert)
        return {path: Origin(path) for path in trees.flatten(expert.overlay)}
    if config.target_kind == adapter_files.KIND:
        return peft_export.write_peft(config.target, expert, model.tensors, model.address)
    if writes_full_expert(source, config):
        with staging.staged(config.target) as target:
            save_leaves_as_expert(target, source.card, model.tensors, model.check)
        return {path: Origin(path) for path in model.tensors.specs}
    if config.target_kind == "elm":
        return elm_folders.write_elm(config.target, model)
    if config.target_kind == "t5x":
        if expert is not None:
            model = hf_adapters.with_overlay(model, expert, adapters=True)
        return t5x_writer.write_t5x(config.target, model, layout=config.layout, scanned=config.scanned,
                                    step=config.step)
    if expert is not None:
        return hf_adapters.write_hf_expert(config.target, model, expert,
                                           max_shard_bytes=config.max_shard_bytes)
    return hf_models.write_model_folder(config.target, model, max_shard_bytes=config.max_shard_bytes)


def make_report(found: Source, source: Source, config: ConvertConfig, origins: Mapping[str, Origin],
                seconds: float) -> dict[str, Any]:
    """Makes the report of a conversion: every leaf's way, and notes on both sides.

    Args:
        found: the source as it is on disk.
        source: the same as it was written, cast if that was asked for.
        config: of the conversion.
        origins: each leaf's place in the target.
        seconds: that it took.
    """
    before, specs = found.leaves(), source.leaves()
    alone = config.target_kind in ("elm", adapter_files.KIND)
    if source.expert is not None and alone:  # the base stays where it is
        specs = {path: leaf for path, leaf in specs.items() if path in source.expert_origins}
    leaves = [{
        "leaf": path,
        "source": _place(before[path][1]), "target": _place(origins[path]),
        "shape": list(spec.shape), "source_dtype": before[path][0].dtype, "dtype": spec.dtype,
        "transposed": before[path][1].transposed != origins[path].transposed,
    } for path, (spec, _) in specs.items() if path in origins]
    written = [specs[leaf["leaf"]][0] for leaf in leaves]
    return {
        "schema_version": SCHEMA_VERSION,
        "source": found.facts() | {"kind": config.source_kind},
        "target": {"path": str(config.target), "kind": config.target_kind},
        "cast_to": config.dtype,
        "num_leaves": len(leaves),
        "num_parameters": sum(int(np.prod(spec.shape, dtype=np.int64)) for spec in written),
        "num_bytes": sum(spec.nbytes for spec in written),
        "seconds": round(seconds, 3),
        "notes": list(source.model.notes),
        "not_written": sorted(path for path in specs if path not in origins),
        "leaves": leaves,
    }


def _place(origin: Origin) -> str:
    return origin.name if origin.layer is None else f"{origin.name}[layer {origin.layer}]"


def summary(report: Mapping[str, Any]) -> list[str]:
    """Formats the report in a few lines."""
    source, target = report["source"], report["target"]
    seconds = max(report["seconds"], 1e-3)
    lines = [f"{report['num_leaves']} leaves, {report['num_parameters']:,} parameters, "
             f"{report['num_bytes'] / 1e9:.2f} GB from {source['kind']} to {target['kind']} "
             f"in {seconds:.1f} s ({report['num_bytes'] / 1e6 / seconds:.0f} MB/s)"]
    lines += [f"note: {note}" for note in report["notes"]]
    if report["not_written"]:
        lines.append(f"not written: {', '.join(report['not_written'])}")
    if "verified" in report:
        found = report["verified"]
        lines.append(f"largest difference of the logits: {found['largest_difference']:.3g}, largest logit "
                     f"{found['largest_logit']:.3g} "
                     f"({found['source_by']} against {found['target_by']}, {found['shape']})")
    return [*lines, f"report: {storage.as_path(target['path']) / REPORT_FILE}", str(target["path"])]


def check_verified(verified: Mapping[str, Any], target: Any) -> None:
    """Raises RunError if the logits differ by more than `verify.compare` allows."""
    difference = verified["largest_difference"]
    if math.isfinite(difference) and difference <= verified["tolerance"]:
        return
    raise RunError(describe("The two models do not compute the same",
                            where=unverified(target) if storage.is_local(target) else target,
                            got=f"logits that differ by {difference:.3g}",
                            expected=f"at most {verified['tolerance']:.3g}, where the largest logit is "
                                     f"{verified['largest_logit']:.3g}",
                            cure="do not use what was written; report this"))


class Watched:
    """`Tensors` of a conversion: refuses values that are not finite, and logs the progress.

    It logs at most every `_PROGRESS_SECONDS`; `where` is the source's folder, for errors.
    """

    def __init__(self, tensors: Tensors, where: str) -> None:
        self._tensors, self.specs, self.origins = tensors, tensors.specs, tensors.origins
        self._where = where
        self._done: dict[str, int] = {}
        self._total = sum(spec.nbytes for spec in tensors.specs.values())
        self._told = time.monotonic()

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        """Reads a leaf or a part of it, checks its values, and logs the progress."""
        array = self._tensors.read(path, index)
        leaf_values.check_finite(array, path, self._where)
        self._done[path] = self.specs[path].nbytes
        if time.monotonic() - self._told > _PROGRESS_SECONDS:
            self._told = time.monotonic()
            logger.info("%d of %d leaves, %.1f of %.1f GB", len(self._done), len(self.specs),
                        sum(self._done.values()) / 1e9, self._total / 1e9)
        return array


def watch(source: Source) -> Source:
    """Returns the source with tensors that check their values and log their progress."""
    watched = Watched(source.model.tensors, source.model.where)
    return dataclasses.replace(source, model=dataclasses.replace(source.model, tensors=watched))
