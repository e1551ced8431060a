"""Tokenizers of GGUF files, turned into Hugging Face's ``tokenizer.json``.

llama.cpp has two kinds that language models use:

- ``gpt2``: byte-level BPE with merges. How texts are split before comes from a list of names
  (``tokenizer.ggml.pre``); the file does not hold the rule. `SPLITS` has those of the networks that are read.
- ``llama``: SentencePiece's BPE. Of all neighbours whose union is a piece, those of the piece with the
  highest score join first. The equal list of merges is found from pieces and scores.

Ids are llama.cpp's. Source of the rules: https://github.com/ggml-org/llama.cpp, src/llama-vocab.cpp
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from elm_jax.errors import InputError, describe, unknown_name
from elm_jax.vocabularies import tokenizer_json

PREFIX = "tokenizer.ggml."
MODELS = ("gpt2", "llama")
"""Kinds of tokenizers that are read, by the value of ``tokenizer.ggml.model``."""
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2, _DIGITS, _LLAMA3, _QWEN2 = "GPT-2's", "GPT-2's, digits one by one before", "Llama 3's", "Qwen2's"
SPLITS: dict[str, str] = {
    "gpt-2": _GPT2, "olmo": _GPT2,
    "smollm": _DIGITS, "starcoder": _DIGITS, "codeshell": _DIGITS,
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2, "stablelm2": _QWEN2,
}
"""Rules by which texts are split, by the names of ``tokenizer.ggml.pre``."""
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")
"""Names with which a word that is a token is never built by merges, and BOS stands in front."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens."""
_SPACE = "▁"


@dataclasses.dataclass(frozen=True)
class GgufTokenizer:
    """The tokenizer of a GGUF file.

    Attributes:
        contents: of a ``tokenizer.json`` that begins with its special ids (`tokenizer_json.with_ids`).
        size: number of ids.
        pad_id: fills rows up; EOS where the file names none.
        eos_id: ends a text.
        extra_eos_ids: end a turn or a message, and generation too.
        bos_id: stands in front of every text; None if the file says that none does.
        config: ``tokenizer_config.json`` as Hugging Face has it: special tokens and the chat template.
    """

    contents: bytes
    size: int
    pad_id: int
    eos_id: int
    extra_eos_ids: tuple[int, ...]
    bos_id: int | None
    config: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """Checked tokens of a file, with their types."""

    tokens: Sequence[str]
    types: Sequence[int]
    ids: Mapping[str, int]

    def special(self, named: Sequence[int]) -> list[dict[str, Any]]:
        """Entries of tokens that texts are searched for: control tokens, and those of the user."""
        entries = []
        for number, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            control = kind in (_UNKNOWN, _CONTROL) or number in named
            if control or kind == _USER_DEFINED:
                entries.append({"id": number, "content": token, "single_word": False, "lstrip": False,
                                "rstrip": False, "normalized": False, "special": control})
        return entries


def read_tokenizer(metadata: Mapping[str, Any], where: Any) -> GgufTokenizer:
    """Makes the tokenizer that a file's metadata describe.

    Args:
        metadata: values by key (`gguf_header.Header.metadata`).
        where: the file, for errors.

    Raises:
        InputError: there is no tokenizer, or one of another kind or with a rule that is not known; its
            tables are damaged; EOS is missing; EOS is put behind every text; scores give no order of merges.
    """
    model = metadata.get(f"{PREFIX}model")
    if model is None or f"{PREFIX}tokens" not in metadata:
        raise InputError(describe("The GGUF file holds no tokenizer", where=where,
                                  got=f"no {PREFIX}model" if model is None else f"no {PREFIX}tokens",
                                  cure="take a file that was converted together with its tokenizer"))
    if model not in MODELS:
        raise unknown_name("kind of tokenizer", str(model), MODELS, where)
    pieces = _pieces(metadata, where)
    ids = {name: _id(metadata, f"{name}_token_id", len(pieces.tokens), where)
           for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    if ids["eos"] is None:
        raise InputError(describe("The tokenizer names no token that ends a text", where=where,
                                  got=f"no {PREFIX}eos_token_id"))
    if metadata.get(f"{PREFIX}add_eos_token"):
        raise InputError(describe("The tokenizer puts EOS behind every text, prompts too", where=where,
                                  got=f"{PREFIX}add_eos_token true", expected="false"))
    named = [number for number in ids.values() if number is not None]
    make = _byte_level if model == "gpt2" else _sentencepiece
    bos = ids["bos"] if _adds_bos(metadata, model) else None
    values = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": pieces.special(named),
              **make(metadata, pieces, where), "post_processor": _frame(bos, pieces.tokens)}
    eos = ids["eos"]
    pad = eos if ids["padding"] is None else ids["padding"]
    plain = json.dumps(values, ensure_ascii=False).encode()
    contents = tokenizer_json.with_ids(plain, pad, eos)
    ends = tuple(dict.fromkeys(number for number in (ids["eot"], ids["eom"]) if number not in (None, eos)))
    config = _config(metadata, pieces.tokens, {"bos_token": ids["bos"], "eos_token": eos, "pad_token": pad},
                     bos is not None)
    return GgufTokenizer(contents, len(pieces.tokens), pad, eos, ends, bos, config)


