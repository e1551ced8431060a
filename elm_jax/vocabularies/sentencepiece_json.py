"""Writes a SentencePiece model as a ``tokenizer.json``, and compares the ids of the two programs.

The tokenizers library has no SentencePiece models, but parts of which most of them can be put together. Two
ways to do so are tried: T5's own, which cuts texts at spaces first, and one that hands the whole text to the
model. The first that gives SentencePiece's ids for a sample of texts is taken; where none does, the model has
no such form.
"""

import dataclasses
import functools
import itertools
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sentencepiece import sentencepiece_model_pb2

from elm_jax.errors import InputError, describe
from elm_jax.vocabularies.vocabulary import SentencePieceVocabulary, sentinel

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)
AddedEntry = Mapping[str, Any]
"""A token that was added behind a vocabulary: ``content``, and the flags of an ``AddedToken``."""
PLAIN_NAMES = ("<pad>", "</s>", "<unk>")
"""A T5's pieces of the ids 0, 1 and 2."""
_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
_Trainer = sentencepiece_model_pb2.TrainerSpec
_SPACE = "▁"
_TEXTS = (
    "", " ", "a", " a", "a ", "The quick brown fox jumps over the lazy dog.", "  two  spaces   and more  ",
    "tabs\tand\nlines\r\n", "Café ﬁne ½ full\u3000width \uff21", "字 is unknown 😀😀 twice",
    "zero\u200bwidth", "no\u00a0break", "UPPER lower MiXeD", "in 2024: 3.14, -5 and 1,000,000", "İstanbul",
    "Ω ≠ ∑ √2",
    "(a) [b] {c} <d> @e #f $g %h ^i &j *k =l", "it's \"quoted\" “so” – or — so…", "привет мир", "مرحبا",
    "नमस्ते", "안녕하세요", "日本語のテキスト",
)
_DRAWN, _LONGEST = 200, 12
"""Texts that are drawn from the pieces, and most pieces of one."""
_ROUNDING = 4 * 2.0**-24
"""Share of a score that its sum in float32 may be off by, for each piece: two ways to cut are then equal."""


@dataclasses.dataclass(frozen=True)
class JsonForm:
    """A vocabulary as a ``tokenizer.json``.

    Attributes:
        contents: of the file.
        is_plain: whether it is what transformers' own class for T5 makes of the pieces.
    """

    contents: str
    is_plain: bool


def to_tokenizer_json(proto: bytes, behind: Sequence[AddedEntry] = ()) -> JsonForm:
    """Converts a SentencePiece model to the tokenizers library's form.

    Args:
        proto: serialized model; T5's sentinels follow its pieces unless they are among them.
        behind: tokens behind these, which texts are searched for as they stand.

    Raises:
        InputError: the library's parts give other ids; the settings that are unlike a T5's are named.
    """
    vocabulary, model = SentencePieceVocabulary(proto), _parsed(proto)
    texts, fault = sample_texts(proto), None
    for is_plain, make in _forms(model, vocabulary):
        tokenizer = make()
        found = first_difference(vocabulary, tokenizer, texts)
        if found is None:
            _warn_of_sentinels(vocabulary, tokenizer, texts)
            _add(tokenizer, behind)
            contents = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False)
            return JsonForm(contents, is_plain and special_names(vocabulary) == PLAIN_NAMES)
        fault = found
    text, ours, theirs = fault
    raise InputError(describe(
        "Hugging Face's tokenizers cannot cut texts as this SentencePiece vocabulary does",
        where=", ".join(unlike_t5(proto)) or "the vocabulary", got=f"{theirs} for the text {text!r}"[:300],
        expected=f"SentencePiece's ids {ours}"[:300],
        cure="keep the model in this program's form or T5X's (--to elm, --to t5x), which keep the vocabulary "
             "as it is; or give a tokenizer.json of your own with --vocabulary"))


def special_names(vocabulary: SentencePieceVocabulary) -> tuple[str, str, str]:
    """Pieces of padding, EOS and unknown."""
    return tuple(vocabulary.piece(number) for number in (vocabulary.pad_id, vocabulary.eos_id,
                                                         vocabulary.unk_id))


def unlike_t5(proto: bytes) -> list[str]:
    """The settings of a SentencePiece model that change ids and are unlike a T5's, in words."""
    model = _parsed(proto)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kinds = {_Piece.USER_DEFINED: "USER_DEFINED", _Piece.UNUSED: "UNUSED"}
    found = [name for name, unlike in (
        (f"model_type {_Trainer.ModelType.Name(trainer.model_type)}", trainer.model_type != _Trainer.UNIGRAM),
        ("add_dummy_prefix false", not normalizer.add_dummy_prefix),
        ("remove_extra_whitespaces false", not normalizer.remove_extra_whitespaces),
        ("escape_whitespaces false", not normalizer.escape_whitespaces),
        ("treat_whitespace_as_suffix true", trainer.treat_whitespace_as_suffix),
        (f"normalizer {normalizer.name or 'without a name'}", normalizer.name != "nmt_nfkc"),
        ("byte_fallback true", trainer.byte_fallback)) if unlike]
    found += [f"pieces of type {word}" for kind, word in kinds.items()
              if any(piece.type == kind and "<extra_id_" not in piece.piece for piece in model.pieces)]
    names = special_names(SentencePieceVocabulary(proto))
    return found + ([f"special pieces {', '.join(names)}"] if names != PLAIN_NAMES else [])


