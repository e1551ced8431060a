"""The page of a library: its experts, their scores, how keys are routed between them, and what is wrong."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from elm_jax.errors import InputError, RunError, describe
from elm_jax.evaluation.results import ResultsStore
from elm_jax.experts import library_files
from elm_jax.experts.library import ExpertLibrary
from elm_jax.experts.overlay import read_card
from elm_jax.experts.routed_library import generality_in
from elm_jax.reporting import plots
from elm_jax.reporting.expert_cards import parents_of, settings_of
from elm_jax.reporting.page import LIBRARY_HTML, LIBRARY_MARKDOWN
from elm_jax.reporting.page_parts import Made, fold, html_page, markdown_of
from elm_jax.reporting.report import fraction, markdown_table, with_interval
from elm_jax.routing.neighbors import KeyNeighbors, key_neighbors
from elm_jax.runtime import locks, storage
from elm_jax.runtime.config_checks import items_of

BASE = "base"
MOST_PAIRS, MOST_NEXT = 20, 3
"""Nearest pairs of experts that are listed, and other experts to which an expert's keys go."""
MEGABYTE = 1e6


@dataclasses.dataclass(frozen=True)
class StoredEncoder:
    """An encoder as a library names it: enough to read the keys that it made, not to embed a text."""

    name: str
    fingerprint: str

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Raises RunError: the encoder itself was not loaded."""
        raise RunError(describe("The library's keys were read, not its encoder", got=f"{len(texts)} texts"))


def write_library_report(
    library: storage.PathLike, output: storage.PathLike | None = None, *,
    results: Sequence[storage.PathLike] = (), verify: bool = False, made: Made | None = None,
) -> epath.Path:
    """Writes a page about a library: HTML that needs no other file, and Markdown with a picture beside it.

    The encoder and the experts' weights are not loaded, but for `verify`.

    Args:
        library: its folder.
        output: file of the page, which ends in ``.html``; by default ``report.html`` in the library.
        results: files or folders of results with the experts' scores; by default those that lie beside the
            library.
        verify: whether every expert's weights are read and compared with their fingerprints.
        made: when and by which command; by default now, by Python code.

    Returns:
        Path of the page.

    Raises:
        InputError: there is no library here, it is damaged, or a file of results does not exist.
    """
    folder = storage.as_path(library)
    page = folder / "report.html" if output is None else storage.as_path(output)
    if page.suffix != ".html" or page.is_dir():
        raise InputError(describe("The page needs a name that ends in .html", where=page,
                                  cure=f"--output {page.with_suffix('.html')}"))
    storage.require_file(folder / library_files.LIBRARY)
    with locks.alone(folder, locks.CHANGE_SECONDS):
        return _write(folder, page, results, verify, made or Made())


def _write(folder: epath.Path, page: epath.Path, results: Sequence[storage.PathLike], verify: bool,
           made: Made) -> epath.Path:
    """Does as `write_library_report`, of a library that no other process changes."""
    opened = open_without_encoder(folder)
    neighbors = key_neighbors(opened.index)
    fingerprints, faults = check_cards(opened)
    stores = [results_in(place) for place in items_of(results)] or _results_beside(folder)
    picture = f"{page.stem}_routing.png"
    pictures = {picture: plots.routing_map(opened.index.experts, neighbors.shares)}
    content = {
        "title": f"Library {storage.absolute(folder).name}",
        "summary": [made.sentence(), *_summary(opened, neighbors)],
        "verified": _verified(opened, [*faults, *opened.verify()] if verify else faults, verify),
        "experts": experts_grid(opened, neighbors),
        "scores": expert_scores_grid(opened, stores, fingerprints),
        "sources": ", ".join(str(store.path) for store in stores), "shares": shares_grid(opened, neighbors),
        "pairs": pairs_grid(opened, neighbors), "routing_picture": picture,
    }
    texts = {".html": html_page(LIBRARY_HTML, pictures, **content),
             ".md": markdown_of(LIBRARY_MARKDOWN, pictures, table=markdown_table, **content)}
    storage.write_bytes(page.parent / picture, pictures[picture])
    for suffix, text in texts.items():
        storage.write_text(page.with_suffix(suffix), text)
    return page


def open_without_encoder(folder: storage.PathLike) -> ExpertLibrary:
    """Opens a library whose keys are read but cannot be asked with texts."""
    encoder = library_files.read_library(storage.as_path(folder))["encoder"]
    return ExpertLibrary.open(folder, StoredEncoder(encoder["name"], encoder["fingerprint"]))


def check_cards(library: ExpertLibrary) -> tuple[dict[str, str | None], list[str]]:
    """Checks every expert's folder, card and number of keys, without its weights.

    Returns:
        (fingerprints of the weights by expert, as the cards say; faults in words).
    """
    fingerprints: dict[str, str | None] = {}
    faults = []
    for name, entry in library.entries.items():
        try:
            _, card, fingerprints[name] = read_card(library.path / "experts" / name)
        except InputError as error:
            faults.append(f"{name}: {error}")
            continue
        if card != entry.card:
            faults.append(library_files.unlike_card(card, entry.card))
        if library.index.count(name) != entry.num_keys:
            faults.append(f"{name}: {library.index.count(name)} keys, expected {entry.num_keys}")
    return fingerprints, faults


def _verified(library: ExpertLibrary, faults: Sequence[str], weights: bool) -> list[str]:
    """Lines on what was checked and what is wrong, each fault once."""
    what = "folders, cards, numbers of keys" + (" and weights" if weights else "")
    if faults:
        return [f"Checked: {what}. Faults:", *dict.fromkeys(faults)]
    return [f"Checked: {what}; {len(library)} experts are whole."
            + ("" if weights else " The weights were not read; --verify reads them too.")]


def results_in(place: storage.PathLike) -> ResultsStore:
    """Opens results: a file of them, their folder, or a study's; InputError if there are none."""
    path = storage.as_path(place)
    if path.is_dir():
        of_study = path / "results" / "results.jsonl"
        path = of_study if of_study.exists() else path / "results.jsonl"
    if not path.exists():
        raise InputError(describe("There are no results here", where=path,
                                  expected="results.jsonl, as `elm evaluate` writes it"))
    return ResultsStore(path.parent, path.name)


