"""Vocabularies in and out of Hugging Face folders: the ids are those of transformers' AutoTokenizer."""

import io
import json

import pytest
import sentencepiece
import transformers
from sentencepiece import sentencepiece_model_pb2

from elm_jax.errors import InputError
from elm_jax.formats import tree_checks
from elm_jax.models import T5Config
from elm_jax.runtime import storage
from elm_jax.vocabularies import hf_tokenizer
from elm_jax.vocabularies.vocabulary import SentencePieceVocabulary, Vocabulary

ODD = ["", " ", "  two  spaces\tand\nlines ", "Café ﬁne ½ full　width Ａ", "字 is unknown 😀",
       "zero\u200bwidth", "the <extra_id_0> came <extra_id_99>", "<extra_id_3> <extra_id_4>"]


def as_mt5(texts):
    """A model as mT5's: bytes for unknown characters, its own sentinels as the last 100 pieces."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=buffer, vocab_size=600, model_type="unigram", pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, byte_fallback=True, minloglevel=2, num_threads=1,
        user_defined_symbols=[f"▁<extra_id_{number}>" for number in range(99, -1, -1)])
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(buffer.getvalue())
    pieces = sorted(model.pieces, key=lambda piece: "extra_id" in piece.piece)
    pieces = [sentencepiece_model_pb2.ModelProto.SentencePiece.FromString(piece.SerializeToString())
              for piece in pieces]
    del model.pieces[:]
    model.pieces.extend(pieces)
    return model.SerializeToString()


@pytest.fixture(scope="module", params=["t5", "mt5"])
def written(request, vocabulary_proto, texts, tmp_path_factory):
    """A folder with a vocabulary's files, and the vocabulary."""
    proto = vocabulary_proto if request.param == "t5" else as_mt5(texts)
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "config.json").write_text(json.dumps({"model_type": request.param}))
    write(folder, proto)
    return folder, SentencePieceVocabulary(proto)


def write(folder, contents):
    hf_tokenizer.write_files(storage.as_path(folder), hf_tokenizer.vocabulary_files(contents))


def score(vocabulary, ids):
    return sum(vocabulary._processor.GetScore(number) for number in ids)


def assert_same_ids(tokenizer, vocabulary, texts):
    """Equal ids; where two ways to cut a text score alike to float32's last digits, either will do."""
    ties = 0
    for text in texts:
        theirs, ours = tokenizer(text).input_ids, [*vocabulary.encode(text), 1]
        if theirs != ours:
            assert abs(score(vocabulary, theirs) - score(vocabulary, ours)) < 1e-4, text
            ties += 1
    assert ties <= len(texts) // 100


def test_auto_tokenizer_gives_our_ids(written, texts):
    folder, vocabulary = written
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == vocabulary.size
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert_same_ids(tokenizer, vocabulary, [*texts, *ODD])
    for number in range(100):
        ids = tokenizer(f"<extra_id_{number}>").input_ids
        assert ids == [vocabulary.sentinel_id(number), 1] == [vocabulary.size - 1 - number, 1]
    text = next(text for text in texts if 2 not in vocabulary.encode(text))
    assert tokenizer.decode(vocabulary.encode(text)) == vocabulary.decode(vocabulary.encode(text)) == text


def test_a_vocabulary_from_tokenizer_json_alone(written, texts, tmp_path):
    folder, vocabulary = written
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    found = hf_tokenizer.read_vocabulary(storage.as_path(tmp_path))
    rebuilt = SentencePieceVocabulary(found.contents)
    assert (rebuilt.size, rebuilt.added_ids) == (vocabulary.size, vocabulary.added_ids)
    assert "built from tokenizer.json" in found.notes[0] and found.is_sentencepiece
    for text in [*texts, *ODD]:
        assert rebuilt.encode(text) == vocabulary.encode(text)
        assert rebuilt.decode(rebuilt.encode(text)) == vocabulary.decode(vocabulary.encode(text))


def test_a_tokenizer_json_that_transformers_wrote(vocabulary_proto, texts, tmp_path):
    """Built by transformers from spiece.model and saved by it: the file that newer folders carry."""
    (tmp_path / "spiece.model").write_bytes(vocabulary_proto)
    tokenizer = transformers.T5Tokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "spiece.model").exists()
    found = hf_tokenizer.read_vocabulary(storage.as_path(tmp_path / "saved"))
    assert found.is_sentencepiece
    rebuilt, ours = SentencePieceVocabulary(found.contents), SentencePieceVocabulary(vocabulary_proto)
    assert rebuilt.size == ours.size
    assert_same_ids(transformers.AutoTokenizer.from_pretrained(tmp_path / "saved"), rebuilt, [*texts, *ODD])
    for text in [*texts, *ODD]:
        assert rebuilt.encode(text) == ours.encode(text)


