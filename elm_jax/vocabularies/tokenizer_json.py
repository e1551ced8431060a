"""Reads Hugging Face's ``tokenizer.json`` with the tokenizers library, and finds its special ids.

The file does not say which token is padding and which ends a text. Their names tell, of which there are few;
where names cannot tell, as in decoders whose padding is their EOS, a base's file begins with the ids
(`with_ids`), which are left out again for other programs (`plain`).
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from elm_jax.errors import InputError, describe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMES = {"padding": ("pad", "padding"),
         "EOS": ("/s", "eos", "end", "endoftext", "end_of_text", "im_end", "eot", "sep")}
"""Names of special tokens, in any brackets and any case: ``<pad>``,
``[PAD]``, ``<|endoftext|>``."""
_RARE = "\U000f0000"
"""A character for private use, which no vocabulary has a token for."""
_BRACKETED = re.compile(r"[<\[{|]+(?P<word>[^<>\[\]{}|]+)[>\]}|]+")
_TOLD = re.compile(rb'\{"special_ids": \{"padding": (\d{1,9}), "EOS": (\d{1,9})\}, ')
"""The beginning of a base's file that tells its special ids."""


def with_ids(contents: bytes, pad_id: int, eos_id: int) -> bytes:
    """Returns the file with its special ids at the beginning, for a network that needs these.

    Args:
        contents: of a ``tokenizer.json``, with other ids at the beginning or without.
        pad_id: of the network; any token, EOS too.
        eos_id: of the network.
    """
    told = b'{"special_ids": {"padding": %d, "EOS": %d}, ' % (pad_id, eos_id)
    return told + plain(contents).lstrip()[1:]


def plain(contents: bytes) -> bytes:
    """Returns the file as other programs read it. Inverse of `with_ids`."""
    match = _TOLD.match(contents)
    return contents if match is None else b"{" + contents[match.end():]


def told_ids(contents: bytes) -> tuple[int, int] | None:
    """Returns the padding and EOS ids that the file begins with; None where names tell."""
    match = _TOLD.match(contents)
    return None if match is None else (int(match[1]), int(match[2]))


def parse(contents: bytes, where: Any) -> dict[str, Any]:
    """Parses the JSON object of a vocabulary file.

    Raises:
        InputError: the file is damaged, or holds something else.
    """
    try:
        values = json.loads(contents)
    except (ValueError, RecursionError) as error:
        raise InputError(describe("The vocabulary's file is no JSON", where=where, got=str(error)[:200],
                                  cure="fetch the file again")) from error
    if not isinstance(values, dict):
        raise InputError(describe("The vocabulary's file is no JSON object", where=where,
                                  got=type(values).__name__))
    return values


def open_tokenizer(contents: bytes, where: Any) -> "Tokenizer":
    """Makes a tokenizer from a file's contents; it neither truncates nor pads, whatever the file says.

    Raises:
        InputError: the library cannot read it.
    """
    from tokenizers import Tokenizer  # late: most vocabularies are SentencePiece models

    try:
        tokenizer = Tokenizer.from_str(contents.decode("utf-8-sig"))
        tokenizer.encode(_RARE)  # a model without its unknown token fails only where it needs one
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing narrower, and its panics are no Exceptions
        raise InputError(describe("The tokenizer cannot be read", where=where, got=str(error)[:200],
                                  expected="a tokenizer.json of Hugging Face's tokenizers",
                                  cure="fetch the file again")) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def special_ids(tokenizer: "Tokenizer", where: Any) -> tuple[int, int]:
    """Finds the ids of padding and EOS by name; the first of several fitting tokens.

    Raises:
        InputError: no token has a known name; the error lists all candidates.
    """
    found = {purpose: _named(tokenizer, words) for purpose, words in NAMES.items()}
    if not all(found.values()):
        first = ", ".join(f"{number} = {tokenizer.id_to_token(number)!r}" for number in range(3))
        raise InputError(describe(
            "The tokenizer's special ids are not those that the network needs", where=where,
            got=f"{_told(found)} (ids {first})"[:400],
            expected="; ".join(f"{purpose}: a token such as <{NAMES[purpose][0]}>" for purpose in found),
            cure="use a model whose tokenizer names them"))
    padding, end = (min(tokens.values()) for tokens in found.values())
    return padding, end


def check_special_ids(tokenizer: "Tokenizer", wanted: Mapping[str, int], where: Any) -> None:
    """Checks that the tokens of `NAMES` have the ids that a network needs; nothing is renumbered.

    Args:
        tokenizer: of the file.
        wanted: id by what the token is for, a key of `NAMES`.
        where: the file, for the error.

    Raises:
        InputError: no token has a known name, or it has another id; the error lists all candidates.
    """
    found = {purpose: _named(tokenizer, NAMES[purpose]) for purpose in wanted}
    if all(number in found[purpose].values() for purpose, number in wanted.items()):
        return
    held = ", ".join(f"{number} = {tokenizer.id_to_token(number)!r}" for number in wanted.values())
    raise InputError(describe(
        "The tokenizer's special ids are not those that the network needs", where=where,
        got=f"{_told(found)} (ids {held})"[:400],
        expected=", ".join(f"{purpose} = {number}" for purpose, number in wanted.items()),
        cure="use a model whose tokenizer has these ids, as those of T5, mT5 and ByT5 have; ids are not "
        "renumbered, for the embedding's rows have their order"))


def _told(found: Mapping[str, Mapping[str, int]]) -> str:
    """Lists, in words, the tokens that were found for each purpose."""
    return "; ".join(f"{purpose}: " + (", ".join(f"{token} = {number}" for token, number in tokens.items())
                                       or "no token of a name that is known")
                     for purpose, tokens in found.items())


def _named(tokenizer: "Tokenizer", words: tuple[str, ...]) -> dict[str, int]:
    """Tokens that are one of the words in brackets, with their ids, sorted by id."""
    found = {}
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        match = _BRACKETED.fullmatch(token)
        if match and match["word"].lower() in words:
            found[token] = number
    return dict(sorted(found.items(), key=lambda item: item[1]))


def begins_with_space(tokenizer: "Tokenizer") -> bool:
    """Whether the tokenizer puts a space in front of every text by itself, as SentencePiece's do."""
    return tokenizer.encode("a", add_special_tokens=False).tokens[:1] in (["▁a"], ["▁"])


def unknown_id(tokenizer: "Tokenizer", values: Mapping[str, Any]) -> int | None:
    """Id of the unknown token of a tokenizer; None if it has none, as byte tokenizers."""
    model = values["model"]
    if model.get("unk_id") is not None:  # a Unigram model gives the id, the others the name
        return int(model["unk_id"])
    token = model.get("unk_token")
    return None if token is None else tokenizer.token_to_id(token)


def numbered(tokenizer: "Tokenizer", name: Callable[[int], str]) -> list[int]:
    """Ids of the tokens with numbered names (0, 1, 2, ...), up to the first missing one."""
    found: list[int] = []
    while (number := tokenizer.token_to_id(name(len(found)))) is not None:
        found.append(number)
    return found
