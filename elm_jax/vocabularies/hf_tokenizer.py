"""Vocabularies of Hugging Face folders: ``spiece.model``, ``tokenizer.json``, or ByT5's bytes.

A ``tokenizer.json`` of a T5 is a SentencePiece model in other words: pieces with their scores and the
normaliser's compiled character map. The two programs choose the same pieces unless two ways to cut
a text score the same to the last digits (SentencePiece adds up in float32, tokenizers in float64), and
Hugging Face's also reads ``</s>`` and its like in a text as special tokens. A SentencePiece
model is written as both files; what SentencePiece cannot represent (BPE, WordPiece, other normalisers) is
copied unchanged.
"""

import base64
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from sentencepiece import sentencepiece_model_pb2

from elm_jax.errors import InputError, describe
from elm_jax.runtime import storage
from elm_jax.vocabularies.tokenizer_json import plain
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
AddedEntry = Mapping[str, Any]
"""A token that was added behind a vocabulary: ``content``, and those of `FLAGS` that its file gives."""
_SPECIAL = ("<pad>", "</s>", "<unk>")
"""Ids 0, 1 and 2."""
_SPECIAL_NAMES = {"eos_token": _SPECIAL[1], "pad_token": _SPECIAL[0], "unk_token": _SPECIAL[2]}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
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
        added: tokens by id that were added right behind it, which a SentencePiece model cannot hold.
        notes: for the report.
        is_sentencepiece: whether it is such a model, which holds all that a folder says of its tokenizer.
    """

    contents: bytes
    added: Mapping[int, AddedEntry] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    is_sentencepiece: bool = True


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
        proto = storage.read_bytes(folder / SENTENCEPIECE_FILE)
        return _with_added(folder, tokenizer, proto, folder / SENTENCEPIECE_FILE, ())
    if tokenizer is None:
        return _bytes_of(folder, tokenizer_class)
    where = folder / TOKENIZER_FILE
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
    """A SentencePiece model, and the tokens that were added behind it if their ids are consecutive."""
    vocabulary = SentencePieceVocabulary(proto, where=where)
    vocabulary.check_ids(PAD_ID, EOS_ID, where)
    added = _added_tokens(folder, tokenizer, vocabulary.size)
    names = ", ".join(entry["content"] for entry in added.values())
    if added and not follow_on(added, vocabulary.size):
        notes += (f"Left out, because their ids do not follow on those of the vocabulary: {names}",)
        added = {}
    elif added:
        notes += ("Tokens added behind the vocabulary travel along to other Hugging Face folders; this "
                  f"program's vocabulary does not know them: {names}",)
    return FoundVocabulary(proto, added, notes)


def follow_on(added: Iterable[int], size: int) -> bool:
    """Whether ids are consecutive behind a vocabulary, as the tokenizers library requires."""
    return sorted(added) == list(range(size, size + len(list(added))))


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


def _added_tokens(
    folder: epath.Path, tokenizer: Mapping[str, Any] | None, size: int
) -> dict[int, AddedEntry]:
    """Tokens whose ids are behind the vocabulary, in the order of their ids."""
    by_id: dict[int, AddedEntry] = {}
    if tokenizer is not None:
        entries = tokenizer.get("added_tokens") or []
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            raise _wrong_added(folder / TOKENIZER_FILE, entries)
        by_id |= _by_id(((entry.get("content"), entry.get("id"), entry) for entry in entries),
                        folder / TOKENIZER_FILE)
    path = folder / ADDED_FILE
    if path.exists():
        table = storage.read_json(path, kind="table of added tokens", schema_version=None)
        by_id = _by_id(((token, number, {}) for token, number in table.items()), path) | by_id
    return {number: by_id[number] for number in sorted(by_id) if number >= size}


def _by_id(tokens: Iterable[tuple[Any, Any, Mapping[str, Any]]], where: epath.Path) -> dict[int, AddedEntry]:
    """Entries by id, from unchecked tokens, ids and flags."""
    by_id = {}
    for token, number, entry in tokens:
        if not isinstance(token, str) or type(number) is not int:
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
        AnotherKindError: another kind of tokenizer, or a step that SentencePiece does not have.
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
    if found != _SPECIAL:
        raise AnotherKindError(describe("The vocabulary's special ids are not T5's", where=where, got=found,
                                        expected=_SPECIAL))
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
    trainer.pad_piece, trainer.eos_piece, trainer.unk_piece = _SPECIAL
    normalizer = proto.normalizer_spec
    normalizer.name = "from tokenizer.json"
    normalizer.precompiled_charsmap = _character_map(tokenizer.get("normalizer"), where)
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = True
    normalizer.escape_whitespaces = True
    return proto.SerializeToString()


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


def write_vocabulary(folder: epath.Path, contents: bytes,
                     behind: Mapping[int, AddedEntry] | None = None) -> None:
    """Writes the tokenizer files of a vocabulary of any kind, so that ``AutoTokenizer`` gives its ids.

    Args:
        folder: exists.
        contents: of the vocabulary's file.
        behind: see `write_tokenizer`; the other kinds hold all tokens themselves.
    """
    vocabulary = Vocabulary.from_bytes(contents)
    if isinstance(vocabulary, ByteVocabulary):
        storage.write_json(folder / CONFIG_FILE, {
            "tokenizer_class": BYTE_CLASS, "extra_ids": vocabulary.extra_ids, **_SPECIAL_NAMES,
            "clean_up_tokenization_spaces": False})
    elif isinstance(vocabulary, TokenizerVocabulary):
        storage.write_bytes(folder / TOKENIZER_FILE, plain(contents))
        storage.write_json(folder / CONFIG_FILE, {
            "tokenizer_class": "PreTrainedTokenizerFast", **vocabulary.special_tokens(),
            "clean_up_tokenization_spaces": False})
    else:
        write_tokenizer(folder, contents, behind)


def write_tokenizer(folder: epath.Path, proto: bytes, behind: Mapping[int, AddedEntry] | None = None) -> None:
    """Writes ``spiece.model`` and the files with which ``AutoTokenizer`` gives the same ids.

    Args:
        folder: exists.
        proto: serialized SentencePiece model.
        behind: tokens that were added behind it, by their ids, which are the next ones (`follow_on`).
    """
    behind = dict(behind or {})
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(proto)
    added = SentencePieceVocabulary(proto).added_ids
    sentinels = [sentinel(number) for number in range(added)]
    special: dict[str, Any] = dict(_SPECIAL_NAMES)
    if sentinels:
        special["additional_special_tokens"] = sentinels
    # transformers' own class for T5 knows no bytes for unknown characters, which mT5 has, and drops
    # repeated spaces whatever the model says: such models need the general class.
    general = model.trainer_spec.byte_fallback or not model.normalizer_spec.remove_extra_whitespaces
    with storage.guard_writes(folder):
        (folder / SENTENCEPIECE_FILE).write_bytes(proto)
        (folder / TOKENIZER_FILE).write_text(
            tokenizer_json(model, sentinels, [behind[number] for number in sorted(behind)]), encoding="utf-8")
    if behind:
        storage.write_json(folder / ADDED_FILE,
                           {entry["content"]: number for number, entry in behind.items()})
    storage.write_json(folder / "special_tokens_map.json", special)
    storage.write_json(folder / CONFIG_FILE, {
        "tokenizer_class": "PreTrainedTokenizerFast" if general else "T5Tokenizer",
        **({} if general else {"extra_ids": added}), **special,
        "clean_up_tokenization_spaces": False, "model_max_length": 512})


def tokenizer_json(model: Any, sentinels: Sequence[str], behind: Sequence[AddedEntry] = ()) -> str:
    """Converts a SentencePiece model to the tokenizers library's form: cut at spaces, likeliest pieces.

    Args:
        model: the parsed SentencePiece model.
        sentinels: tokens behind its pieces, sentinel 0 first.
        behind: tokens behind these, which texts are searched for as they stand.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    by_bytes = model.trainer_spec.byte_fallback
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    pieces += [(token, 0.0) for token in reversed(sentinels)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=by_bytes))
    if model.normalizer_spec.precompiled_charsmap:
        tokenizer.normalizer = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    spaces = {"replacement": "▁", "split": True,
              "prepend_scheme": "always" if model.normalizer_spec.add_dummy_prefix else "never"}
    once = [pre_tokenizers.WhitespaceSplit()] if model.normalizer_spec.remove_extra_whitespaces else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*once, pre_tokenizers.Metaspace(**spaces)])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ]) if by_bytes else decoders.Metaspace(**spaces)
    end = _SPECIAL[1]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", end], pair=["$A", end, "$B", end], special_tokens=[(end, 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)
                                  for token in (*_SPECIAL, *sentinels)])
    tokenizer.add_tokens([AddedToken(**{"normalized": False, **entry}) for entry in behind])
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False)
