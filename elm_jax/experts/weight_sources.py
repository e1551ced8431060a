"""Sources of a conversion: a whole model, or an expert together with its base."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from elm_jax.errors import InputError, describe
from elm_jax.experts import hf_adapters, original_files, peft_adapters
from elm_jax.experts.card import ExpertCard, read_stored
from elm_jax.experts.overlay import Expert, load_expert
from elm_jax.formats import detect, places, tree_checks
from elm_jax.formats.elm import elm_folders
from elm_jax.formats.hf import folder_files, t5_models
from elm_jax.formats.model import Model, Origin, TensorSpec
from elm_jax.formats.peft import adapter_files
from elm_jax.formats.tensors import streaming
from elm_jax.formats.tensors.hashed import HashedTensors
from elm_jax.models import families
from elm_jax.runtime import storage, trees


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of weights: a model, or a prompt expert and its base.

    Attributes:
        where: the folder that was named.
        model: the model; with `expert`, the one that its overlay goes onto.
        expert: a prompt expert: adapters and perhaps norms.
        expert_origins: where each leaf of the expert comes from.
        card: of a full expert, whose leaves are the model's.
    """

    where: str
    model: Model
    expert: Expert | None = None
    expert_origins: Mapping[str, Origin] = dataclasses.field(default_factory=dict)
    card: ExpertCard | None = None

    def leaves(self) -> dict[str, tuple[TensorSpec, Origin]]:
        """Shape, dtype and origin of every leaf of the model (with an expert: of its base)."""
        tensors = self.model.tensors
        leaves = {path: (spec, tensors.origins[path]) for path, spec in tensors.specs.items()}
        if self.expert is not None:
            own = streaming.ArrayTensors(self.expert.overlay).specs
            leaves |= {path: (spec, self.expert_origins[path]) for path, spec in own.items()}
        return dict(sorted(leaves.items()))

    def named(self, expert_id: str) -> "Source":
        """The same source with the expert under another id."""
        if self.expert is not None:
            card = dataclasses.replace(self.expert.card, id=expert_id)
            return dataclasses.replace(self, expert=dataclasses.replace(self.expert, card=card))
        card = dataclasses.replace(self.card, id=expert_id)
        return dataclasses.replace(self, model=of_card(self.model, card), card=card)

    def facts(self) -> dict[str, Any]:
        """The facts that a report keeps of the source."""
        card = self.card if self.expert is None else self.expert.card
        named = {} if card is None else {"expert": card.id}
        return {"path": self.where, **named}


def open_source(kind: str, name: storage.PathLike, *, base: storage.PathLike | None = None,
                vocabulary: storage.PathLike | None = None, scanned: bool | None = None,
                experts_per_token: int | None = None) -> Source:
    """Opens a folder of a given kind as a source of weights.

    Args:
        kind: of the folder, one of `workflows.choices.FOLDER_KINDS`.
        name: the folder, or for ``hf`` a hub name.
        base: folder of an expert's base, of any kind; None for the one that the expert's card names.
        vocabulary: file of a vocabulary (`Vocabulary.load`) for a model that carries none.
        scanned: whether a T5X checkpoint must stack its layers; None takes either.
        experts_per_token: of a T5X checkpoint with experts; None takes what its gin config says, or 1.

    Raises:
        InputError: the folder is of another kind; a reader finds a fault; an expert's base is not found, or
            is another one; the vocabulary does not fit.
    """
    if kind == "gguf" and not places.is_on_hub(name) and not storage.as_path(name).exists():
        raise places.no_file(name)  # the hub's models are folders
    folder = places.locate(name)
    if kind == "elm" and expert_folder(folder) is not None:
        source = _open_expert(expert_folder(folder), base)
    elif kind == adapter_files.KIND:
        source = _open_peft(folder, base)
    elif kind == "hf" and original_files.is_original(folder):
        under = needed_base(folder, base, None)
        source = Source(str(folder), under, *original_files.read_original(folder, under.config,
                                                                          reference(under)))
    else:
        how = {"scanned": scanned, "experts_per_token": experts_per_token} if kind == "t5x" else {}
        source = _open_model(kind, folder, base, how)
    return _with_vocabulary(source, vocabulary)


def expert_folder(folder: epath.Path) -> epath.Path | None:
    """Folder of an expert's card: this one, or the ``expert`` of a finished run; None if it has neither."""
    for place in (folder, folder / "expert"):
        if (place / places.EXPERT_FILE).exists():
            return place
    return None


def _open_model(kind: str, folder: epath.Path, base: storage.PathLike | None,
                how: Mapping[str, Any]) -> Source:
    is_kind, open_kind = detect.KINDS[kind]
    if not is_kind(folder):
        raise _of_another_kind(kind, folder)
    if kind == "hf" and hf_adapters.is_with_adapters(folder):
        expert = hf_adapters.read_hf_expert(folder)
        if base is not None:
            _check_base(expert.card, needed_base(folder, base, None))
        names = t5_models.leaf_names(families.config_of(expert.card.network))
        origins = {path: Origin(*names[path]) for path in trees.flatten(expert.overlay)}
        return Source(str(folder), open_kind(folder), expert, origins)
    return Source(str(folder), open_kind(folder, **how))


