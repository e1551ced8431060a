"""Texts of the data folder, many in other letters than English, and ``tokenizer.json`` files made of them."""

import json
import os
import pathlib
from collections.abc import Sequence

import pytest
from checkout import ROOT
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from elm_jax.data.sources import row_files

DATA = pathlib.Path(os.environ.get("ELM_DATA_DIR")
                    or ROOT.parent / "shared" / "data")
ODD = ["", " ", "  two  spaces\tand\nlines ", "Café ﬁne ½ full　width Ａ", "字 is 😀", "zero\u200bwidth",
       "\ufeffmark", "İstanbul", "na\u0308ive"]


def need_data() -> None:
    """Skips the test where there is no data folder."""
    if not (DATA / "index.json").exists():
        pytest.skip("no data folder: set ELM_DATA_DIR")


def real_texts(monkeypatch: pytest.MonkeyPatch, count: int = 150) -> list[str]:
    """Inputs of three data sets, one of them in hundreds of languages, and odd ones."""
    need_data()
    monkeypatch.setenv("ELM_DATA_DIR", str(DATA))
    rows = [row for dataset, split in (("ag_news", "validation"), ("dbpedia_14", "validation"))
            for row in row_files.read_rows(dataset, None, split)[:count]]
    texts = [value for row in rows for value in row.values() if isinstance(value, str)]
    found = (DATA / "bigbench" / "language_identification.jsonl.gz")
    texts += [row["input"] for row in list(row_files.read_lines(found))[:count]]
    assert sum(not text.isascii() for text in texts) > count / 2
    return texts + ODD


SPECIAL = ["<pad>", "</s>", "<unk>"]
SENTINELS = [f"<extra_id_{number}>" for number in range(20)]
"""Counted upwards, right behind the special tokens: as nowhere in T5's own files."""
KINDS = ("bpe", "wordpiece", "unigram")


def make_tokenizer(kind: str, texts: Sequence[str], special: Sequence[str] = (*SPECIAL, *SENTINELS),
                   vocab_size: int = 900) -> str:
    """Contents of a ``tokenizer.json``: GPT-2's kind, BERT's, or a T5's that folds case.

    It also cuts and pads, as such files often say, and frames a text with tokens of its own.
    """
    common = {"special_tokens": list(special), "vocab_size": vocab_size, "show_progress": False}
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **common)
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**common)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **common)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {special[1]}", special_tokens=[(special[1], tokenizer.token_to_id(special[1]))])
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16, pad_id=0, pad_token=special[0])
    return tokenizer.to_str()


def write_tokenizer(folder: pathlib.Path, contents: str) -> pathlib.Path:
    """A ``tokenizer.json`` in a folder from which transformers reads it."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(contents)
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>",
        "unk_token": "<unk>"}))
    return folder / "tokenizer.json"
