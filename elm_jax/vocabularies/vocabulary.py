"""Vocabularies without TensorFlow: SentencePiece models, bytes, Hugging Face's tokenizer.json.

A vocabulary has a padding id and an EOS id; `check_ids` compares them with those that a network needs.
The contents of a file determine its kind, whatever its name:

- a SentencePiece model (``vocabulary.model``). Unknown is 2; behind the trained pieces stand the extra ids
  (sentinels) in reverse order: sentinel 0 is the last id. Equal to
  ``seqio.SentencePieceVocabulary(path, extra_ids)``. T5's file leaves the sentinels out and they are added
  here; mT5's holds them itself, as its last 100 pieces.
- bytes (``vocabulary.json``: ``{"schema_version": 1, "kind": "bytes", "extra_ids": 125}``), as ByT5's.
- a ``tokenizer.json`` of Hugging Face's tokenizers, whose ids must be as the program needs them; where names
  of tokens do not tell padding and EOS, the file begins with their ids (`tokenizer_json.with_ids`).
"""

import abc
import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from elm_jax.errors import InputError, describe
from elm_jax.runtime import leftovers, storage
from elm_jax.vocabularies import tokenizer_json

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
"""Ids in byte vocabularies and in those that are trained here, equal to T5's."""
EXTRA_IDS = 100
"""T5's number of sentinels."""
BYTE_EXTRA_IDS, MOST_EXTRA_IDS = 125, 10_000
"""ByT5's number of ids behind the bytes, and the most that a description may ask for."""
SCHEMA_VERSION = 1
"""Version of the file that describes a byte vocabulary."""
_NUM_SPECIAL = 3
_TRAINING_THREADS = 4
"""Fixed, because the order of sums, and so the pieces, depend on it."""


class Vocabulary(abc.ABC):
    """Interface of vocabularies: text to token ids and back.

    Attributes:
        FILE: name of the file as which a base keeps a vocabulary of the kind.
        contents: of that file.
        extra_ids: number of sentinels.
        size: number of ids, sentinels included; one more than the largest.
        pad_id: id of padding.
        eos_id: id that ends a text.
        unk_id: id of the unknown token; None if the vocabulary can encode every text.
        target_prefix: stands between a prompt and its target where both are one text: a space for decoders'
            vocabularies that do not put one in front of every text themselves.
        fingerprint: ``sha256:...`` of the contents and of the number of sentinels added to them.
    """

    FILE: ClassVar[str]
    contents: bytes
    extra_ids: int
    size: int
    pad_id: int
    eos_id: int
    unk_id: int | None
    target_prefix: str = ""
    fingerprint: str

    @staticmethod
    def from_bytes(contents: bytes, where: Any = "bytes") -> "Vocabulary":
        """Makes a vocabulary of any kind from a file's contents.

        Args:
            contents: of the file.
            where: name of the file, for errors.

        Raises:
            InputError: they are of no known kind, damaged, or without padding or EOS.
        """
        if not contents.startswith(b"{"):  # no SentencePiece model does
            return SentencePieceVocabulary(contents, where=where)
        values = tokenizer_json.parse(contents, where)
        if "kind" in values:
            return ByteVocabulary(_extra_ids_of(values, where))
        return TokenizerVocabulary(contents, where)

    @staticmethod
    def load(path: storage.PathLike) -> "Vocabulary":
        """Reads a vocabulary's file, local or in a bucket.

        Raises:
            InputError: there is no such file, or it does not hold a fitting vocabulary.
        """
        path = storage.as_path(path)
        if not path.exists():
            raise InputError(describe("There is no vocabulary here", where=path,
                                  got=storage.what_is_there(path), cure="check the path"))
        return Vocabulary.from_bytes(storage.read_bytes(path), path)

    def check_ids(self, pad_id: int, eos_id: int, where: Any = "bytes") -> None:
        """Checks that padding and EOS have the ids that a network needs; nothing is renumbered.

        Args:
            pad_id: of the network's config.
            eos_id: likewise.
            where: name of the vocabulary's file, for the error.

        Raises:
            InputError: the ids differ.
        """
        if (self.pad_id, self.eos_id) != (pad_id, eos_id):
            raise InputError(describe(
                "The vocabulary's special ids are not those that the network needs", where=where,
                got=f"padding = {self.pad_id}, EOS = {self.eos_id}",
                expected=f"padding = {pad_id}, EOS = {eos_id}",
                cure="give the vocabulary that the model was trained with; ids are not renumbered, for the "
                "embedding's rows have their order"))

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Encodes a text as token ids, without EOS."""

    def encode_target(self, text: str) -> list[int]:
        """Encodes a target or a choice as token ids, without EOS: the text with `target_prefix` in front."""
        return self.encode(self.target_prefix + text)

    def decode_target(self, ids: Sequence[int]) -> str:
        """Decodes a generated target as `decode` does, and takes `target_prefix` off its front."""
        return self.decode(ids).removeprefix(self.target_prefix)

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes token ids up to the first EOS; ids outside the vocabulary count as unknown."""
        ids = [int(token) for token in ids]
        return self._decode(ids[:ids.index(self.eos_id)] if self.eos_id in ids else ids)

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Decodes token ids without EOS."""

    def sentinel_id(self, number: int) -> int:
        """Returns the id of sentinel `number`.

        Raises:
            InputError: the vocabulary has no such sentinel.
        """
        if not 0 <= number < self.extra_ids:
            raise InputError(describe(
                "There is no such sentinel", got=number,
                expected=f"0 to {self.extra_ids - 1}" if self.extra_ids else "none: the vocabulary has none"))
        return self._sentinel_id(number)

    def _sentinel_id(self, number: int) -> int:
        """Id of a sentinel as T5 counts: sentinel 0 is the vocabulary's last id."""
        return self.size - 1 - number

    def facts(self) -> dict[str, Any]:
        """What a reader can tell vocabularies apart by, JSON-ready: kind, number of ids, special ids."""
        return {"kind": type(self).__name__, "ids": self.size, "padding": self.pad_id, "EOS": self.eos_id,
                "unknown": self.unk_id, "sentinels": self.extra_ids}

    def file(self) -> str:
        """Path of a temporary file that holds the vocabulary, for SeqIO; it lives as long as this process."""
        path = os.path.join(leftovers.process_folder(), self.fingerprint[-16:], self.FILE)
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(self.contents)
        return path