_SIGNS = {"elm": "base.json, or an expert's expert.json", "hf": "config.json beside weights",
          "t5x": "a checkpoint, its folder or its file", "gguf": "a file that ends in .gguf",
          adapter_files.KIND: adapter_files.CONFIG_FILE}
"""What a source of each kind has."""


def _of_another_kind(kind: str, folder: epath.Path) -> InputError:
    found = [name for name, (fits, _) in detect.KINDS.items() if fits(folder)]
    adapter = [adapter_files.KIND] if adapter_files.is_peft(folder) else []
    got = [*found, *("an adapter of PEFT" for _ in adapter)]
    return InputError(describe(
        f"The source is no {kind} folder", where=folder, got=" or ".join(got) or "none of any kind",
        expected=None if got else _SIGNS[kind],
        cure=f"--from {(found + adapter)[0]}" if got else None))


def _open_peft(folder: epath.Path, base: storage.PathLike | None) -> Source:
    """Opens a PEFT adapter with its base: the given one, else the folder that the adapter names."""
    if not adapter_files.is_peft(folder):
        raise _of_another_kind(adapter_files.KIND, folder)
    under = needed_base(folder, base, adapter_files.recorded_base(folder))
    expert, origins = peft_adapters.read_peft(folder, under.config, reference(under),
                                              peft_adapters.names_of(under))
    return Source(str(folder), under, expert, origins)


def _open_expert(folder: epath.Path, base: storage.PathLike | None) -> Source:
    """Opens a prompt expert with its base, or a full expert as a model."""
    storage.require_committed(folder, "expert")
    card, written = read_stored(folder / places.EXPERT_FILE)
    under = needed_base(folder, base, card.base.get("path"))
    _check_base(card, under)
    if card.form == "adapter":
        expert = load_expert(folder)
        return Source(str(folder), under, expert,
                      {path: Origin(path) for path in trees.flatten(expert.overlay)})
    return Source(str(folder), of_card(full_model(folder, card, str(written), under), card), card=card)


def full_model(folder: epath.Path, card: ExpertCard, written: str, under: Model) -> Model:
    """Opens the weights of a full expert as a model; its leaves are not read.

    Args:
        folder: of the expert's card.
        card: of a full expert of that base.
        written: fingerprint of its overlay.
        under: its base, which gives vocabulary and facts.

    Raises:
        InputError: leaves do not fit the card's network.
    """
    tensors = elm_folders.ElmTensors(folder / elm_folders.WEIGHTS)
    config = families.config_of(card.network, folder / places.EXPERT_FILE)
    elm_folders.check_fits(tensors, config, folder)
    place = f"{folder}, overlay_fingerprint in {places.EXPERT_FILE}"
    hashed = HashedTensors(tensors, written, place, "The expert's weights are not those that were written",
                           "copy or train the expert again", as_float32=False)
    return dataclasses.replace(
        under, kind="elm", where=str(folder), config=config, tensors=hashed, check=hashed.check)


def of_card(model: Model, card: ExpertCard) -> Model:
    """The model, marked as the full expert of this card."""
    return dataclasses.replace(
        model, facts={**model.facts, elm_folders.FACTS: {"training": {"expert": card.to_dict()}}})


def needed_base(where: storage.PathLike, base: storage.PathLike | None, recorded: str | None) -> Model:
    """Path of an expert's base: the given one, else the one that the card names.

    Raises:
        InputError: there is none, or what is there holds an expert's adapters.
    """
    if base is None and recorded is not None:
        there = places.is_on_hub(recorded) or storage.as_path(recorded).exists()
        base = recorded if there else None
    if base is None:
        raise InputError(describe("The expert's base is needed", where=where,
                                  got="no --base" + (f", and none at {recorded}" if recorded else ""),
                                  cure="give the folder of the base with --base"))
    under = detect.open_model(base)
    tree_checks.check_base(under.config, under.where)
    return under


def reference(base: Model) -> dict[str, str]:
    """The entry that an expert's card keeps of its base (see `base.Base.reference`)."""
    return {"name": base.name, "fingerprint": fingerprint_of(base), "path": base.address}


def fingerprint_of(model: Model) -> str:
    """The fingerprint that a folder records, else the one computed from its leaves, one at a time."""
    return model.facts.get(elm_folders.FACTS, {}).get("fingerprint") or streaming.fingerprint(model.tensors)


def _check_base(card: ExpertCard, under: Model) -> None:
    found = fingerprint_of(under)
    if found != card.base["fingerprint"]:
        raise InputError(describe("The expert belongs to another base", where=card.id,
                                  got=f"{under.where} {found}",
                                  expected=f"{card.base.get('name')} {card.base['fingerprint']}",
                                  cure="give the base that this expert was trained on"))


def _with_vocabulary(source: Source, path: storage.PathLike | None) -> Source:
    if path is None:
        return source
    path = storage.as_path(path)
    if not path.exists():
        raise InputError(describe("There is no vocabulary here", where=path,
                                  got=storage.what_is_there(path), cure="check the path"))
    contents = storage.read_bytes(path)
    tree_checks.check_vocabulary(contents, source.model.config, path)
    facts = dict(source.model.facts)
    if contents != source.model.vocabulary and folder_files.FACTS in facts:
        facts[folder_files.FACTS] = folder_files.without_tokenizer(facts[folder_files.FACTS])
    return dataclasses.replace(source, model=dataclasses.replace(
        source.model, vocabulary=contents, facts=facts))
