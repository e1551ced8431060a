"""Bytes and Hugging Face's files as vocabularies: ids and texts are those of SeqIO and of transformers."""

import itertools
import json
import random

import pytest
import real_vocabularies as real
import tokenizers
import transformers

from elm_jax.data.arrays.span_corruption import PretrainingSource
from elm_jax.errors import InputError
from elm_jax.vocabularies import tokenizer_json, vocabulary
from elm_jax.vocabularies.vocabulary import (
    ByteVocabulary,
    SentencePieceVocabulary,
    TokenizerVocabulary,
    Vocabulary,
)


@pytest.fixture(scope="module")
def texts():
    with pytest.MonkeyPatch.context() as patch:
        return real.real_texts(patch)


@pytest.fixture(scope="module", params=real.KINDS)
def tokenizer_file(request, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "hf"
    return real.write_tokenizer(folder, real.make_tokenizer(request.param, texts))


@pytest.mark.parametrize("extra_ids", [0, 7, 125])
def test_bytes_equal_seqio(texts, extra_ids):
    seqio = pytest.importorskip("seqio")
    ours, theirs = ByteVocabulary(extra_ids), seqio.ByteVocabulary(extra_ids)
    assert (ours.size, ours.extra_ids, ours.unk_id) == (theirs.vocab_size, extra_ids, theirs.unk_id)
    for text in texts:
        assert ours.encode(text) == list(theirs.encode(text))
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)) == text
    draw = random.Random(0)
    for _ in range(300):  # bytes that are no text, special ids, EOS in the middle, ids beyond the last
        ids = [draw.choice([draw.randrange(ours.size + 30), draw.randrange(195, 256)]) for _ in range(12)]
        assert ours.decode(ids) == theirs.decode(ids)


def test_bytes_equal_byt5_s_tokenizer(texts):
    theirs = transformers.ByT5Tokenizer()
    ours = ByteVocabulary()
    assert ours.size == len(theirs) == 384
    for text in texts:
        assert [*ours.encode(text), vocabulary.EOS_ID] == theirs(text).input_ids
        assert ours.decode([*ours.encode(text), 1, 0, 0]) == theirs.decode(
            theirs(text).input_ids, skip_special_tokens=True) == text


def test_bytes_are_told_by_their_description(tmp_path):
    (tmp_path / "any.name").write_text('{"schema_version": 1, "kind": "bytes", "extra_ids": 9}')
    found = Vocabulary.load(tmp_path / "any.name")
    assert isinstance(found, ByteVocabulary) and (found.size, found.extra_ids) == (268, 9)
    again = Vocabulary.load(found.file())
    assert found.file().endswith("vocabulary.json") and again.fingerprint == found.fingerprint
    assert [found.sentinel_id(number) for number in range(9)] == list(range(267, 258, -1))
    with pytest.raises(InputError, match=r"(?s)no such sentinel.*9.*0 to 8"):
        found.sentinel_id(9)
    with pytest.raises(InputError, match=r"(?s)no such sentinel.*none"):
        ByteVocabulary(0).sentinel_id(0)


def test_tokenizer_files_give_the_ids_of_transformers(tokenizer_file, texts):
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_file.parent)
    ours = Vocabulary.load(tokenizer_file)
    assert isinstance(ours, TokenizerVocabulary)
    assert ours.size == len(theirs) and ours.contents == tokenizer_file.read_bytes()
    long = " ".join(texts[:20])
    for text in [*texts, long, "the <extra_id_0> and</s> <pad>"]:
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert [*ids, vocabulary.EOS_ID] == theirs(text, truncation=False).input_ids
        if vocabulary.EOS_ID not in ids:
            assert ours.decode([*ids, 1, 0, 0]) == theirs.decode(ids, skip_special_tokens=True)
    assert len(ours.encode(long)) > 100, "the file's own limit of 16 tokens must not cut"
    draw = random.Random(0)
    for _ in range(100):
        ids = [draw.randrange(2, ours.size) for _ in range(8)]
        assert ours.decode([*ids, ours.size + 3]) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_decoder_s_prompt_and_target_are_the_tokens_of_one_text(kind, texts):
    if kind == "gpt2":
        made, trainer = tokenizers.ByteLevelBPETokenizer(), {}
    else:  # SentencePiece's: a space in front of every text, written as ▁
        made, trainer = tokenizers.SentencePieceBPETokenizer(), {"special_tokens": ["<unk>"]}
    made.train_from_iterator(texts, vocab_size=400, show_progress=False, **trainer)
    contents = tokenizer_json.with_ids(made.to_str().encode(), pad_id=5, eos_id=5)
    ours = Vocabulary.from_bytes(contents)
    assert ours.target_prefix == {"gpt2": " ", "llama": ""}[kind]
    for prompt, target in itertools.pairwise(" ".join(text.split()) for text in texts[:40]):
        together = ours.encode(prompt) + ours.encode_target(target)
        assert together == made.encode(f"{prompt} {target}", add_special_tokens=False).ids
        if kind == "gpt2" and 5 not in together:  # the other knows not every letter
            assert ours.decode_target([*ours.encode_target(target), 5]) == target
    other = Vocabulary.from_bytes(real.make_tokenizer("bpe", texts).encode())
    assert other.target_prefix == ""  # a T5's: its target is a text of its own