class SentencePieceVocabulary(Vocabulary):
    """A vocabulary of a SentencePiece model's pieces and T5's sentinels.

    Attributes:
        added_ids: how many of the sentinels are not in the file: 0 for mT5, else all.
        is_unigram: whether a text is cut into its likeliest pieces, and not by BPE or otherwise.
    """

    FILE = "vocabulary.model"

    def __init__(self, contents: bytes, extra_ids: int | None = None, where: Any = "bytes"):
        """Builds a vocabulary from a serialized SentencePiece model.

        Args:
            contents: of a ``.model`` file.
            extra_ids: number of sentinels to put behind its pieces; None for T5's 100, unless the file
                ends with sentinels of its own.
            where: name of the file, for errors.

        Raises:
            InputError: not a SentencePiece model, or one without padding, EOS or unknown.
        """
        model = sentencepiece_model_pb2.ModelProto()
        try:
            model.ParseFromString(contents)
        except Exception as error:  # protobuf's DecodeError lies in a package that may be absent
            raise InputError(
                describe("Not a SentencePiece model", where=where, got=error)) from error
        if not model.pieces:
            raise InputError(describe("Not a SentencePiece model", where=where, got="no pieces"))
        if not all(isinstance(piece.piece, str) for piece in model.pieces):  # protobuf gives bytes for these
            raise InputError(describe("Not a SentencePiece model", where=where,
                                      got="a piece that is no UTF-8"))
        own = own_sentinels([piece.piece for piece in model.pieces])
        if extra_ids is None:
            extra_ids = 0 if own else EXTRA_IDS
        for number in reversed(range(extra_ids)):
            model.pieces.add(piece=f"▁{sentinel(number)}", score=0.0,
                             type=sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model.SerializeToString())
        except (RuntimeError, ValueError) as error:
            raise InputError(describe("The vocabulary is damaged", where=where,
                                      got=str(error)[:200])) from error
        found = (self._processor.pad_id(), self._processor.eos_id(), self._processor.unk_id())
        if min(found) < 0:
            raise InputError(describe("The vocabulary lacks a special id", where=where,
                                      got=f"padding, EOS, unknown = {found}", expected="an id for each"))
        self.contents = contents
        self.pad_id, self.eos_id, self.unk_id = found
        self.added_ids = extra_ids
        self.is_unigram = model.trainer_spec.model_type == model.trainer_spec.UNIGRAM
        self.extra_ids = extra_ids or own
        self.size = self._processor.GetPieceSize()
        digest = hashlib.sha256(contents + b"\0extra_ids=%d" % extra_ids)
        self.fingerprint = f"sha256:{digest.hexdigest()}"

    def encode(self, text: str) -> list[int]:
        """Encodes a text as token ids, without EOS."""
        return self._processor.EncodeAsIds(text)

    def piece(self, number: int) -> str:
        """Returns the piece of an id as the model writes it, spaces as ``▁``."""
        return self._processor.IdToPiece(number)

    def is_special(self, number: int) -> bool:
        """Whether an id is unknown or a control token, which no text becomes."""
        return self._processor.IsUnknown(number) or self._processor.IsControl(number)

    def score(self, number: int) -> float:
        """Returns the score of an id's piece."""
        return self._processor.GetScore(number)

    def _decode(self, ids: list[int]) -> str:
        return self._processor.DecodeIds([token if token < self.size else self.unk_id for token in ids])


