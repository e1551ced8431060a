"""Expert cards: what an expert is, how it was made, and which base it fits."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from elm_jax.data.arrays.prepared import PLAIN, RENDERINGS
from elm_jax.errors import InputError, describe, in_short
from elm_jax.runtime import records, storage
from elm_jax.runtime.storage import utc_now

SCHEMA_VERSION = 1
KINDS = ("prompt", "dataset", "multitask", "merged")
FORMS = ("adapter", "full")
_LISTS = ("tasks", "templates", "template_digests", "template_versions", "parents", "merging")
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")


@dataclasses.dataclass(frozen=True)
class ExpertCard:
    """The facts that are stored with an expert.

    Attributes:
        id: name of the expert, unique in a library.
        kind: ``prompt`` (adapters and norms of one task), ``dataset`` (all leaves, all prompts of one
            dataset), ``multitask`` (all leaves, all training tasks) or ``merged``.
        form: ``adapter`` if the overlay is adapters (and norms), ``full`` if it is every leaf. Only
            overlays of one form can be merged.
        base: ``{'name', 'fingerprint'}`` of the base that the overlay fits, and perhaps the ``path`` from
            which it was read.
        network: the network's config as a plain dictionary, adapters included.
        tasks: names of the tasks that it was trained on.
        templates: the templates' own names, one a task, as promptsource spells them.
        template_digests: hashes of the templates' texts, one a task; empty if they are not known.
        template_versions: the versions that these texts are of, one a task: of promptsource, of elm_jax,
            ``unknown`` for a text that is no known version's, empty where none is pinned.
        training: steps, examples, seed, config digest.
        metrics: figures measured after training, by name.
        parents: for a merged expert ``[{'id', 'kind', 'weight', 'fingerprint'}]``, else empty;
            a weight that differs by leaf is None.
        method: the merging method, else None.
        merging: for a merged expert its settings: ``[{'method', 'weights', ..., 'leaves'}]``.
        rendering: how its inputs were rendered while it was trained, one of `prepared.RENDERINGS`.
        created: UTC time, ISO 8601.
    """

    id: str
    kind: str
    form: str
    base: dict[str, str]
    network: dict[str, Any]
    tasks: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    template_digests: tuple[str, ...] = ()
    template_versions: tuple[str, ...] = ()
    dataset: str | None = None
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    parents: tuple[dict[str, Any], ...] = ()
    method: str | None = None
    merging: tuple[dict[str, Any], ...] = ()
    rendering: str = PLAIN
    created: str = dataclasses.field(default_factory=lambda: utc_now())

    def __post_init__(self) -> None:
        for name in _LISTS:
            if not isinstance(getattr(self, name), list | tuple):
                raise self._wrong(name, "a list")
        for name in ("network", "training", "metrics"):
            if not isinstance(getattr(self, name), dict):
                raise self._wrong(name, "an object")
        for name in _LISTS:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.id, str) or not _ID.fullmatch(self.id):
            raise InputError(describe("An expert's id becomes a folder's name", got=repr(self.id),
                                      expected="letters, digits and _ . + - only, the first a letter, "
                                               "a digit or _, at most 200"))
        if self.kind not in KINDS:
            raise InputError(describe("Unknown kind of expert", where=self.id, got=in_short(self.kind),
                                      expected=KINDS))
        if self.form not in FORMS:
            raise InputError(describe("Unknown form of overlay", where=self.id, got=in_short(self.form),
                                      expected=FORMS))
        if self.rendering not in RENDERINGS:
            raise InputError(describe("Unknown rendering of inputs", where=self.id, got=self.rendering,
                                      expected=RENDERINGS))
        if (not isinstance(self.base, dict) or "fingerprint" not in self.base
                or not all(isinstance(value, str) for value in self.base.values())):
            raise InputError(describe("The card names no base", where=self.id, got=self.base,
                                      expected="{'name': ..., 'fingerprint': 'sha256:...'}"))

    def _wrong(self, name: str, expected: str) -> InputError:
        return InputError(describe("The expert's card is not valid", where=f"{self.id!r}, {name}"[:200],
                                   got=repr(getattr(self, name))[:200], expected=expected))

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form that ``expert.json`` stores."""
        fields = dataclasses.asdict(self)
        for name in _LISTS:
            fields[name] = list(fields[name])
        if self.rendering == PLAIN:
            del fields["rendering"]  # as cards were before there was another
        return {"schema_version": SCHEMA_VERSION, **fields}

    @classmethod
    def from_dict(cls, value: dict[str, Any], where: Any = None) -> "ExpertCard":
        """Inverse of `to_dict`.

        Raises:
            InputError: a field is missing or unknown (all are named).
        """
        value = {name: field for name, field in value.items() if name != "schema_version"}
        known = {field.name for field in dataclasses.fields(cls)}
        required = {"id", "kind", "form", "base", "network"}
        missing, unknown = sorted(required - value.keys()), sorted(value.keys() - known)
        if missing or unknown:
            raise InputError(
                describe("The expert's card is not valid", where=where,
                         got=f"missing {missing}, unknown {unknown}", expected=sorted(known))
            )
        for schema in (cls, StoredParts):
            records.check_record(value, schema, kind="expert's card", where=where)
        try:
            return cls(**value)
        except InputError as error:
            raise InputError(describe("The expert's card is not valid", where=where,
                                      got=str(error))) from error


@dataclasses.dataclass(frozen=True)
class StoredTraining:
    """What is read again of a card's training, beside what else stands there."""

    steps: int = 0
    config_digest: str | None = None
    settings: dict[str, Any] | None = None
    rows: dict[str, str | None] = dataclasses.field(default_factory=dict)
    weight_search: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class StoredParent:
    """What is read again of a merged expert's parents."""

    id: str
    kind: str


@dataclasses.dataclass(frozen=True)
class StoredParts:
    """The objects inside of a card."""

    training: StoredTraining = dataclasses.field(default_factory=StoredTraining)
    parents: list[StoredParent] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class StoredCard:
    """What stands in an expert's file beside the card."""

    overlay_fingerprint: str | None = None


def base_folder(cards: Iterable[ExpertCard], given: storage.PathLike | None = None) -> storage.PathLike:
    """The folder of the base of some experts: the given one, or the one that their cards name.

    Raises:
        InputError: none is given, and the cards name none.
    """
    folder = given or next((card.base.get("path") for card in cards), None)
    if folder is None:
        raise InputError(describe("The base of the experts is not known", expected="a base",
                                  got="cards that name no folder of one", cure="give it: --base DIR"))
    return folder


def read_stored(path: storage.PathLike) -> tuple[ExpertCard, str | None]:
    """Reads the card in an expert's folder, and the fingerprint of its weights.

    Raises:
        InputError: the file is missing, or a field of it is missing or wrong.
    """
    values = records.read_record(path, StoredCard, kind="expert's card", schema_version=SCHEMA_VERSION)
    written = values.pop("overlay_fingerprint", None)
    return ExpertCard.from_dict(values, where=path), written
