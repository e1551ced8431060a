"""A library as routers see it, and what is known of its experts beside their cards."""

import weakref
from typing import TYPE_CHECKING

import numpy as np

from elm_jax.data.registry.task_kin import kin_of
from elm_jax.errors import InputError
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.copies import copies_among, fingerprint_in
from elm_jax.experts.generality import Generality, generality_file, read_generality
from elm_jax.routing.cases import RoutedLibrary
from elm_jax.routing.text import WITHOUT_INPUT

if TYPE_CHECKING:  # a library gives itself, and imports this
    from elm_jax.experts.library import ExpertLibrary


def generality_in(library: "ExpertLibrary") -> Generality:
    """What is known of how general a library's experts are; read anew, for others may have calibrated."""
    return read_generality(library.path, {name: entry.card for name, entry in library.entries.items()})


def fingerprints_of(library: "ExpertLibrary", known: Generality | None = None) -> dict[str, str | None]:
    """Fingerprints of the experts' weights, as a calibration says (which spares files) or their files."""
    own = {} if known is None else {name: one.fingerprint for name, one in known.experts.items()}
    return {name: own.get(name) or fingerprint_in(library.path / "experts" / name) for name in library}


def copies_in(library: "ExpertLibrary", known: Generality | None = None) -> np.ndarray | None:
    """Copies among a library's experts, as `copies_among` says; of means equal keys stand for equal rows.

    They do so in text formats alone that have the input.
    """
    fingerprints = fingerprints_of(library, known)
    keys = library.index.by_expert() if library.means and library.text_format not in WITHOUT_INPUT else {}
    return copies_among(library.index.experts, fingerprints, library.instances, keys)


def text_of_key(library: "ExpertLibrary", key: int) -> str | None:
    """The training instance behind a key of a library's index; None for a mean."""
    return None if library.means else library.instances[key]["source"]


def faults_of_generality(library: "ExpertLibrary") -> list[str]:
    """What is wrong with what is known of how general a library's experts are, in words."""
    try:
        generality_in(library)
    except InputError as error:
        return [str(error)]
    return []


def own_datasets(card: ExpertCard) -> frozenset[str]:
    """Data sets that an expert was trained on."""
    return frozenset(kin_of(task).dataset for task in card.tasks)


_KEPT: "weakref.WeakKeyDictionary[ExpertLibrary, tuple[RoutedLibrary, bytes | None]]" = (
    weakref.WeakKeyDictionary())
"""What was made of a library, and the file of generality that it was made by."""


def routed_of(library: "ExpertLibrary") -> RoutedLibrary:
    """Keys and data sets of a library's experts, and priors and copies if there are any.

    Copies have the prior of the oldest. It is kept with the library while neither its experts nor what is
    known of them changes: what is fitted on it is then fitted once.
    """
    path = generality_file(library.path)
    said = path.read_bytes() if path.exists() else None
    kept = _KEPT.get(library)
    if kept is None or kept[0].index is not library.index or kept[1] != said:
        kept = _KEPT[library] = _routed_anew(library), said
    return kept[0]


def _routed_anew(library: "ExpertLibrary") -> RoutedLibrary:
    known, experts = generality_in(library), library.index.experts
    copies = copies_in(library, known)
    oldest = experts if copies is None else [experts[place] for place in copies]
    return RoutedLibrary(library.index, known.priors(oldest), copies,
                         tuple(own_datasets(library[name].card) for name in experts),
                         of_means=library.means is not None)
