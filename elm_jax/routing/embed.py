"""Text encoders: routing texts -> unit vectors. Holds TF-IDF, the encoder that needs no weights."""

import dataclasses
import hashlib
import io
import json
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.runtime import npy_files, records, storage
from elm_jax.runtime.config_checks import items_of

logger = logging.getLogger(__name__)
SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class TfidfFacts:
    """Fields of ``tfidf.json``."""

    vocabulary: dict[str, int]
    fingerprint: str


class TextEncoder(Protocol):
    """Interface of encoders, which embed the keys and the queries of a library.

    Attributes:
        name: of the encoder.
        fingerprint: ``sha256:...`` of everything that its embeddings depend on.
        dimension: K.
    """

    name: str
    fingerprint: str
    dimension: int

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts as unit rows f32[N, K]; a text without known parts is a zero row.

        The embedding of a text does not depend on the other texts.
        """
        ...


class TfidfEncoder:
    """scikit-learn TF-IDF and truncated SVD, fitted on the library's own texts.

    ``e(x) = normalise(V^T tfidf(x))``, ``tfidf = (1 + log tf) idf``. Source: Deerwester et al.,
    Indexing by Latent Semantic Analysis (1990), https://scikit-learn.org/stable/modules/lsa.html.
    """

    name = "tfidf-svd"
    max_terms = 20_000

    def __init__(self, vocabulary: dict[str, int], idf: np.ndarray, components: np.ndarray) -> None:
        """Makes an encoder from its vocabulary (term -> column), idf f64[V] and the SVD's f32[K, V]."""
        self.vocabulary, self.components = vocabulary, components.astype(np.float32)
        self.idf = idf.astype(np.float64)
        if self.components.shape[1:] != self.idf.shape or len(vocabulary) != len(self.idf):
            raise ValueError(f"{len(vocabulary)} terms, {self.idf.shape}, {self.components.shape}")
        self.vectorizer = _vectorizer(vocabulary=vocabulary)
        self.vectorizer.idf_ = self.idf
        self.dimension = len(components)
        terms = json.dumps(sorted(vocabulary.items())).encode()
        self.fingerprint = sha256_of(terms, self.idf.tobytes(), self.components.tobytes())

    @classmethod
    def fit(cls, texts: Sequence[str], dimension: int = 128, seed: int = 0) -> "TfidfEncoder":
        """Fits an encoder to texts; texts of a smaller rank give fewer dimensions.

        Raises:
            InputError: fewer than two texts, or no term in any of them.
        """
        from sklearn.decomposition import TruncatedSVD  # late: a second of start-up

        if len(texts) < 2:
            raise InputError(
                describe(
                    "TF-IDF is fitted on texts", got=f"{len(texts)} texts", expected="2 or more"
                )
            )
        vectorizer = _vectorizer(max_features=cls.max_terms)
        try:
            matrix = vectorizer.fit_transform(texts)
        except ValueError as error:
            raise InputError(
                describe("TF-IDF cannot be fitted on these texts", got=str(error))
            ) from error
        svd = TruncatedSVD(min(dimension, *matrix.shape), random_state=seed).fit(matrix)
        # A direction without weight in the texts is noise, which must not decide a search.
        kept = svd.singular_values_ > 1e-6 * svd.singular_values_[0]
        terms = {term: int(column) for term, column in vectorizer.vocabulary_.items()}
        return cls(terms, vectorizer.idf_, svd.components_[kept])

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts as unit rows f32[N, K]; a text without a known term is a zero row."""
        texts = items_of(texts)
        if not len(texts):
            return np.zeros((0, self.dimension), np.float32)
        projected = self.vectorizer.transform(texts) @ self.components.T.astype(np.float64)
        norms = np.linalg.norm(projected, axis=1, keepdims=True)
        known = norms > 1e-9
        if not known.all():
            logger.warning(
                "%d of %d texts share no word with the library", (~known).sum(), len(known)
            )
        return np.where(known, projected / np.where(known, norms, 1.0), 0.0).astype(np.float32)

    def save(self, folder: storage.PathLike) -> None:
        """Writes ``tfidf.npz`` and, last, ``tfidf.json``; no pickle. Inverse of `load`."""
        folder = storage.as_path(folder)
        buffer = io.BytesIO()
        np.savez(buffer, idf=self.idf, components=self.components)
        with storage.guard_writes(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "tfidf.npz").write_bytes(buffer.getvalue())
        storage.write_json(
            folder / "tfidf.json",
            {
                "schema_version": SCHEMA_VERSION,
                "vocabulary": self.vocabulary,
                "fingerprint": self.fingerprint,
            },
        )

    @classmethod
    def load(cls, folder: storage.PathLike) -> "TfidfEncoder":
        """Reads an encoder that `save` wrote; its embeddings are equal bit for bit.

        Raises:
            InputError: a file is missing, unreadable, of another schema, or not the one written.
        """
        folder = storage.as_path(folder)
        facts = records.read_record(
            folder / "tfidf.json", TfidfFacts, kind="TF-IDF encoder", schema_version=SCHEMA_VERSION
        )
        arrays = npy_files.read_npz(folder / "tfidf.npz", ("idf", "components"))
        both = f"{folder}: tfidf.json (vocabulary, fingerprint) and tfidf.npz"
        try:
            encoder = cls(facts["vocabulary"], arrays["idf"], arrays["components"])
        except (ValueError, TypeError) as error:
            raise InputError(
                describe("The TF-IDF encoder cannot be read", where=both, got=str(error)[:200])
            ) from error
        if encoder.fingerprint != facts["fingerprint"]:
            raise InputError(
                describe(
                    "The TF-IDF encoder is not the one that was written",
                    where=both,
                    got=encoder.fingerprint,
                    expected=facts["fingerprint"],
                )
            )
        return encoder


def _vectorizer(**settings: Any) -> Any:
    """scikit-learn's TF-IDF with this encoder's settings; single letters and digits count as words."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # late: a second of start-up

    return TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b", **settings)


def sha256_of(*parts: bytes) -> str:
    """Hash ``sha256:...`` of several byte strings and their lengths."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}|".encode())
        digest.update(part)
    return f"sha256:{digest.hexdigest()}"


def check_encoder(encoder: TextEncoder, name: str, fingerprint: str, where: Any) -> None:
    """Raises InputError unless this encoder made the keys of a library.

    Args:
        encoder: the one to check.
        name: of the one that made the keys.
        fingerprint: of the one that made the keys; this is what decides.
        where: the keys' folder.
    """
    if encoder.fingerprint != fingerprint:
        raise InputError(
            describe(
                "The library's keys were made by another encoder",
                where=where,
                got=f"{encoder.name} {encoder.fingerprint}",
                expected=f"{name} {fingerprint}",
                cure="query with the encoder that made the keys (for MiniLM: set ELM_ENCODER_DIR "
                "to its folder), or build the library again",
            )
        )
