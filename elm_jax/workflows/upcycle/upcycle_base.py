"""Makes a sparse base of a dense one: in folders, a leaf at a time, or in memory."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.experts.base import Base
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.overlay import Expert, read_card
from elm_jax.experts.weight_sources import full_model, reference
from elm_jax.formats import detect
from elm_jax.formats.elm import base_json, elm_folders
from elm_jax.formats.hf import folder_files
from elm_jax.formats.model import Model, Tensors
from elm_jax.formats.tensors.streaming import ArrayTensors
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.models.network import Network
from elm_jax.planning.token_flops import active_parameters
from elm_jax.runtime import staging, storage, trees
from elm_jax.runtime.config_checks import (
    check_choice,
    check_positive,
    check_range,
    check_types,
)
from elm_jax.workflows.choices import RESTS
from elm_jax.workflows.upcycle import step_zero_loss
from elm_jax.workflows.upcycle.upcycled_leaves import (
    MEAN,
    Parent,
    UpcycledTensors,
    UpcycleOptions,
    sparse_layers,
    sparse_network,
)

COPIES, EXPERTS = "copies", "experts"
"""Methods: copies of the base's feed-forwards, or the feed-forwards of its full experts."""


@dataclasses.dataclass(frozen=True)
class UpcycleConfig:
    """Settings of one upcycling.

    Attributes:
        base: the dense base: a folder of any kind, or a hub name.
        output: folder to write; does not exist, or is empty.
        sparse: settings of the sparse layers.
        experts: folders of full experts of that base, whose feed-forwards become the experts in this order;
            none copies the base's.
        rest: with `experts`, what all other leaves are: their ``mean`` (None too), or the ``base``'s own.
        noise: each copy gets Gaussian noise of this share of its kernel's root mean square.
        seed: of routers and noise.
        loss_on: a task on whose rows the loss is computed before and after; None computes none.
        rows: of that task, a seeded random subset of at most so many; None for 64.
        split: of that task; None for the one that it is scored on.
        source_length: tokens of an input that are kept; None for 512.
        modules: registries to import by name; None for the verbs' own.
    """

    base: storage.PathLike
    output: storage.PathLike
    sparse: SparseConfig
    experts: tuple[storage.PathLike, ...] = ()
    rest: str | None = None
    noise: float = 0.0
    seed: int = 0
    loss_on: str | None = None
    rows: int | None = None
    split: str | None = None
    source_length: int | None = None
    modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(rows=self.rows, source_length=self.source_length)
        _check_options(self.options, len(self.experts), self.sparse)
        given = [name for name in ("rows", "split", "source_length", "modules")
                 if getattr(self, name) is not None]
        if given and self.loss_on is None:
            raise InputError(describe("Without a task there is no loss, and these have no effect",
                                      got=", ".join(given),
                                      cure="give --loss_on TASK too, or leave them out"))

    @property
    def options(self) -> UpcycleOptions:
        """How the leaves are made."""
        return UpcycleOptions(self.rest, self.noise, self.seed)

    @property
    def loss_rows(self) -> step_zero_loss.LossRows | None:
        """The rows that the loss is computed on; None without."""
        return None if self.loss_on is None else step_zero_loss.LossRows(
            self.loss_on, self.rows, self.split, self.source_length, self.modules)


def upcycle_folders(config: UpcycleConfig) -> dict[str, Any]:
    """Writes a sparse base's folder, a leaf at a time; it gets its name when it is whole.

    Returns:
        What was written, of what, and the loss before and after if the config names a task. JSON-ready.

    Raises:
        InputError: the output is taken; the base cannot be made sparse; an expert is not full, or is
            another base's; a value that is not finite.
        RunError: the disk is full.
    """
    staging.check_free(config.output)
    start = time.monotonic()
    model = detect.open_model(config.base)
    network = sparse_network(model.config, config.sparse, model.where)
    origin = reference(model)
    folders = [_open_card(folder, origin, model) for folder in config.experts]
    experts = [full_model(*each, model) for each in folders]
    cards = [card for _, card, _ in folders]
    tensors = UpcycledTensors(model.tensors, network, [Parent(each.tensors, each.where) for each in experts],
                              config.options, model.where)
    before = None if config.loss_rows is None else step_zero_loss.of_dense(config.loss_rows, config.base)
    made = _provenance(origin, [{**_named(card), "fingerprint": written, "path": str(folder)}
                                for folder, card, written in folders], config.options)
    sparse = dataclasses.replace(
        model, config=network.config, tensors=tensors, facts=_facts(model, made),
        check=_all_of(each.check for each in (model, *experts)))
    began = time.monotonic()
    elm_folders.write_elm(config.output, sparse)
    report = {**_report(config, model, network, tensors, made), "seconds": round(time.monotonic() - began, 3)}
    if before is not None:
        same = not cards and config.noise == 0
        report["loss"] = step_zero_loss.of_sparse(before, config.output, same)
    return {**report, "seconds_in_all": round(time.monotonic() - start, 3)}