def sample_texts(proto: bytes) -> list[str]:
    """Texts for a comparison: odd ones, and some that are put together of the model's own pieces."""
    pieces = [piece.piece for piece in _parsed(proto).pieces
              if piece.type in (_Piece.NORMAL, _Piece.USER_DEFINED, _Piece.UNUSED)
              and "<extra_id_" not in piece.piece]
    if not pieces:
        return list(_TEXTS)
    draw = random.Random(0)
    rare = [piece.piece for piece in _parsed(proto).pieces
            if piece.type in (_Piece.USER_DEFINED, _Piece.UNUSED) and "<extra_id_" not in piece.piece]
    drawn = [draw.choices(pieces, k=draw.randint(1, _LONGEST)) for _ in range(_DRAWN)]
    drawn += [[draw.choice(pieces), piece, draw.choice(pieces)] for piece in rare[:_DRAWN]]
    return [*_TEXTS, *("".join(chosen).replace(_SPACE, " ") for chosen in drawn)]


def first_difference(vocabulary: SentencePieceVocabulary, tokenizer: "Tokenizer", texts: Sequence[str]
                     ) -> tuple[str, list[int], list[int]] | None:
    """The first text that the two programs cut otherwise, SentencePiece's ids, and the others; None if equal.

    Of two ways to cut a text that score the same to float32's last digits, either will do: SentencePiece adds
    up in float32, tokenizers in float64.
    """
    for text in texts:
        ours = vocabulary.encode(text)
        theirs = tokenizer.encode(text, add_special_tokens=False).ids
        if ours != theirs and not _tied(vocabulary, ours, theirs):
            return text, ours, theirs
    return None


def _tied(vocabulary: SentencePieceVocabulary, ours: Sequence[int], theirs: Sequence[int]) -> bool:
    """Whether two ways to cut one text are equally likely."""
    if not vocabulary.is_unigram or max(theirs, default=0) >= vocabulary.size:
        return False
    (left, right), pieces = ([vocabulary.score(number) for number in ids] for ids in (ours, theirs)), [
        "".join(map(vocabulary.piece, ids)) for ids in (ours, theirs)]
    rounding = _ROUNDING * max(len(left), len(right)) * sum(map(abs, left))
    return pieces[0] == pieces[1] and abs(sum(left) - sum(right)) <= rounding


def _warn_of_sentinels(vocabulary: SentencePieceVocabulary, tokenizer: "Tokenizer", texts: Sequence[str]
                       ) -> None:
    """Tells where a text with sentinels is cut otherwise, which only span corruption writes."""
    words = [text for text in texts if text.strip() and text.isascii()][:20]
    framed = [f"{a.strip()} {sentinel(0)} {b.strip()} {sentinel(1)}" for a, b in itertools.pairwise(words)]
    if vocabulary.extra_ids > 1 and first_difference(vocabulary, tokenizer, framed):
        logger.warning("the vocabulary's sentinels (%s, ...) have other spaces around them in Hugging Face's "
                       "form: texts without sentinels have the same ids", sentinel(0))


@functools.lru_cache(maxsize=2)
def _parsed(proto: bytes) -> Any:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(proto)
    return model


def _forms(model: Any, vocabulary: SentencePieceVocabulary
           ) -> Iterator[tuple[bool, Callable[[], "Tokenizer"]]]:
    """Ways to put a tokenizer together, each with whether transformers' class for T5 does it so."""
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    if trainer.model_type == _Trainer.UNIGRAM and not trainer.treat_whitespace_as_suffix:
        # The class knows no bytes for unknown characters, which mT5 has, and drops repeated spaces whatever
        # the model says.
        of_class = normalizer.remove_extra_whitespaces and normalizer.add_dummy_prefix
        yield (of_class and not trainer.byte_fallback,
               functools.partial(_cut_at_spaces, model, vocabulary))
    yield False, functools.partial(_whole_text, model, vocabulary)