def _pieces(metadata: Mapping[str, Any], where: Any) -> _Pieces:
    """Checks the tokens and their types; without types all are normal."""
    tokens = metadata[f"{PREFIX}tokens"]
    wrong = None
    if not isinstance(tokens, list) or not tokens:
        wrong = f"tokens: {type(tokens).__name__}"
    else:
        types = metadata.get(f"{PREFIX}token_type")
        types = [_NORMAL] * len(tokens) if types is None else list(map(int, types))
        ids = {token: number for number, token in enumerate(tokens)}
        if len(types) != len(tokens):
            wrong = f"{len(tokens)} tokens, {len(types)} types"
        elif len(ids) != len(tokens):
            wrong = f"{len(tokens) - len(ids)} tokens twice"
    if wrong:
        raise InputError(describe("The tokenizer's tables are damaged", where=where, got=wrong,
                                  expected="tokens, each once, and a type for each",
                                  cure="fetch the file again"))
    return _Pieces(tokens, types, ids)


def _id(metadata: Mapping[str, Any], name: str, size: int, where: Any) -> int | None:
    """A token's id that the metadata name, checked; None if they do not."""
    number = metadata.get(f"{PREFIX}{name}")
    if number is None:
        return None
    if type(number) is not int or not 0 <= number < size:
        raise InputError(describe("The tokenizer names a token that it does not have", where=where,
                                  got=f"{PREFIX}{name} {number!r}", expected=f"an id below {size}"))
    return number


def _adds_bos(metadata: Mapping[str, Any], model: str) -> bool:
    """Whether BOS stands in front of every text: as the file says, or as llama.cpp assumes."""
    assumed = model == "llama" or metadata.get(f"{PREFIX}pre") in _WHOLE_WORDS
    return bool(metadata.get(f"{PREFIX}add_bos_token", assumed))


def _frame(bos_id: int | None, tokens: Sequence[str]) -> dict[str, Any] | None:
    """The step that puts BOS in front, for other programs: this program's vocabularies give no frame."""
    if bos_id is None:
        return None
    bos = tokens[bos_id]
    first, second = ([{"SpecialToken": {"id": bos, "type_id": number}},
                      {"Sequence": {"id": name, "type_id": number}}] for number, name in enumerate("AB"))
    return {"type": "TemplateProcessing", "single": first, "pair": [*first, *second],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}}


def _config(metadata: Mapping[str, Any], tokens: Sequence[str], named: Mapping[str, int | None],
            adds_bos: bool) -> dict[str, Any]:
    """Contents of a ``tokenizer_config.json``."""
    template = metadata.get("tokenizer.chat_template")
    return {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": adds_bos,
            **{name: tokens[number] for name, number in named.items() if number is not None},
            "clean_up_tokenization_spaces": False,
            **({"chat_template": template} if isinstance(template, str) else {})}


