"""Vocabularies of Hugging Face folders: ``spiece.model``, ``tokenizer.json``, or ByT5's bytes.

A ``tokenizer.json`` of a T5 is a SentencePiece model in other words: pieces with their scores and the
normaliser's compiled character map. The two programs choose the same pieces unless two ways to cut
a text score the same to the last digits (SentencePiece adds up in float32, tokenizers in float64), and
Hugging Face's also reads ``</s>`` and its like in a text as special tokens. A SentencePiece
model is written as both files, if both give the same ids (`sentencepiece_json`); a ``tokenizer.json`` that
SentencePiece cannot represent (BPE, WordPiece, other normalisers), and one with tokens that were added, is
the vocabulary as it is.
"""

import base64
import dataclasses
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from sentencepiece import sentencepiece_model_pb2

from elm_jax.errors import InputError, describe
from elm_jax.runtime import storage
from elm_jax.vocabularies.sentencepiece_json import (
    PLAIN_NAMES,
    AddedEntry,
    first_difference,
    sample_texts,
    special_names,
    to_tokenizer_json,
)
from elm_jax.vocabularies.tokenizer_json import open_tokenizer, plain
from elm_jax.vocabularies.vocabulary import (
    BYTE_EXTRA_IDS,
    EOS_ID,
    EXTRA_IDS,
    MOST_EXTRA_IDS,
    PAD_ID,
    UNK_ID,
    ByteVocabulary,
    SentencePieceVocabulary,
    TokenizerVocabulary,
    Vocabulary,
    own_sentinels,
    sentinel,
)

SENTENCEPIECE_FILE = "spiece.model"
TOKENIZER_FILE = TokenizerVocabulary.FILE
ADDED_FILE = "added_tokens.json"
CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_CONFIGS = (CONFIG_FILE, "special_tokens_map.json", ADDED_FILE)
"""Files that describe a tokenizer beside the vocabulary, or, for ByT5, instead of one."""
BYTE_CLASS = "ByT5Tokenizer"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
logger = logging.getLogger(__name__)
_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
_SPACES = ("Strip", "Replace", "Sequence", "Precompiled")
"""Normalisers of a T5: the character map, and handling of spaces that SentencePiece has too."""
_CUTS = ("WhitespaceSplit", "Metaspace", "Sequence")
"""Pre-tokenizers of a T5, which split texts as SentencePiece does."""


@dataclasses.dataclass(frozen=True)
class FoundVocabulary:
    """The vocabulary of a Hugging Face folder.

    Attributes:
        contents: of the vocabulary's file (`Vocabulary.from_bytes`).
        notes: for the report.
        is_sentencepiece: whether it is such a model, which holds all that a folder says of its tokenizer.
    """

    contents: bytes
    notes: tuple[str, ...] = ()
    is_sentencepiece: bool = True


def file_of(folder: epath.Path) -> epath.Path:
    """The file that holds the vocabulary of a Hugging Face folder; the folder itself if there is none."""
    files = (folder / name for name in (SENTENCEPIECE_FILE, TOKENIZER_FILE))
    return next((file for file in files if file.exists()), folder)


class AnotherKindError(InputError):
    """Raised for an intact ``tokenizer.json`` that no SentencePiece model can represent."""


def read_vocabulary(folder: epath.Path, tokenizer_class: Any = None) -> FoundVocabulary | None:
    """Reads the vocabulary of a Hugging Face folder; None if it holds none.

    Args:
        folder: of the model.
        tokenizer_class: that the model's config names; the tokenizer's own config goes before it.

    Raises:
        InputError: its file is damaged, or its ids are not those that the network needs.
    """
    tokenizer = _read_tokenizer(folder / TOKENIZER_FILE) if (folder / TOKENIZER_FILE).exists() else None
    if (folder / SENTENCEPIECE_FILE).exists():
        where = folder / SENTENCEPIECE_FILE
        found = _with_added(folder, tokenizer, storage.read_bytes(where), where, ())
        if tokenizer is not None and found.is_sentencepiece:
            _warn_of_difference(found.contents, folder / TOKENIZER_FILE)
        return found
    if tokenizer is None:
        return _bytes_of(folder, tokenizer_class)
    where = folder / TOKENIZER_FILE
    _told_tokens(folder, tokenizer)  # what is wrong with them is said first
    try:
        proto = to_sentencepiece(tokenizer, where)
    except AnotherKindError as error:
        contents = storage.read_bytes(where)
        TokenizerVocabulary(contents, where).check_ids(PAD_ID, EOS_ID, where)
        reason = ", ".join(line.strip() for line in str(error).splitlines() if str(where) not in line)
        return FoundVocabulary(contents, notes=(f"{TOKENIZER_FILE} is the vocabulary as it is: {reason}",),
                               is_sentencepiece=False)
    return _with_added(folder, tokenizer, proto, where,
                       (f"The SentencePiece model was built from {TOKENIZER_FILE}",))