def _cut_at_spaces(model: Any, vocabulary: SentencePieceVocabulary) -> "Tokenizer":
    """T5's own form: the text is cut at spaces, then each word into its likeliest pieces."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    normalizer = model.normalizer_spec
    tokenizer = _with_model(model, vocabulary)
    if normalizer.precompiled_charsmap:
        tokenizer.normalizer = normalizers.Precompiled(normalizer.precompiled_charsmap)
    spaces = {"replacement": _SPACE, "split": True,
              "prepend_scheme": "always" if normalizer.add_dummy_prefix else "never"}
    once = [pre_tokenizers.WhitespaceSplit()] if normalizer.remove_extra_whitespaces else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*once, pre_tokenizers.Metaspace(**spaces)])
    tokenizer.decoder = (_joined(model) if model.trainer_spec.byte_fallback
                         else decoders.Metaspace(**spaces))
    return tokenizer


def _whole_text(model: Any, vocabulary: SentencePieceVocabulary) -> "Tokenizer":
    """SentencePiece's own order: the text is normalised, spaces become a letter, and all of it is cut."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    spec, suffix = model.normalizer_spec, model.trainer_spec.treat_whitespace_as_suffix
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        # The library maps "\r\n" as one letter, SentencePiece as two.
        steps += [normalizers.Replace("\r\n", "\n\n"), normalizers.Precompiled(spec.precompiled_charsmap)]
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Replace(Regex(r"(?<=[\s\S])\z"), " ") if suffix
                     else normalizers.Prepend(" "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    tokenizer = _with_model(model, vocabulary)
    tokenizer.normalizer = normalizers.Sequence(steps)
    if model.trainer_spec.model_type == _Trainer.WORD:
        behavior = "merged_with_previous" if suffix else "merged_with_next"
        tokenizer.pre_tokenizer = pre_tokenizers.Split(_SPACE, behavior)
    tokenizer.decoder = _joined(model)
    return tokenizer


def _joined(model: Any) -> Any:
    """A decoder that joins pieces and bytes, without the space that every text was given."""
    from tokenizers import decoders

    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        ends = (0, 1) if model.trainer_spec.treat_whitespace_as_suffix else (1, 0)
        steps.append(decoders.Strip(" ", *ends))
    return decoders.Sequence(steps)


def _with_model(model: Any, vocabulary: SentencePieceVocabulary) -> "Tokenizer":
    """A tokenizer of the model's algorithm and pieces, its special tokens and EOS behind every text."""
    from tokenizers import AddedToken, Tokenizer, processors

    tokenizer = Tokenizer(_algorithm(model, vocabulary))
    end = vocabulary.piece(vocabulary.eos_id)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", end], pair=["$A", end, "$B", end], special_tokens=[(end, vocabulary.eos_id)])
    sentinels = [sentinel(number) for number in range(vocabulary.added_ids)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)
                                  for token in (*special_names(vocabulary), *sentinels)])
    if model.trainer_spec.model_type != _Trainer.UNIGRAM:
        _add(tokenizer, [{"content": piece.piece} for piece in model.pieces
                         if piece.type == _Piece.USER_DEFINED and "<extra_id_" not in piece.piece])
    return tokenizer


def _add(tokenizer: "Tokenizer", entries: Sequence[AddedEntry]) -> None:
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(**{"normalized": False, **entry}) for entry in entries])


def _algorithm(model: Any, vocabulary: SentencePieceVocabulary) -> Any:
    """The library's model of the pieces: Unigram, BPE with merges by score, or whole words."""
    from tokenizers import models

    trainer, unknown = model.trainer_spec, vocabulary.piece(vocabulary.unk_id)
    sentinels = [sentinel(number) for number in reversed(range(vocabulary.added_ids))]
    names = [*(piece.piece for piece in model.pieces), *sentinels]
    if trainer.model_type == _Trainer.UNIGRAM:
        scores = [*_unigram_scores(model.pieces), *(0.0 for _ in sentinels)]
        return models.Unigram(list(zip(names, scores, strict=True)), unk_id=vocabulary.unk_id,
                              byte_fallback=trainer.byte_fallback)
    ids = {name: number for number, name in enumerate(names)}
    if trainer.model_type == _Trainer.WORD:
        return models.WordLevel(ids, unk_token=unknown)
    merges = _merges(model.pieces, ids) if trainer.model_type == _Trainer.BPE else []
    return models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback)


def _unigram_scores(pieces: Sequence[Any]) -> Iterator[float]:
    """Scores of pieces; a user's own get those with which SentencePiece all but always takes them."""
    largest = max((piece.score for piece in pieces if piece.type == _Piece.NORMAL), default=0.0)
    for piece in pieces:
        own = piece.type == _Piece.USER_DEFINED and "<extra_id_" not in piece.piece
        yield len(piece.piece.encode()) * largest - 0.1 if own else piece.score


def _merges(pieces: Sequence[Any], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that become one, in the order of its score: every way to part each piece."""
    found = []
    for piece in pieces:
        if piece.type == _Piece.NORMAL:
            parts = [(piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece))]
            found += [(-piece.score, ids[left], ids[right], left, right) for left, right in parts
                      if left in ids and right in ids]
    return [(left, right) for *_, left, right in sorted(found)]