def test_sentinels_of_a_tokenizer_file_stand_where_they_stand(tokenizer_file, texts):
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_file.parent)
    ours = Vocabulary.load(tokenizer_file)
    assert ours.extra_ids == len(real.SENTINELS)
    assert [ours.sentinel_id(number) for number in range(20)] == theirs.convert_tokens_to_ids(real.SENTINELS)


def test_unknown_ids_are_the_file_s(tokenizer_file):
    ours = Vocabulary.load(tokenizer_file)
    kind = json.loads(tokenizer_file.read_text())["model"]["type"]
    assert ours.unk_id == (None if kind == "BPE" else 2)  # GPT-2's kind has a token for every byte
    assert (2 in ours.encode("☃")) == (kind != "BPE")


def test_a_t5_s_own_tokenizer_file(texts, tmp_path):
    """The file that transformers writes for a T5, taken as it is: T5TokenizerFast's ids."""
    trained = vocabulary.train_vocabulary(texts * 3, tmp_path / "spiece.model", 1200, seed=0)
    theirs = transformers.T5TokenizerFast.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    ours = Vocabulary.load(tmp_path / "saved" / "tokenizer.json")
    assert (ours.size, ours.extra_ids, ours.unk_id) == (trained.size, 100, 2)
    assert ours.sentinel_id(0) == trained.sentinel_id(0) and ours.sentinel_id(99) == trained.sentinel_id(99)
    for text in texts:
        assert [*ours.encode(text), 1] == theirs(text).input_ids
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=True)
    assert ours.fingerprint != trained.fingerprint


def test_fingerprints_tell_vocabularies_apart(tokenizer_file, tmp_path):
    ours = Vocabulary.load(tokenizer_file)
    changed = json.loads(tokenizer_file.read_text())
    changed["added_tokens"][3]["lstrip"] = True
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    found = {ours.fingerprint, Vocabulary.load(tmp_path / "changed.json").fingerprint,
             *(ByteVocabulary(number).fingerprint for number in (0, 1, 125))}
    assert len(found) == 5
    assert Vocabulary.load(ours.file()).fingerprint == ours.fingerprint


@pytest.mark.parametrize("special", [
    ("<s>", "<pad>", "</s>", "<unk>"),  # as RoBERTa and BART
    ("[PAD]", "[UNK]", "[CLS]", "[SEP]"),  # as BERT
    ("<|endoftext|>", "<|pad|>"),  # as GPT-2 with a padding of its own
    ("<one>", "<two>"),
])
def test_other_special_ids_are_refused(texts, tmp_path, special):
    contents = json.loads(real.make_tokenizer("bpe", texts[:50], special))
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    named = "<one>" not in special
    with pytest.raises(InputError, match="special ids are not those that the network needs") as raised:
        where = tmp_path / "tokenizer.json"
        Vocabulary.load(where).check_ids(0, 1, where)
    text = str(raised.value)
    assert "tokenizer.json" in text
    assert ("padding = 0, EOS = 1" in text and "not renumbered" in text) == named
    for number, token in enumerate(special):
        known = token.strip("<|>[]") in ("pad", "PAD", "/s", "SEP", "endoftext")
        assert (f"{token} = {number}" in text) == known
    assert ("no token of a name that is known" in text) == ("<one>" in special)