def _bytes_of(folder: epath.Path, tokenizer_class: Any) -> FoundVocabulary | None:
    """The byte vocabulary of a folder whose tokenizer is ByT5's, which has no file."""
    configs = read_configs(folder)
    config = configs.get(CONFIG_FILE, {})
    if config.get("tokenizer_class", tokenizer_class) != BYTE_CLASS:
        return None
    named = len(set(re.findall(r"<extra_id_\d+>", json.dumps(configs))))
    extra_ids = named or config.get("extra_ids", BYTE_EXTRA_IDS)
    if type(extra_ids) is not int or not 0 <= extra_ids <= MOST_EXTRA_IDS:
        raise InputError(describe("The tokenizer's number of extra ids is wrong", where=folder / CONFIG_FILE,
                                  got=repr(extra_ids)[:100], expected=f"0 to {MOST_EXTRA_IDS}"))
    note = f"The vocabulary is bytes and {extra_ids} extra ids, as {BYTE_CLASS} reads"
    return FoundVocabulary(ByteVocabulary(extra_ids).contents, notes=(note,), is_sentencepiece=False)


def _with_added(folder: epath.Path, tokenizer: Mapping[str, Any] | None, proto: bytes, where: epath.Path,
                notes: tuple[str, ...]) -> FoundVocabulary:
    """A SentencePiece model; or a ``tokenizer.json`` if the folder has tokens that such a model has not."""
    vocabulary = SentencePieceVocabulary(proto, where=where)
    vocabulary.check_ids(PAD_ID, EOS_ID, where)
    added = {number: entry for number, entry in _told_tokens(folder, tokenizer).items()
             if number >= vocabulary.size or not _is_known(vocabulary, number, entry["content"])}
    if not added:
        return FoundVocabulary(proto, notes)
    names = ", ".join(entry["content"] for entry in added.values())
    if tokenizer is not None and _holds(tokenizer, added):
        contents = storage.read_bytes(folder / TOKENIZER_FILE)
    else:
        contents = with_added(proto, added, where)
    whole = TokenizerVocabulary(contents, where)
    whole.check_ids(PAD_ID, EOS_ID, where)
    other = [f"{entry['content']} = {number}, which becomes {whole.id_of(entry['content'])}"
             for number, entry in added.items() if whole.id_of(entry["content"]) != number]
    if other:  # the tokenizers library numbers added tokens one after the other
        raise _no_such_ids(where, other, vocabulary.size)
    return FoundVocabulary(contents, (f"{TOKENIZER_FILE} is the vocabulary, for the sake of tokens that were "
                                      f"added: {names}",), is_sentencepiece=False)


def _holds(tokenizer: Mapping[str, Any], added: Mapping[int, AddedEntry]) -> bool:
    """Whether the entries of a ``tokenizer.json`` are all the tokens that were added."""
    own = {entry.get("id"): entry.get("content") for entry in tokenizer.get("added_tokens") or []}
    return all(own.get(number) == entry["content"] for number, entry in added.items())


def with_added(proto: bytes, added: Mapping[int, AddedEntry], where: Any) -> bytes:
    """Returns a ``tokenizer.json`` of a SentencePiece model and of the tokens behind it, by their ids.

    Raises:
        InputError: their ids are not the next ones, or the model has no such form.
    """
    size = SentencePieceVocabulary(proto, where=where).size
    if sorted(added) != list(range(size, size + len(added))):
        told = [f"{entry['content']} = {number}" for number, entry in sorted(added.items())]
        raise _no_such_ids(where, told, size)
    return to_tokenizer_json(proto, [added[number] for number in sorted(added)]).contents.encode()


def _no_such_ids(where: Any, got: Sequence[str], size: int) -> InputError:
    return InputError(describe(
        "The ids of added tokens do not follow on those of the vocabulary", where=where,
        got="; ".join(got)[:300], expected=f"ids from {size} on, without a gap",
        cure="take these tokens out of the tokenizer's files, or load it with transformers and save it"))


