"""Tokenizers of GGUF files against llama.cpp's rules, written out, and against SentencePiece."""

import io
import itertools
import random

import numpy as np
import pytest
import real_vocabularies as real
import regex
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import models, pre_tokenizers, trainers

from elm_jax.errors import InputError
from elm_jax.vocabularies import gguf_vocabulary, tokenizer_json
from elm_jax.vocabularies.gguf_vocabulary import PREFIX
from elm_jax.vocabularies.vocabulary import Vocabulary

ODD = ["", " ", "\n", "  two  spaces ", "tabs\tand\r\nlines\n\n\n x", "1234567 and 12", " 7", "x1y22",
       "don't DON'T", "caf\u00e9 \u00b2\u00bd\u2167 \u0967\u0968", "\u4f60\u597d\uff0c\u4e16\u754c",
       "\U0001f600 emoji\u200d", "a\u00a0b\u3000c", "!!??..", "<|end|> x <|end|>", "___", "aaaaaaaaaa",
       "= = ===", "I'll I'LL we've", "\u0301combining", "end "]
"""Texts that rules of splitting treat differently."""
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
RULES = {"gpt-2": [GPT2], "smollm": [r"\p{N}", GPT2], "llama-bpe": [LLAMA3],
         "qwen2": [LLAMA3.replace("{1,3}", "")]}
"""llama.cpp's expressions: each cuts what the one before it has left."""
BYTES = dict(zip(
    [*range(33, 127), *range(161, 173), *range(174, 256), *range(0, 33), *range(127, 161), 173],
    [chr(number) for number in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]],
    strict=True))
"""GPT-2's characters for bytes."""


@pytest.fixture(scope="module")
def texts():
    with pytest.MonkeyPatch.context() as patch:
        return [*real.real_texts(patch), *ODD]


def cut(text: str, expressions: list[str]) -> list[str]:
    """Pieces of a text by llama.cpp's rule; what an expression does not match stays a piece."""
    pieces = [text]
    for expression in expressions:
        found = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(expression, piece):
                found += [piece[end:match.start()], match[0]]
                end = match.end()
            found.append(piece[end:])
        pieces = [piece for piece in found if piece]
    return pieces


