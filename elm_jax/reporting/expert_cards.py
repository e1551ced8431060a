"""Experts as a report shows them: their cards, and the losses of their training, where they are found."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.overlay import read_card
from elm_jax.reporting.page_parts import fold
from elm_jax.runtime import storage
from elm_jax.runtime.config_checks import items_of, misfit
from elm_jax.training.router_log import FILE, LayerLoad, read_loads

PLACES = ("expert.json", "expert/expert.json", "*/expert.json", "*/expert/expert.json", "*/*/expert.json",
          "*/*/expert/expert.json")
"""Where experts lie in a folder: one expert, a run of one, folders of them."""
COLUMNS = ("expert", "kind", "base", "tasks", "steps", "rows", "parents", "settings", "made")


@dataclasses.dataclass(frozen=True)
class FoundExpert:
    """An expert that was found, without its weights.

    Attributes:
        card: what it is.
        losses: (step, loss) of its training, in order; none where the run's log is not beside it.
        loads: of the routers of its sparse layers, likewise.
    """

    card: ExpertCard
    losses: tuple[tuple[int, float], ...] = ()
    loads: tuple[LayerLoad, ...] = ()


@dataclasses.dataclass(frozen=True)
class LossRow:
    """What is read of a line of a run's log."""

    step: int
    loss: float | None


def find_experts(wanted: Mapping[str, str | None], near: Iterable[storage.PathLike],
                 given: str | Sequence[storage.PathLike] = ()) -> dict[str, FoundExpert]:
    """Finds experts by their ids and the fingerprints of their weights.

    Args:
        wanted: id -> fingerprint; None for any of this id.
        near: folders to look into first; a damaged expert there counts as none. Only local ones are searched.
        given: folders of experts, of runs, or of several of them, which the caller names.

    Raises:
        InputError: a given folder holds no expert.
    """
    found: dict[str, FoundExpert] = {}
    for place in items_of(given):
        files = _expert_files(storage.as_path(place))
        if not files:
            raise InputError(describe("There is no expert here", where=place,
                                      expected="an expert's folder, a run's, or a folder of these"))
        for file in files:
            _keep(found, wanted, file.parent)
    for place in map(storage.as_path, near):
        if wanted.keys() <= found.keys():
            break
        for file in _expert_files(place) if storage.is_local(place) else ():
            try:
                _keep(found, wanted, file.parent)
            except InputError:
                continue
    return {name: found[name] for name in wanted if name in found}


def _expert_files(folder: epath.Path) -> list[epath.Path]:
    return [file for pattern in PLACES for file in sorted(folder.glob(pattern))]


def _keep(found: dict[str, FoundExpert], wanted: Mapping[str, str | None], folder: epath.Path) -> None:
    """Keeps the expert of a folder if it is wanted and the first of its id."""
    _, card, fingerprint = read_card(folder)
    if card.id in wanted and card.id not in found and wanted[card.id] in (None, fingerprint):
        found[card.id] = FoundExpert(card, read_losses(folder.parent / "metrics.jsonl"),
                                     read_loads(folder.parent / FILE))


def read_losses(path: storage.PathLike) -> tuple[tuple[int, float], ...]:
    """Reads (step, loss) of a run's log; rows without a loss are left out, and a missing file has none.

    Raises:
        InputError: the file is damaged.
    """
    rows = storage.read_jsonl(path)
    return tuple((row["step"], float(row["loss"])) for row in rows
                 if misfit(row, LossRow) is None and row["loss"] is not None)


def cards_grid(cards: Iterable[ExpertCard]) -> dict[str, Any]:
    """Cards as a grid, one an expert; what a card does not say is a dash."""
    return {"columns": list(COLUMNS), "labels": len(COLUMNS), "rows": [_row(card) for card in cards]}


def _row(card: ExpertCard) -> list[Any]:
    training = card.training
    return [card.id, card.kind, card.base.get("name", "–"), fold(", ".join(card.tasks) or "–"),
            _number(training.get("steps")), _number(training.get("examples")), fold(parents_of(card) or "–"),
            fold(settings_of(card) or "–"), card.created[:10]]


def _number(value: Any) -> str:
    return f"{value:,}" if type(value) is int else "–"


def parents_of(card: ExpertCard) -> str:
    """A merged expert's parents with their weights, in words."""
    def one(parent: Mapping[str, Any]) -> str:
        weight = parent.get("weight")
        return str(parent.get("id")) + (f" ({weight:.3g})" if isinstance(weight, int | float) else "")

    return ", ".join(one(parent) for parent in card.parents if isinstance(parent, dict))


def settings_of(card: ExpertCard) -> str:
    """What a card says of how the expert was made, in words: the method of a merge, or of the training."""
    if card.method is not None:
        return f"method {card.method}"
    settings = card.training.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    optimizer = settings.get("optimizer")
    known = {**(optimizer if isinstance(optimizer, dict) else {}), **settings}
    words = [f"{label} {known[name]}" for name, label in (
        ("name", "optimizer"), ("learning_rate", "learning rate"), ("schedule", "schedule"),
        ("batch_size", "batch"), ("task_feature_lengths", "lengths"), ("dtype", "dtype")) if name in known]
    adapter = card.network.get("adapter")
    if isinstance(adapter, dict) and card.form == "adapter":
        words.append("adapter " + " ".join(f"{name} {value}" for name, value in adapter.items()))
    if "seed" in card.training:
        words.append(f"seed {card.training['seed']}")
    return ", ".join(words)
