"""The index of a library: its keys, and the experts that own them."""

import dataclasses
import io

import numpy as np

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.routing.embed import TextEncoder, check_encoder
from elm_jax.routing.text import FORMATS
from elm_jax.runtime import npy_files, records, storage, trees

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class IndexFacts:
    """Fields of ``index.json``."""

    experts: list[str]
    encoder: str
    encoder_fingerprint: str
    text_format: str
    digest: str
    instances_per_expert: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class KeyIndex:
    """The keys of a library: N embedded training instances of K dimensions, each owned by one expert.

    Attributes:
        keys: f32[N, K], unit rows (zero for a text of which the encoder knows nothing).
        owners: i32[N], position in `experts` of each key's expert; every expert has a key.
        experts: E ids, in the order in which they were added: the order of the library.
        encoder: name of the encoder that made the keys.
        encoder_fingerprint: of everything its embeddings depend on.
        text_format: of the keys' texts, one of `routing.text.FORMATS`.
        instances_per_expert: S, how many keys an expert was to have; None if that was not fixed.
    """

    keys: np.ndarray
    owners: np.ndarray
    experts: tuple[str, ...]
    encoder: str
    encoder_fingerprint: str
    text_format: str
    instances_per_expert: int | None = None

    def __repr__(self) -> str:
        """Says what it is, without its keys."""
        return (f"KeyIndex({self.keys.shape[0]} keys of {self.keys.shape[1]} dimensions, "
                f"{len(self.experts)} experts, encoder={self.encoder!r})")

    def __post_init__(self) -> None:
        """Raises InputError if the fields do not fit each other."""
        if self.text_format not in FORMATS:
            raise unknown_name("text format", self.text_format, FORMATS)
        check_rows(self.keys, self.keys.shape[-1], "keys")
        number = len(self.experts)
        fits = self.owners.shape == self.keys.shape[:1] and self.owners.dtype == np.int32
        if not fits or not np.array_equal(np.unique(self.owners), np.arange(number)):
            raise InputError(
                describe(
                    "Keys and experts do not fit each other",
                    got=f"{len(self.keys)} keys, {number} experts, owners "
                    f"{self.owners.dtype}{list(self.owners.shape)}",
                    expected="one int32 owner a key, and a key for every expert",
                )
            )
        if len(set(self.experts)) != number:
            raise InputError(describe("The index has an expert twice", got=self.experts))

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def empty(
        cls, encoder: TextEncoder, text_format: str, instances_per_expert: int | None = None
    ) -> "KeyIndex":
        """Makes an index without keys."""
        return cls(
            np.zeros((0, encoder.dimension), np.float32),
            np.zeros(0, np.int32),
            (),
            encoder.name,
            encoder.fingerprint,
            text_format,
            instances_per_expert,
        )

    def add(self, expert: str, keys: np.ndarray) -> "KeyIndex":
        """Returns an index with one more expert, whose keys f32[S, K] follow all others.

        Raises:
            InputError: the expert is in the index already, or has no keys, or they are not unit rows of K.
        """
        if expert in self.experts:
            raise InputError(describe("The index has this expert already", got=expert))
        keys = np.asarray(keys, np.float32)
        check_rows(keys, self.keys.shape[1], expert)
        if not len(keys):
            raise InputError(describe("An expert needs instances for its keys", where=expert))
        owners = np.full(len(keys), len(self.experts), np.int32)
        return dataclasses.replace(
            self,
            keys=np.concatenate([self.keys, keys]),
            owners=np.concatenate([self.owners, owners]),
            experts=(*self.experts, expert),
        )

    def remove(self, expert: str) -> "KeyIndex":
        """Returns an index without one expert and its keys. Inverse of `add` of the last expert."""
        if expert not in self.experts:
            raise unknown_name("expert", expert, self.experts)
        position = self.experts.index(expert)
        kept = self.owners != position
        owners = self.owners[kept]
        return dataclasses.replace(
            self,
            keys=self.keys[kept],
            owners=owners - (owners > position).astype(np.int32),
            experts=self.experts[:position] + self.experts[position + 1 :],
        )

    def count(self, expert: str) -> int:
        """Number of keys of an expert; 0 if it is not in the index."""
        if expert not in self.experts:
            return 0
        return int((self.owners == self.experts.index(expert)).sum())

    def digest(self) -> str:
        """Hash of the keys and their owners."""
        return trees.fingerprint({"keys": self.keys, "owners": self.owners})

    def save(self, folder: storage.PathLike) -> None:
        """Writes ``keys.npz`` and ``index.json``; the caller writes the folder's commit marker."""
        folder = storage.as_path(folder)
        buffer = io.BytesIO()
        np.savez(buffer, keys=self.keys, owners=self.owners)
        with storage.guard_writes(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "keys.npz").write_bytes(buffer.getvalue())
        storage.write_json(
            folder / "index.json",
            {
                "schema_version": SCHEMA_VERSION,
                "experts": list(self.experts),
                "encoder": self.encoder,
                "encoder_fingerprint": self.encoder_fingerprint,
                "text_format": self.text_format,
                "instances_per_expert": self.instances_per_expert,
                "digest": self.digest(),
            },
        )

    @classmethod
    def open(cls, folder: storage.PathLike, encoder: TextEncoder) -> "KeyIndex":
        """Reads an index that `save` wrote, for queries made by `encoder`.

        Raises:
            InputError: the folder is not whole, its files do not belong together, or its keys were
                made by another encoder.
        """
        folder = storage.require_committed(folder, "index of keys")
        facts = records.read_record(
            folder / "index.json", IndexFacts, kind="index of keys", schema_version=SCHEMA_VERSION
        )
        where = f"{folder / 'index.json'}: encoder_fingerprint"
        check_encoder(encoder, facts["encoder"], facts["encoder_fingerprint"], where)
        arrays = npy_files.read_npz(folder / "keys.npz", ("keys", "owners"))
        try:
            index = cls(
                arrays["keys"],
                arrays["owners"],
                tuple(facts["experts"]),
                facts["encoder"],
                facts["encoder_fingerprint"],
                facts["text_format"],
                facts.get("instances_per_expert"),
            )
        except InputError as error:
            raise InputError(
                describe(
                    "The keys cannot be read",
                    where=f"{folder}: index.json (experts, text_format) and keys.npz",
                    got=error,
                    cure="build the library again",
                )
            ) from error
        if index.digest() != facts["digest"]:
            raise InputError(
                describe(
                    "The keys are not those that were written",
                    where=f"{folder}: index.json (digest) and keys.npz",
                    got=index.digest(),
                    expected=facts["digest"],
                    cure="build the library again",
                )
            )
        return index


def check_rows(rows: np.ndarray, dimension: int, where: str) -> None:
    """Raises InputError unless rows are f32[n, K], each of unit length or zero."""
    if rows.ndim != 2 or rows.shape[1] != dimension or rows.dtype != np.float32:
        raise InputError(
            describe(
                "Embeddings have the wrong shape",
                where=where,
                got=f"{rows.dtype}{list(rows.shape)}",
                expected=f"float32[n, {dimension}]",
            )
        )
    norms = np.linalg.norm(rows, axis=1)
    wrong = np.flatnonzero(~((np.abs(norms - 1) < 1e-3) | (norms == 0)))
    if len(wrong):
        raise InputError(
            describe(
                "An embedding is not of unit length",
                where=f"{where}, row {wrong[0]}",
                got=f"length {norms[wrong[0]]}",
                expected="1, or 0 for a text of which nothing is known",
            )
        )