def check_kept(configs: Any, added: Any, where: Any) -> None:
    """Checks the tokenizer files and added tokens that a description keeps, before they are written again.

    Args:
        configs: contents of files, by their names, of `TOKENIZER_CONFIGS`.
        added: entries of tokens behind the vocabulary, by their ids as text.
        where: the description.

    Raises:
        InputError: a name or an entry that is none.
    """
    entries = added if isinstance(added, Mapping) else {}
    wrong = [repr(name) for name, contents in configs.items()
             if name not in TOKENIZER_CONFIGS or not isinstance(contents, dict)
             ] if isinstance(configs, Mapping) else [repr(configs)]
    wrong += [repr({number: entry}) for number, entry in entries.items()
              if not str(number).isdecimal() or not isinstance(entry, Mapping)
              or not isinstance(entry.get("content"), str)
              or any(type(entry.get(flag, False)) is not bool for flag in FLAGS)]
    wrong += [] if isinstance(added, Mapping) else [repr(added)]
    if wrong:
        raise InputError(describe("What the folder keeps of a tokenizer is wrong", where=where,
                                  got="; ".join(wrong)[:200],
                                  expected=f"files of the names {', '.join(TOKENIZER_CONFIGS)}, and added "
                                  "tokens by their ids", cure="fetch or write the folder again"))


def _read_tokenizer(path: epath.Path) -> Mapping[str, Any]:
    return storage.read_json(path, kind="tokenizer", schema_version=None)


def _told_tokens(folder: epath.Path, tokenizer: Mapping[str, Any] | None) -> dict[int, AddedEntry]:
    """Tokens by id that texts are searched for as they stand, as all files of a folder tell."""
    by_id: dict[int, AddedEntry] = {}
    if tokenizer is not None:
        entries = tokenizer.get("added_tokens") or []
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            raise _wrong_added(folder / TOKENIZER_FILE, entries)
        by_id |= _by_id(((entry.get("content"), entry.get("id"), entry) for entry in entries),
                        folder / TOKENIZER_FILE)
    by_id = _of_config(folder / CONFIG_FILE) | by_id
    path = folder / ADDED_FILE
    if path.exists():
        table = storage.read_json(path, kind="table of added tokens", schema_version=None)
        by_id = _by_id(((token, number, {}) for token, number in table.items()), path) | by_id
    return dict(sorted(by_id.items()))


def _is_known(vocabulary: SentencePieceVocabulary, number: int, content: str) -> bool:
    """Whether a token is a sentinel or a special one under the vocabulary's own id."""
    piece = vocabulary.piece(number)
    is_sentinel = vocabulary.size - 1 - number < vocabulary.extra_ids
    return content == piece.removeprefix("▁" if is_sentinel else "") and (
        is_sentinel or vocabulary.is_special(number))


def _of_config(path: epath.Path) -> dict[int, AddedEntry]:
    """Tokens by id as newer folders' tokenizer_config.json lists them."""
    if not path.exists():
        return {}
    table = storage.read_json(path, kind=CONFIG_FILE, schema_version=None).get("added_tokens_decoder") or {}
    if not isinstance(table, Mapping) or not all(
            isinstance(entry, Mapping) and str(number).isdecimal() for number, entry in table.items()):
        raise _wrong_added(path, table)
    return _by_id(((entry.get("content"), int(number), entry) for number, entry in table.items()), path)


def _by_id(tokens: Iterable[tuple[Any, Any, Mapping[str, Any]]], where: epath.Path) -> dict[int, AddedEntry]:
    """Entries by id, from unchecked tokens, ids and flags."""
    by_id = {}
    for token, number, entry in tokens:
        if not isinstance(token, str) or type(number) is not int or number < 0:
            raise _wrong_added(where, {token: number} if isinstance(token, str) else [token, number])
        flags = {flag: entry[flag] for flag in FLAGS if flag in entry}
        if any(type(value) is not bool for value in flags.values()):
            raise _wrong_added(where, dict(entry))
        by_id[number] = {"content": token, **flags}
    return by_id


def _wrong_added(where: epath.Path, got: Any) -> InputError:
    return InputError(describe("The added tokens are wrong", where=where, got=repr(got)[:200],
                               expected="tokens, each with the whole number that is its id",
                               cure="fetch the file again"))