@pytest.mark.parametrize("files", ["all", "without spiece.model", "without tokenizer.json"])
def test_added_tokens_act_as_in_transformers(written, tmp_path, files):
    """Whichever file tells of them: the vocabulary knows them, and they are not cut into pieces."""
    folder, vocabulary = written
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<speaker>", transformers.AddedToken("<listener>", special=True, lstrip=True)])
    tokenizer.save_pretrained(tmp_path)
    if files != "without spiece.model":
        (tmp_path / "spiece.model").write_bytes(vocabulary.contents)
    if files == "without tokenizer.json":  # as transformers 4 wrote slow tokenizers
        (tmp_path / "tokenizer.json").unlink()
        entry = dict.fromkeys(hf_tokenizer.FLAGS, False)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {
            str(vocabulary.size): {"content": "<speaker>", **entry},
            str(vocabulary.size + 1): {"content": "<listener>", **entry, "special": True, "lstrip": True}}}))
    found = hf_tokenizer.read_vocabulary(storage.as_path(tmp_path))
    ours = Vocabulary.from_bytes(found.contents)
    assert ours.size == vocabulary.size + 2 and (ours.pad_id, ours.eos_id) == (0, 1)
    assert ours.sentinel_id(3) == vocabulary.sentinel_id(3) if vocabulary.added_ids else not ours.extra_ids
    assert any("<speaker>, <listener>" in note for note in found.notes)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "config.json").write_bytes((folder / "config.json").read_bytes())
    write(tmp_path / "again", found.contents)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    text = "<speaker> hello <listener> and so on"
    ids = tokenizer(text).input_ids
    assert again(text).input_ids == ids == [*ours.encode(text), 1]
    assert ours.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)
    assert vocabulary.size in ids and vocabulary.size + 1 in ids


def test_added_tokens_with_a_gap_are_refused(written, tmp_path):
    """The tokenizers library numbers added tokens one after the other: a gap has no form there."""
    folder, vocabulary = written
    values = json.loads((folder / "tokenizer.json").read_text())
    values["added_tokens"].append({"id": vocabulary.size + 3, "content": "<far>",
                                   **dict.fromkeys(hf_tokenizer.FLAGS, False)})
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    for spoil in (lambda: None, lambda: (tmp_path / "tokenizer.json").write_bytes(
            (folder / "tokenizer.json").read_bytes()), lambda: (tmp_path / "tokenizer.json").unlink()):
        spoil()
        with pytest.raises(InputError, match=f"do not follow on(.|\n)*<far> = {vocabulary.size + 3}"):
            hf_tokenizer.read_vocabulary(storage.as_path(tmp_path))
        (tmp_path / "spiece.model").write_bytes(vocabulary.contents)
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<far>": vocabulary.size + 3}))


def test_a_piece_that_is_searched_for_as_a_token_is_seen(written, tmp_path):
    """An id of the vocabulary's own, and yet other ids for a text that holds it."""
    folder, vocabulary = written
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["th"])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes(vocabulary.contents)
    ours = Vocabulary.from_bytes(hf_tokenizer.read_vocabulary(storage.as_path(tmp_path)).contents)
    assert [*ours.encode("this"), 1] == tokenizer("this").input_ids != [*vocabulary.encode("this"), 1]