def damaged(name):
    good = {"version": "1.0", "model": {"type": "BPE", "vocab": {"<pad>": 0, "</s>": 1}, "merges": []}}
    return {
        "a description of another kind": {"schema_version": 1, "kind": "letters", "extra_ids": 3},
        "a newer description": {"schema_version": 2, "kind": "bytes", "extra_ids": 3},
        "no extra ids": {"schema_version": 1, "kind": "bytes"},
        "less than none": {"schema_version": 1, "kind": "bytes", "extra_ids": -1},
        "no number": {"schema_version": 1, "kind": "bytes", "extra_ids": True},
        "too many": {"schema_version": 1, "kind": "bytes", "extra_ids": 10**9},
        "no model": {"version": "1.0"},
        "an empty object": {},
        "an unknown model": {**good, "model": {"type": "Unheard", "vocab": {}}},
        "merges of what is not there": {**good, "model": {**good["model"], "merges": ["x y"]}},
        "a normaliser that is none": {**good, "normalizer": {"type": "Unheard"}},
        "no token for the unknown": {**good, "model": {
            "type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": good["model"]["vocab"]}},
    }[name]


@pytest.mark.parametrize("name", [
    "a description of another kind", "a newer description", "no extra ids", "less than none", "no number",
    "too many", "no model", "an empty object", "an unknown model", "merges of what is not there",
    "a normaliser that is none", "no token for the unknown"])
def test_damaged_files_are_one_clear_error(name, tmp_path):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(damaged(name)))
    message = r"(?s)(description is wrong|tokenizer cannot be read).*broken\.json"
    with pytest.raises(InputError, match=message):
        Vocabulary.load(path)


def test_files_that_are_no_vocabulary(tokenizer_file, tmp_path):
    path = tmp_path / "half.json"
    path.write_bytes(tokenizer_file.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"(?s)is no JSON.*half\.json"):
        Vocabulary.load(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match=r"(?s)is no JSON.*half\.json"):
        Vocabulary.load(path)
    path.write_bytes(b"[]")
    with pytest.raises(InputError, match=r"(?s)Not a SentencePiece model.*half\.json"):
        Vocabulary.load(path)
    with pytest.raises(InputError, match=r"(?s)no vocabulary here.*none\.json"):
        Vocabulary.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="file is expected"):
        Vocabulary.load(tmp_path)


def test_span_corruption_uses_the_vocabulary_s_sentinels(tokenizer_file, texts):
    found = Vocabulary.load(tokenizer_file)
    options = {"chunk_length": 100, "prefix_lm_share": 0.0, "seed": 0}
    source = PretrainingSource.from_texts(texts, found, **options)
    marks = {found.sentinel_id(number) for number in range(20)}
    for index in range(20):
        inputs, targets = source.example(index)
        used = [int(token) for token in inputs if token in marks]
        assert used == [found.sentinel_id(number) for number in range(len(used))] and used
        assert used == [int(token) for token in targets if token in marks]


def test_span_corruption_without_sentinels_is_refused(texts):
    options = {"chunk_length": 100, "seed": 0}
    with pytest.raises(InputError, match=r"(?s)too few sentinels.*got: 2.*expected: 5"):
        PretrainingSource.from_texts(texts, ByteVocabulary(2), prefix_lm_share=0.5, **options)
    assert len(PretrainingSource.from_texts(texts, ByteVocabulary(0), prefix_lm_share=1.0, **options))
    source = PretrainingSource.from_texts(texts, ByteVocabulary(5), prefix_lm_share=0.0, **options)
    assert set(source.sentinels.tolist()) == set(range(259, 264))


def test_sentencepiece_is_still_told_by_its_contents(texts, tmp_path):
    trained = vocabulary.train_vocabulary(texts * 3, tmp_path / "odd.json", 1200, seed=0)
    assert isinstance(Vocabulary.load(tmp_path / "odd.json"), SentencePieceVocabulary)
    assert isinstance(trained, SentencePieceVocabulary) and trained.FILE == "vocabulary.model"