class ByteVocabulary(Vocabulary):
    """A vocabulary of bytes: UTF-8 bytes plus 3, then the sentinels. It encodes every text.

    Equal to ``seqio.ByteVocabulary(extra_ids)``, and to transformers' ByT5Tokenizer but for texts that hold
    the names of special tokens, which are bytes like all others here. Sentinels count down from the last id,
    as SeqIO's preprocessors count; ByT5Tokenizer's names for them count up. Source: Xue et al. 2022,
    https://arxiv.org/abs/2105.13626, section 3.1.
    """

    FILE = "vocabulary.json"

    def __init__(self, extra_ids: int = BYTE_EXTRA_IDS):
        """Makes the vocabulary of `extra_ids` ids behind the bytes."""
        self.extra_ids = extra_ids
        self.size = _NUM_SPECIAL + 256 + extra_ids
        self.pad_id, self.eos_id = PAD_ID, EOS_ID
        self.unk_id = UNK_ID  # which occurs in no text; ids that are no bytes decode to it
        described = {"schema_version": SCHEMA_VERSION, "kind": "bytes", "extra_ids": extra_ids}
        self.contents = (json.dumps(described) + "\n").encode()
        self.fingerprint = f"sha256:{hashlib.sha256(b'bytes, extra_ids=%d' % extra_ids).hexdigest()}"

    def encode(self, text: str) -> list[int]:
        """Encodes a text as token ids, without EOS."""
        return [byte + _NUM_SPECIAL for byte in text.encode()]

    def _decode(self, ids: list[int]) -> str:
        """Decodes bytes; drops ids that are no bytes, and bytes that are no UTF-8, as SeqIO does."""
        kept = bytes(token - _NUM_SPECIAL for token in ids if 0 <= token - _NUM_SPECIAL < 256)
        return kept.decode(errors="ignore")


class TokenizerVocabulary(Vocabulary):
    """A vocabulary of a ``tokenizer.json``: ids as Hugging Face's fast tokenizers give, without EOS or frame.

    Names of special tokens in a text become these tokens, as with Hugging Face. Sentinels are the tokens
    ``<extra_id_0>``, ``<extra_id_1>`` and so on, whatever their ids; a file without them has none.
    """

    FILE = "tokenizer.json"

    def __init__(self, contents: bytes, where: Any = "bytes"):
        """Builds a vocabulary from the contents of a ``tokenizer.json``.

        Args:
            contents: of the file.
            where: its name, for errors.

        Raises:
            InputError: the library cannot read it; padding or EOS has no name that is known.
        """
        self._tokenizer = tokenizer_json.open_tokenizer(tokenizer_json.plain(contents), where)
        self.contents = contents
        told = tokenizer_json.told_ids(contents)
        self.pad_id, self.eos_id = told or tokenizer_json.special_ids(self._tokenizer, where)
        self._are_told = told is not None
        # A file that tells its ids is a decoder's: prompt and target are one text, words have spaces between.
        if self._are_told and not tokenizer_json.begins_with_space(self._tokenizer):
            self.target_prefix = " "
        self.unk_id = tokenizer_json.unknown_id(self._tokenizer, tokenizer_json.parse(contents, where))
        self.size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        if max(self.pad_id, self.eos_id) >= self.size:
            raise InputError(describe("The vocabulary has no such special ids", where=where,
                                      got=f"padding = {self.pad_id}, EOS = {self.eos_id}",
                                      expected=f"ids below {self.size}",
                                      cure="fetch or write the file again"))
        self._sentinels = tokenizer_json.numbered(self._tokenizer, sentinel)
        self.extra_ids = len(self._sentinels)
        self.fingerprint = f"sha256:{hashlib.sha256(contents).hexdigest()}"

    def check_ids(self, pad_id: int, eos_id: int, where: Any = "bytes") -> None:
        """Checks ids as `Vocabulary.check_ids` does, for any token of a fitting name; the error lists all."""
        if self._are_told:
            super().check_ids(pad_id, eos_id, where)
            return
        tokenizer_json.check_special_ids(self._tokenizer, {"padding": pad_id, "EOS": eos_id}, where)

    def encode(self, text: str) -> list[int]:
        """Encodes a text as token ids, without EOS or any other frame."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int]) -> str:
        """Decodes token ids without special tokens."""
        known = [token for token in ids if token != self.pad_id and token < self.size]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def _sentinel_id(self, number: int) -> int:
        return self._sentinels[number]

    def id_of(self, token: str) -> int | None:
        """Returns a token's id; None if there is no such token."""
        return self._tokenizer.token_to_id(token)

    def special_tokens(self) -> dict[str, str]:
        """Names of padding, EOS and, if there is one, unknown, under Hugging Face's keys."""
        numbers = {"pad_token": self.pad_id, "eos_token": self.eos_id, "unk_token": self.unk_id}
        return {word: self._tokenizer.id_to_token(number)
                for word, number in numbers.items() if number is not None}