def merged(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Parts of a word: of all neighbours that merge, those of the lowest rank first, the left ones first."""
    parts = list(word)
    while len(parts) > 1:
        rank, place = min((ranks.get(pair, len(ranks)), place)
                          for place, pair in enumerate(itertools.pairwise(parts)))
        if rank == len(ranks):
            break
        parts[place:place + 2] = [parts[place] + parts[place + 1]]
    return parts


@pytest.fixture(scope="module")
def learned(texts) -> dict[str, object]:
    """Metadata of a byte-level BPE, less the name of its rule."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator([*texts, " 12 123 2024 1999 7 don't"] * 2, trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<|pad|>", "<|bos|>", "<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    vocab = sorted(made.get_vocab().items(), key=lambda item: item[1])
    merges = tokenizer_json.parse(made.to_str().encode(), "made")["model"]["merges"]
    return {f"{PREFIX}{key}": value for key, value in {
        "model": "gpt2", "tokens": [token for token, _ in vocab],
        "token_type": [3] * 3 + [1] * (len(vocab) - 3), "merges": [" ".join(pair) for pair in merges],
        "eos_token_id": 2, "bos_token_id": 1}.items()}


@pytest.mark.parametrize("name", RULES)
def test_ids_follow_llama_cpp_s_rule(name, learned, texts):
    """``smollm`` cuts digits off one by one, before words: transformers' GGUF tokenizer leaves that out."""
    found = gguf_vocabulary.read_tokenizer({**learned, f"{PREFIX}pre": name}, "file")
    vocabulary = Vocabulary.from_bytes(found.contents)
    tokens = learned[f"{PREFIX}tokens"]
    ids = {token: number for number, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(learned[f"{PREFIX}merges"])}
    for text in texts:
        wanted = []
        for part in regex.split(r"(<\|end\|>)", text):
            if part == "<|end|>":
                wanted.append(2)
                continue
            for word in cut(part, RULES[name]):
                own = "".join(BYTES[byte] for byte in word.encode())
                whole = name == "llama-bpe" and own in ids
                wanted += [ids[own]] if whole else [ids[token] for token in merged(own, ranks)]
        assert vocabulary.encode(text) == wanted, text
        if "<|end|>" not in text:
            assert vocabulary.decode(wanted) == text
    assert found.bos_id == (1 if name == "llama-bpe" else None)
    assert (found.pad_id, found.eos_id, found.size, vocabulary.size) == (2, 2, len(tokens), len(tokens))


def test_other_rules_are_refused(learned):
    for name in ("default", None, "tekken"):
        with pytest.raises(InputError, match="Unknown rule"):
            gguf_vocabulary.read_tokenizer({**learned, f"{PREFIX}pre": name}, "file")


@pytest.fixture(scope="module", params=[True, False], ids=["space in front", "none"])
def pieces(request, texts):
    """SentencePiece's own BPE, and the metadata that llama.cpp's converter makes of it."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts for line in text.split("\n") if line]),
        model_writer=buffer, vocab_size=900, model_type="bpe", byte_fallback=True, pad_id=-1, unk_id=0,
        bos_id=1, eos_id=2, normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1,
        add_dummy_prefix=request.param, minloglevel=2, character_coverage=0.98)
    proto = sentencepiece_model_pb2.ModelProto.FromString(buffer.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())
    return processor, {f"{PREFIX}{key}": value for key, value in {
        "model": "llama", "tokens": [piece.piece for piece in proto.pieces],
        "scores": np.array([piece.score for piece in proto.pieces], np.float32),
        "token_type": np.array([piece.type for piece in proto.pieces], np.int32),
        "eos_token_id": 2, "bos_token_id": 1, "unknown_token_id": 0,
        "add_space_prefix": request.param}.items()}


def test_sentencepiece_s_ids_come_from_pieces_and_scores(pieces, texts):
    processor, metadata = pieces
    found = gguf_vocabulary.read_tokenizer(metadata, "file")
    vocabulary = Vocabulary.from_bytes(found.contents)
    draw = random.Random(0)
    letters = "aab  \u00e9e.=1\U0001f600"
    more = ["".join(draw.choices(letters, k=draw.randrange(1, 30))) for _ in range(300)]
    for text in [*filter(None, texts), *more]:
        if "<|" not in text:
            assert vocabulary.encode(text) == processor.EncodeAsIds(text), text
    assert vocabulary.decode(processor.EncodeAsIds("A word, \u4f60!")) == "A word, \u4f60!"
    assert found.bos_id == 1 and vocabulary.unk_id == 0


def test_scores_without_an_order_are_refused(pieces):
    _, metadata = pieces
    flat = {**metadata, f"{PREFIX}scores": np.zeros(len(metadata[f"{PREFIX}tokens"]), np.float32)}
    with pytest.raises(InputError, match="no order of merges"):
        gguf_vocabulary.read_tokenizer(flat, "file")
    with pytest.raises(InputError, match="scores of"):
        gguf_vocabulary.read_tokenizer({**metadata, f"{PREFIX}scores": None}, "file")
    tokens = ["<x>" if token == "<0x41>" else token for token in metadata[f"{PREFIX}tokens"]]
    with pytest.raises(InputError, match="no token for 1 bytes"):
        gguf_vocabulary.read_tokenizer({**metadata, f"{PREFIX}tokens": tokens}, "file")


def test_told_ids_go_in_front_of_a_file_and_come_off_again(learned):
    found = gguf_vocabulary.read_tokenizer({**learned, f"{PREFIX}pre": "gpt-2"}, "file").contents
    plain = tokenizer_json.plain(found)
    assert tokenizer_json.told_ids(found) == (2, 2) and tokenizer_json.told_ids(plain) is None
    assert tokenizer_json.plain(tokenizer_json.with_ids(found, 0, 1)) == plain
    assert tokenizers.Tokenizer.from_str(plain.decode()).get_vocab_size() == 700
    with pytest.raises(InputError, match="no such special ids"):
        Vocabulary.from_bytes(tokenizer_json.with_ids(plain, 700, 2))
    with pytest.raises(InputError, match="not those that the network needs"):
        Vocabulary.from_bytes(found).check_ids(0, 2)