def _results_beside(library: epath.Path) -> list[ResultsStore]:
    parent = storage.absolute(library).parent
    places = (parent / "results" / "results.jsonl", parent / "results.jsonl", library / "results.jsonl")
    return [results_in(place) for place in places if place.exists()]


def _summary(library: ExpertLibrary, neighbors: KeyNeighbors) -> list[str]:
    tasks = {task for entry in library.entries.values() for task in entry.card.tasks}
    keys = "keys" if library.means is None else "keys, means of instances"
    lines = [f"{len(library)} experts of {len(tasks)} tasks, {len(library.index):,} {keys}; encoder "
             f"{library.encoder.name}, text format {library.text_format}."]
    home = stay(library, neighbors)
    if not np.isnan(home).all():
        mean, least = fraction(float(np.nanmean(home))), fraction(float(np.nanmin(home)))
        lines.append(f"Of an expert's keys {mean} percent, in the mean, have their nearest other key in the "
                     f"same expert; least: {least}, of {library.index.experts[int(np.nanargmin(home))]}.")
    return lines


def stay(library: ExpertLibrary, neighbors: KeyNeighbors) -> np.ndarray:
    """Share f64[E] of an expert's keys whose nearest other key is its own; NaN for an expert of one key."""
    return np.where(library.index.counts > 1, np.diag(neighbors.shares), np.nan)