def upcycle(base: Base, sparse: SparseConfig, experts: Sequence[Expert] = (), *, rest: str | None = None,
            noise: float = 0.0, seed: int = 0) -> Base:
    """Makes a sparse base of a dense one in memory.

    Args:
        base: dense, a T5 or a decoder without biases.
        sparse: settings of the sparse layers.
        experts: full experts of that base, as many as `sparse` has, whose feed-forwards become the experts in
            this order; none copies the base's feed-forwards.
        rest: with experts, what all other leaves are: their ``mean`` (None too), or the ``base``'s own.
        noise: each copy gets Gaussian noise of this share of its kernel's root mean square.
        seed: of routers and noise.

    Returns:
        The sparse base; `save_base` writes it. With raw gates (``normalize_gates=False``) it does not compute
        what the dense one does: a token's feed-forward is multiplied by the sum of its gates.

    Raises:
        InputError: as `upcycle_folders`.
    """
    options, experts = UpcycleOptions(rest, noise, seed), tuple(experts)
    _check_options(options, len(experts), sparse)
    where = base.path or base.name
    network = sparse_network(base.config, sparse, where)
    for expert in experts:
        _check_card(expert.card, base.fingerprint, where, expert.path or expert.card.id)
    parents = [Parent(ArrayTensors(each.overlay), each.path or each.card.id) for each in experts]
    tensors = UpcycledTensors(ArrayTensors(base.params), network, parents, options, where)
    # Arrays of their own: copies would be views that cannot be written to.
    params = trees.unflatten({path: _own(tensors, path) for path in tensors.specs})
    return dataclasses.replace(base, name=f"{base.name}-upcycled", params=params, config=network.config,
                               fingerprint=trees.fingerprint(params), path=None)


def _own(tensors: Tensors, path: str) -> Any:
    values = tensors.read(path)
    return values if values.flags.c_contiguous else values.copy()


def _check_options(options: UpcycleOptions, experts: int, sparse: SparseConfig) -> None:
    """Raises InputError for options out of range, without effect, or that do not fit the experts."""
    if options.rest is not None:
        check_choice("rest", options.rest, RESTS)
    check_range("noise", options.noise, 0.0)
    check_range("seed", options.seed, 0)
    if experts and options.noise:
        raise InputError(describe("Noise tells copies apart, and these experts differ already", where="noise",
                                  got=options.noise, cure="leave --noise out, or --experts"))
    if not experts and options.rest is not None:
        raise InputError(describe("Without experts all other leaves are the base's", where="rest",
                                  got=options.rest, cure="leave --rest out, or give --experts"))
    if experts and sparse.num_experts != experts:
        raise InputError(describe("Each full expert becomes one of the experts", where="num_experts",
                                  got=f"{sparse.num_experts}, and {experts} full experts",
                                  expected="the number of the full experts", cure="leave --num_experts out"))


Opened = tuple[epath.Path, ExpertCard, str]


def _open_card(folder: storage.PathLike, base: dict[str, str], model: Model) -> Opened:
    found, card, written = read_card(folder)
    _check_card(card, base["fingerprint"], model.where, found)
    return found, card, str(written)


def _check_card(card: ExpertCard, fingerprint: str, base: object, where: object) -> None:
    """Raises InputError for an expert of another base, and for one without feed-forwards of its own."""
    if card.form != "full":
        raise InputError(describe(
            "This expert has no feed-forwards of its own: it is adapters on its base", where=where,
            got=f"{card.id}, a {card.kind} expert of form {card.form}",
            expected="full experts (elm train --kind dataset or multitask)",
            cure="train it with --kind dataset, or merge its adapters into others"))
    if card.base["fingerprint"] != fingerprint:
        raise InputError(describe(
            "The expert belongs to another base", where=where,
            got=f"{card.base.get('name')} {card.base['fingerprint']}", expected=f"{base} {fingerprint}",
            cure="give the base that this expert was trained on"))


def _provenance(base: dict[str, str], experts: list[dict[str, str]], options: UpcycleOptions
                ) -> dict[str, Any]:
    """What ``base.json`` keeps of how the base was made."""
    how = {"rest": options.rest or MEAN, "experts": experts} if experts else {"noise": options.noise}
    return {"method": EXPERTS if experts else COPIES, "base": base, **how, "seed": options.seed}


def _named(card: ExpertCard) -> dict[str, str]:
    return {"id": card.id, "kind": card.kind}


def _facts(model: Model, made: dict[str, Any]) -> dict[str, Any]:
    """The base's facts, less a config.json of Hugging Face's, which speaks of the dense network."""
    kept = model.facts.get(folder_files.FACTS)
    without = {} if kept is None else {folder_files.FACTS: {
        name: value for name, value in kept.items() if name != "config"}}
    return {**model.facts, **without, elm_folders.FACTS: {"training": {"upcycled": made}}}


def _all_of(checks: Any) -> Callable[[], None]:
    checks = list(checks)

    def check() -> None:
        for each in checks:
            each()

    return check


def _report(config: UpcycleConfig, model: Model, network: Network, tensors: UpcycledTensors,
            made: dict[str, Any]) -> dict[str, Any]:
    sparse = config.sparse
    sizes = {path: math.prod(spec.shape) for path, spec in tensors.specs.items()}
    facts = base_json.read(storage.as_path(config.output))
    return {
        "output": str(config.output), "fingerprint": facts["fingerprint"], "upcycled": made,
        "sparse": sparse.to_dict(), "sparse_layers": sparse_layers(sizes),
        "num_leaves": len(sizes), "num_parameters": sum(sizes.values()),
        "active_parameters": active_parameters(sparse, sizes),
        "dense_parameters": sum(math.prod(spec.shape) for spec in model.tensors.specs.values()),
        "num_bytes": sum(spec.nbytes for spec in tensors.specs.values()),
    }