def test_two_files_that_do_not_agree_are_told(written, tmp_path, caplog):
    """As transformers saves a BPE spiece.model: its tokenizer.json is of another algorithm."""
    _, vocabulary = written
    (tmp_path / "spiece.model").write_bytes(vocabulary.contents)
    values = tokenizer_with(written)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    hf_tokenizer.read_vocabulary(storage.as_path(tmp_path))
    assert not caplog.records
    values["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    found = hf_tokenizer.read_vocabulary(storage.as_path(tmp_path))
    assert found.contents == vocabulary.contents and "cuts texts otherwise than spiece.model" in caplog.text


@pytest.fixture(scope="module")
def trained(texts):
    """Trains small SentencePiece models with special ids as T5's; keeps them."""
    kept = {}

    def train(**settings):
        name = str(sorted(settings.items()))
        if name not in kept:
            made = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(**{
                "sentence_iterator": iter(texts[:600]), "model_writer": made, "vocab_size": 220, "pad_id": 0,
                "eos_id": 1, "unk_id": 2, "bos_id": -1, "hard_vocab_limit": False, "minloglevel": 2,
                "num_threads": 1, **settings})
            kept[name] = made.getvalue()
        return kept[name]

    return train


BY_BYTES = {"vocab_size": 420, "byte_fallback": True}
OWN_NAMES = {"eos_piece": "[EOS]", "pad_piece": "[PAD]", "unk_piece": "[UNK]"}
SETTINGS = [
    {}, {"model_type": "bpe"}, {"model_type": "char"}, {"model_type": "word", "vocab_size": 400},
    {"add_dummy_prefix": False}, {"add_dummy_prefix": False, "model_type": "bpe"},
    {"treat_whitespace_as_suffix": True}, {"treat_whitespace_as_suffix": True, "model_type": "bpe"},
    {"remove_extra_whitespaces": False}, {"remove_extra_whitespaces": False, "model_type": "bpe", **BY_BYTES},
    {"normalization_rule_name": "identity"}, {"normalization_rule_name": "identity", "model_type": "bpe"},
    {"normalization_rule_name": "nfkc_cf"}, {"normalization_rule_name": "nmt_nfkc_cf", **BY_BYTES},
    {"split_by_whitespace": False}, {"split_by_whitespace": False, "model_type": "bpe"},
    OWN_NAMES, {"model_type": "bpe", **OWN_NAMES},
    {"user_defined_symbols": ["<x>", "ab", "the"]},
    {"user_defined_symbols": ["<x>", "ab", "the"], "model_type": "bpe"},
    {"control_symbols": ["<cls>", "<mask>"]},
]
"""Settings of SentencePiece that change ids."""
REFUSED = ("word",)
"""Words of settings that have no form in Hugging Face's tokenizers."""


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: "-".join(map(str, each.values())) or "t5")
def test_every_setting_gives_the_same_ids_or_is_refused_by_name(trained, texts, tmp_path, settings):
    """Texts that the writer's own check does not know are cut alike by transformers and SentencePiece."""
    proto = trained(**settings)
    try:
        write(tmp_path, proto)
    except InputError as error:
        words = {"word": "WORD", "bpe": "USER_DEFINED"}[settings["model_type"]]
        assert words in str(error) and "cannot cut texts" in str(error) and not list(tmp_path.iterdir())
        return
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), SentencePieceVocabulary(proto)
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2)
    assert len(theirs) == ours.size
    if ours.is_unigram:
        assert_same_ids(theirs, ours, [*texts[600:900], *(text for text in ODD if "<" not in text)])
    else:
        for text in [*texts[600:900], *(text for text in ODD if "<" not in text)]:
            assert theirs(text).input_ids == [*ours.encode(text), 1], text
    for text in texts[600:650]:
        ids = ours.encode(text)
        if 2 not in ids:
            assert theirs.decode(ids) == ours.decode(ids)


def tokenizer_with(written, **changes):
    return {**json.loads((written[0] / "tokenizer.json").read_text()), **changes}


@pytest.mark.parametrize(("changes", "words"), [
    ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []},
     r"special ids are not(.|\n)*0 = 'a'"),
    ({"model": {"type": "Unheard", "vocab": {"a": 0}}}, "tokenizer cannot be read"),
    ({"model": {"type": "Unigram", "unk_id": 2, "vocab": [["<s>", 0], ["</s>", 0], ["<unk>", 0]]}},
     r"special ids are not(.|\n)*</s> = 1"),
    ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "*no base64*"}}, "map is damaged"),
])
def test_tokenizers_that_cannot_be_used(written, tmp_path, changes, words):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_with(written, **changes)))
    with pytest.raises(InputError, match=words):
        hf_tokenizer.read_vocabulary(storage.as_path(tmp_path))


@pytest.mark.parametrize("changes", [
    {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}]}},
])
def test_what_sentencepiece_cannot_stand_for_stays_as_it_is(written, texts, tmp_path, changes):
    folder, _ = written
    (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    values = tokenizer_with(written, **changes)
    values["model"]["vocab"] += [["x9", -3.0]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    found = hf_tokenizer.read_vocabulary(storage.as_path(tmp_path))
    assert not found.is_sentencepiece and "as it is" in found.notes[0]
    ours = Vocabulary.from_bytes(found.contents)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in [*texts[:200], *ODD, "IN 2024"]:
        assert [*ours.encode(text), 1] == theirs(text).input_ids


def test_a_damaged_spiece_model(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"Not a SentencePiece model(.|\n)*spiece.model"):
        hf_tokenizer.read_vocabulary(storage.as_path(tmp_path))


def test_a_vocabulary_of_another_size(vocabulary_proto):
    def config(rows):
        return T5Config(rows, 8, 1, 8, 8, 1, 1)

    for rows in (312, 320, 384, 439):
        tree_checks.check_vocabulary(vocabulary_proto, config(rows), "here")
    for rows in (311, 440, 32128):
        with pytest.raises(InputError, match=f"not that of the embedding(.|\n)*{rows} rows"):
            tree_checks.check_vocabulary(vocabulary_proto, config(rows), "here")