def experts_grid(library: ExpertLibrary, neighbors: KeyNeighbors) -> dict[str, Any]:
    """The experts of a library, one a line, from their cards."""
    places = {name: place for place, name in enumerate(library.index.experts)}
    rows, priors, home_of = [], generality_in(library).prior_means(), stay(library, neighbors)
    for name, entry in library.entries.items():
        card, prior = entry.card, priors.get(name)
        home = home_of[places[name]] if name in places else None
        rows.append([name, card.kind, card.base.get("name", "–"), card.dataset or "–",
                     fold(", ".join(card.tasks) or "–"), fold(parents_of(card) or "–"),
                     fold(settings_of(card) or "–"), card.created[:10],
                     _size(library.path / "experts" / name), str(entry.num_keys), fraction(home),
                     "–" if prior is None else f"{prior:+.3f}"])
    return {"columns": ["expert", "kind", "base", "data set", "tasks", "parents", "settings", "made", "MB",
                        "keys", "stay, %", "prior"], "rows": rows, "labels": 8}


def _size(folder: epath.Path) -> str:
    """Size of a folder's files in megabytes; a dash for one that is not on a local disk."""
    if not storage.is_local(folder) or not folder.exists():
        return "–"
    files = (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
    return f"{sum(os.lstat(file).st_size for file in files) / MEGABYTE:.2f}"


def expert_scores_grid(library: ExpertLibrary, stores: Sequence[ResultsStore],
                fingerprints: Mapping[str, str | None]) -> dict[str, Any]:
    """Scores of each expert on its own tasks beside the base's, and its mean on the tasks of others.

    Rows of another model of the same id are left out; ``left`` counts them.
    """
    rows = [row for store in stores for row in store.rows()]
    bases = {_place(row): row for row in rows if row["expert"] == BASE}
    left, lines = 0, []
    by_expert: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["expert"] in library:
            same = row.get("model") in (None, fingerprints.get(row["expert"]))
            left += not same
            if same:
                by_expert.setdefault(row["expert"], []).append(row)
    for name in library:
        own = set(library[name].card.tasks)
        found = by_expert.get(name, [])
        others = [row["value"] for row in found if row["task"] not in own and row["metric"] == "accuracy"]
        mean = f"{fraction(float(np.mean(others)))} ({len(others)})" if others else "–"
        lines += [[name, row["task"], row["split"], row["metric"], _percent(row),
                   fraction(bases[_place(row)]["value"]) if _place(row) in bases else "–", mean]
                  for row in found if row["task"] in own]
    return {"columns": ["expert", "own task", "split", "metric", "percent", "base",
                        "other tasks: mean accuracy (number)"], "rows": lines, "labels": 4, "left": left}


def _place(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["task"], row["split"], row["metric"]


def _percent(row: Mapping[str, Any]) -> str:
    return with_interval({"value": row["value"], "low": row["ci95_low"], "high": row["ci95_high"]})


def shares_grid(library: ExpertLibrary, neighbors: KeyNeighbors) -> dict[str, Any]:
    """Where the keys of each expert go: to itself, and to the experts that get most of the others."""
    names, rows, home_of = library.index.experts, [], stay(library, neighbors)
    for place, name in enumerate(names):
        shares = neighbors.shares[place].copy()
        shares[place] = 0
        order = [other for other in np.argsort(-shares, kind="stable")[:MOST_NEXT] if shares[other] > 0]
        others = ", ".join(f"{names[other]} {fraction(shares[other])}" for other in order)
        rows.append([name, fold(others or "–"), fraction(home_of[place])])
    return {"columns": ["keys of", "go to others, %", "stay, %"], "rows": rows, "labels": 2}


def pairs_grid(library: ExpertLibrary, neighbors: KeyNeighbors) -> dict[str, Any]:
    """The pairs of experts whose keys are most alike, and what each routes to the other."""
    names = library.index.experts
    return {"columns": ["expert", "expert 2", "similarity", "1 to 2, %", "2 to 1, %"], "labels": 2,
            "rows": [[names[first], names[second], f"{value:.3f}", fraction(neighbors.shares[first, second]),
                      fraction(neighbors.shares[second, first])]
                     for first, second, value in neighbors.nearest_pairs(MOST_PAIRS)]}