def _byte_level(metadata: Mapping[str, Any], pieces: _Pieces, where: Any) -> dict[str, Any]:
    """Steps of a byte-level BPE."""
    name = metadata.get(f"{PREFIX}pre")
    if name not in SPLITS:
        raise unknown_name("rule by which the tokenizer splits texts", str(name), SPLITS,
                           f"{where}, {PREFIX}pre")
    merges = metadata.get(f"{PREFIX}merges")
    pairs = [] if not isinstance(merges, list) else [_pair(merge) for merge in merges]
    lost = [merge for merge, pair in zip(merges or (), pairs, strict=True)
            if not {pair[0], pair[1], pair[0] + pair[1]} <= pieces.ids.keys()]
    if not isinstance(merges, list) or lost:
        raise InputError(describe(
            "The tokenizer's merges are damaged", where=where, cure="fetch the file again",
            got=f"{lost[0]!r}, of which a part is no token" if lost else f"no {PREFIX}merges"))
    return {"normalizer": None, "pre_tokenizer": _split(SPLITS[name]),
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                        "use_regex": True},
            "model": _bpe(pieces, pairs, ignore_merges=name in _WHOLE_WORDS)}


def _pair(merge: str) -> tuple[str, str]:
    """The two sides of a merge, which a space divides; the first side may begin with one."""
    place = merge.find(" ", 1)
    return (merge[:place], merge[place + 1:]) if place > 0 else (merge, "")


def _split(rule: str) -> dict[str, Any]:
    """The pre-tokenizer of a rule of `SPLITS`."""
    of_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                "use_regex": rule in (_GPT2, _DIGITS)}
    if rule == _GPT2:
        return of_bytes
    first: dict[str, Any] = {"type": "Digits", "individual_digits": True}
    if rule != _DIGITS:
        digits = r"\p{N}{1,3}" if rule == _LLAMA3 else r"\p{N}"
        first = {"type": "Split", "pattern": {"Regex": f"{_CONTRACTIONS}|{_WORDS}|{digits}|{_REST}"},
                 "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [first, of_bytes]}


def _bpe(pieces: _Pieces, merges: Sequence[tuple[str, str]], **settings: Any) -> dict[str, Any]:
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": dict(pieces.ids), "merges": [list(pair) for pair in merges], **settings}


def _sentencepiece(metadata: Mapping[str, Any], pieces: _Pieces, where: Any) -> dict[str, Any]:
    """Steps of SentencePiece's BPE, with bytes for characters that are no piece."""
    scores = metadata.get(f"{PREFIX}scores")
    absent = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in pieces.ids]
    if scores is None or len(scores) != len(pieces.tokens) or absent:
        raise InputError(describe(
            "The tokenizer's tables are damaged", where=where, cure="fetch the file again",
            got=f"no token for {len(absent)} bytes" if absent else
            f"{0 if scores is None else len(scores)} scores of {len(pieces.tokens)} tokens",
            expected="a score for each token, and a token for each byte"))
    before = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    after = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
             {"type": "ByteFallback"}, {"type": "Fuse"}]
    if metadata.get(f"{PREFIX}add_space_prefix", True):
        before.insert(0, {"type": "Prepend", "prepend": _SPACE})
        after.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    merges = _merges_of(pieces, list(map(float, scores)), where)
    unknown = next((pieces.tokens[number] for number, kind in enumerate(pieces.types) if kind == _UNKNOWN),
                   None)
    return {"normalizer": {"type": "Sequence", "normalizers": before}, "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": after},
            "model": _bpe(pieces, merges, fuse_unk=True, byte_fallback=True, unk_token=unknown)}


def _merges_of(pieces: _Pieces, scores: Sequence[float], where: Any) -> list[tuple[str, str]]:
    """Merges in the order in which SentencePiece joins neighbours: by the scores of their unions.

    Raises:
        InputError: two unions have one score: a list of merges cannot say which goes first.
    """
    joins = {token: number for token, number in pieces.ids.items()
             if pieces.types[number] in (_NORMAL, _USER_DEFINED, _UNUSED)}
    found: list[tuple[float, str, str]] = []
    owners: dict[float, str] = {}
    for token, number in joins.items():
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))
                 if token[:cut] in joins and token[cut:] in joins]
        if pairs and owners.setdefault(scores[number], token) != token:
            raise InputError(describe(
                "The tokenizer's scores give no order of merges", where=where,
                got=f"{token!r} and {owners[scores[number]]!r} with the score {scores[number]}",
                expected="a score of its own for each piece that two others make",
                cure="convert the model with its BPE's own scores"))
        # Of one piece, cuts into parts that come first in the vocabulary go first.
        pairs.sort(key=lambda pair: (joins[pair[0]], joins[pair[1]]))
        found += [(-scores[number], *pair) for pair in pairs]
    found.sort(key=lambda merge: merge[0])  # stable
    return [(left, right) for _, left, right in found]