def to_sentencepiece(tokenizer: Mapping[str, Any], where: Any) -> bytes:
    """Converts a ``tokenizer.json`` of the Unigram kind to a SentencePiece model that cuts texts equally.

    Raises:
        AnotherKindError: another kind of tokenizer, a step that SentencePiece does not have, or other ids.
        InputError: the pieces, or the character map, are damaged.
    """
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(vocab, list) or model.get("type", "Unigram") != "Unigram" or not vocab:
        raise AnotherKindError(describe(
            "The tokenizer is not a T5's", where=where,
            got=model.get("type") if isinstance(model, Mapping) else None,
            expected="a Unigram model with pieces and scores"))
    pieces = _pieces(vocab, where)
    found = tuple(piece for piece, _ in pieces[:3])
    if found != PLAIN_NAMES:
        raise AnotherKindError(describe("The vocabulary's special ids are not T5's", where=where, got=found,
                                        expected=PLAIN_NAMES))
    _check_cuts(tokenizer.get("pre_tokenizer"), where)
    if own_sentinels([piece for piece, _ in pieces]) == EXTRA_IDS and pieces[-1][0] == sentinel(0):
        pieces = pieces[:-EXTRA_IDS]  # T5's file does not hold them: readers add them
    proto = sentencepiece_model_pb2.ModelProto()
    by_bytes = sum(_BYTE.fullmatch(piece) is not None for piece, _ in pieces) == 256
    for number, (piece, score) in enumerate(pieces):
        proto.pieces.add(piece=piece, score=score, type=_piece_type(number, piece, by_bytes))
    trainer = proto.trainer_spec
    trainer.model_type, trainer.vocab_size = trainer.UNIGRAM, len(pieces)
    trainer.byte_fallback = by_bytes
    trainer.pad_id, trainer.eos_id, trainer.unk_id, trainer.bos_id = PAD_ID, EOS_ID, UNK_ID, -1
    trainer.pad_piece, trainer.eos_piece, trainer.unk_piece = PLAIN_NAMES
    normalizer = proto.normalizer_spec
    normalizer.name = "from tokenizer.json"
    normalizer.precompiled_charsmap = _character_map(tokenizer.get("normalizer"), where)
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = True
    normalizer.escape_whitespaces = True
    contents = proto.SerializeToString()
    _check_same_ids(contents, tokenizer, where)
    return contents


def _warn_of_difference(proto: bytes, path: epath.Path) -> None:
    """Tells where a folder's two tokenizer files cut texts otherwise: transformers takes the other one."""
    found = first_difference(SentencePieceVocabulary(proto), open_tokenizer(storage.read_bytes(path), path),
                             sample_texts(proto))
    if found is not None:
        logger.warning("%s cuts texts otherwise than %s, which is used here: the text %r is %s there, and %s "
                       "here", path, SENTENCEPIECE_FILE, found[0], found[2][:20], found[1][:20])


def _check_same_ids(proto: bytes, tokenizer: Mapping[str, Any], where: Any) -> None:
    """Raises AnotherKindError if a SentencePiece model cuts texts otherwise than the file of its origin."""
    opened = open_tokenizer(json.dumps(tokenizer).encode(), where)
    found = first_difference(SentencePieceVocabulary(proto, where=where), opened, sample_texts(proto))
    if found is not None:
        text, ours, theirs = found
        raise AnotherKindError(describe("SentencePiece would cut texts otherwise", where=where,
                                        got=f"{ours} for the text {text!r}"[:200],
                                        expected=f"{theirs}"[:200]))


def _pieces(vocab: Sequence[Any], where: Any) -> list[tuple[str, float]]:
    """Checked pieces and scores."""
    for number, entry in enumerate(vocab):
        try:
            piece, score = entry
            piece.encode("utf-8")  # an unpaired surrogate, which JSON can hold, is no character
            float(score)
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(describe("The vocabulary's pieces are wrong", where=f"{where}, piece {number}",
                                      got=ascii(entry)[:200], expected="a text and its score",
                                      cure="fetch the file again")) from error
    return [(piece, float(score)) for piece, score in vocab]


def _check_cuts(pre_tokenizer: Any, where: Any) -> None:
    """Raises AnotherKindError if texts are split before the model in a way that SentencePiece lacks."""
    cuts = [part.get("type") for part in _parts(pre_tokenizer, "pretokenizers")]
    if not all(kind in _CUTS for kind in cuts):
        raise AnotherKindError(describe("SentencePiece does not cut so", where=where, got=repr(cuts)[:200],
                                        expected=", ".join(_CUTS)))