def _extra_ids_of(values: dict[str, Any], where: Any) -> int:
    """Number of extra ids in the description of a byte vocabulary, checked."""
    found = {name: values.get(name) for name in ("schema_version", "kind", "extra_ids")}
    number = found["extra_ids"]
    if found["schema_version"] != SCHEMA_VERSION or found["kind"] != "bytes" or (
            type(number) is not int or not 0 <= number <= MOST_EXTRA_IDS):
        raise InputError(describe(
            "The vocabulary's description is wrong", where=where, got=repr(found)[:200],
            expected=f"schema_version {SCHEMA_VERSION}, kind 'bytes', extra_ids from 0 to {MOST_EXTRA_IDS}"))
    return number


def sentinel(number: int) -> str:
    """Name of a sentinel as T5 writes it: ``<extra_id_N>``."""
    return f"<extra_id_{number}>"


def own_sentinels(pieces: Sequence[str]) -> int:
    """Number of sentinels at the end of the pieces, of which the last must be sentinel 0."""
    count = 0
    while count < len(pieces) and pieces[-1 - count].removeprefix("▁") == sentinel(count):
        count += 1
    return count


def train_vocabulary(
    texts: Iterable[str],
    output_path: storage.PathLike,
    vocab_size: int,
    seed: int,
    *,
    character_coverage: float = 0.9995,
) -> Vocabulary:
    """Trains a vocabulary as `trained_contents` does, and writes its file."""
    contents = trained_contents(texts, output_path, vocab_size, seed, character_coverage=character_coverage)
    output_path = storage.as_path(output_path)
    with storage.guard_writes(output_path):
        output_path.parent.mkdir(parents=True, exist_ok=True)
        output_path.write_bytes(contents)
    return Vocabulary.load(output_path)


def trained_contents(
    texts: Iterable[str],
    where: storage.PathLike,
    vocab_size: int,
    seed: int,
    *,
    character_coverage: float = 0.9995,
) -> bytes:
    """Trains a unigram SentencePiece model with T5's special ids; deterministic.

    Args:
        texts: passages; each line of each is one sentence to the trainer.
        where: the file that it is for, for the error.
        vocab_size: number of trained pieces, special ids included, sentinels not.
        seed: of the trainer's random generator.
        character_coverage: share of the characters that must get a piece; the others are unknown.

    Returns:
        The contents of its file; with T5's sentinels the vocabulary has `vocab_size` + 100 ids.

    Raises:
        InputError: the texts are too few for so many pieces.
    """
    sentences = (line.strip() for text in texts for line in text.split("\n"))
    buffer = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(sentence for sentence in sentences if sentence),
            model_writer=buffer,
            vocab_size=vocab_size,
            model_type="unigram",
            pad_id=PAD_ID, eos_id=EOS_ID, unk_id=UNK_ID, bos_id=-1,
            byte_fallback=False,
            character_coverage=character_coverage,
            max_sentence_length=1 << 20,  # bytes; the trainer silently skips longer ones
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise InputError(describe("The vocabulary cannot be trained", where=where, got=error,
                                  expected=f"texts that yield {vocab_size} pieces",
                                  cure="give more text or ask for fewer pieces")) from error
    return buffer.getvalue()