def _piece_type(number: int, piece: str, by_bytes: bool) -> int:
    if number == 2:
        return _Piece.UNKNOWN
    if number < 2:
        return _Piece.CONTROL
    if by_bytes and _BYTE.fullmatch(piece):
        return _Piece.BYTE
    sentinel_piece = piece.removeprefix("▁").startswith("<extra_id_")
    return _Piece.USER_DEFINED if sentinel_piece else _Piece.NORMAL


def _character_map(normalizer: Any, where: Any) -> bytes:
    """The compiled character map of a normaliser; empty if there is none."""
    found = b""
    for part in _parts(normalizer, "normalizers"):
        kind = part.get("type")
        if kind not in _SPACES:
            raise AnotherKindError(describe("SentencePiece has no such normaliser", where=where, got=kind,
                                            expected=", ".join(_SPACES)))
        if kind == "Precompiled":
            try:
                found = base64.b64decode(part["precompiled_charsmap"] or "", validate=True)
            except (ValueError, KeyError, TypeError) as error:  # binascii's own is a ValueError
                raise InputError(describe("The normaliser's character map is damaged", where=where,
                                          got=str(error)[:200])) from error
    return found


def _parts(step: Any, name: str) -> list[Mapping[str, Any]]:
    """The steps of a nested step, in order."""
    found, waiting = [], [step]
    while waiting:  # not a recursion: a file may nest them a thousand deep
        step = waiting.pop()
        inner = step.get(name) if isinstance(step, Mapping) else []
        if isinstance(inner, list):
            waiting += reversed(inner)
        else:
            found.append(step)
    return found


def read_configs(folder: epath.Path) -> dict[str, Any]:
    """Reads those of `TOKENIZER_CONFIGS` that a folder has; contents by name."""
    return {name: storage.read_json(folder / name, kind=name, schema_version=None)
            for name in TOKENIZER_CONFIGS if (folder / name).exists()}


def vocabulary_files(contents: bytes) -> dict[str, Any]:
    """Makes the tokenizer files of a vocabulary of any kind, so that ``AutoTokenizer`` gives its ids.

    Args:
        contents: of the vocabulary's file.

    Returns:
        Bytes, or the contents of a JSON file, by the files' names.

    Raises:
        InputError: a SentencePiece model whose ids Hugging Face's tokenizers cannot give.
    """
    vocabulary = Vocabulary.from_bytes(contents)
    if isinstance(vocabulary, ByteVocabulary):
        return {CONFIG_FILE: {
            "tokenizer_class": BYTE_CLASS, "extra_ids": vocabulary.extra_ids, **_names(PLAIN_NAMES),
            "clean_up_tokenization_spaces": False}}
    if isinstance(vocabulary, TokenizerVocabulary):
        return {TOKENIZER_FILE: plain(contents), CONFIG_FILE: {
            "tokenizer_class": "PreTrainedTokenizerFast", **vocabulary.special_tokens(),
            "clean_up_tokenization_spaces": False}}
    form = to_tokenizer_json(contents)
    special: dict[str, Any] = _names(special_names(vocabulary))
    if vocabulary.added_ids:
        special["additional_special_tokens"] = [sentinel(number) for number in range(vocabulary.added_ids)]
    kind = {"tokenizer_class": "T5Tokenizer", "extra_ids": vocabulary.added_ids} if form.is_plain else {
        "tokenizer_class": "PreTrainedTokenizerFast"}
    return {SENTENCEPIECE_FILE: contents, TOKENIZER_FILE: form.contents.encode(),
            "special_tokens_map.json": special,
            CONFIG_FILE: {**kind, **special, "clean_up_tokenization_spaces": False, "model_max_length": 512}}


def write_files(folder: epath.Path, files: Mapping[str, Any]) -> None:
    """Writes files as `vocabulary_files` makes them."""
    for name, contents in files.items():
        if isinstance(contents, bytes):
            storage.write_bytes(folder / name, contents)
        else:
            storage.write_json(folder / name, contents)


def _names(special: Sequence[str]) -> dict[str, Any]:
    """Names of padding, EOS and unknown under Hugging Face's keys."""
    return {"eos_token": special[1], "pad_token": special[0], "unk_token": special[2]}
