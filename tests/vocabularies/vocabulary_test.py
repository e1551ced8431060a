"""Vocabularies equal SeqIO's on the same file, and are trained alike each time."""

import random

import pytest
from sentencepiece import sentencepiece_model_pb2

from elm_jax.errors import InputError
from elm_jax.vocabularies import vocabulary
from elm_jax.vocabularies.vocabulary import SentencePieceVocabulary, Vocabulary

TEXT = """the market of old town rose fell quickly after heavy rain over green hills where seven
farmers sold apples pears bread and cheese to people from distant rivers"""
SIZE = 50
"""Trained pieces."""


def make_texts(count: int = 300, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(TEXT.split(), k=draw.randint(4, 20))) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "v.model"
    vocabulary.train_vocabulary(make_texts(), path, SIZE, seed=0)
    return path


def test_equals_seqio(path):
    seqio = pytest.importorskip("seqio")
    for extra_ids in (100, 7):
        ours = SentencePieceVocabulary(path.read_bytes(), extra_ids)
        theirs = seqio.SentencePieceVocabulary(str(path), extra_ids=extra_ids)
        assert ours.size == theirs.vocab_size == SIZE + extra_ids
        texts = [*make_texts(50, seed=1), "", "  two  spaces\nand lines ", "Ünseen 字 42",
                 "the <extra_id_0> market <extra_id_6> rose"]
        for text in texts:
            ids = ours.encode(text)
            assert ids == theirs.encode(text)
            assert ours.decode(ids) == theirs.decode(ids)
        draw = random.Random(0)
        for _ in range(50):
            ids = [draw.randrange(ours.size + 30) for _ in range(12)]
            assert ours.decode(ids) == theirs.decode(ids)


def test_a_file_with_its_own_sentinels_gets_no_others(path, tmp_path):
    """As mT5's, whose last 100 pieces they are."""
    seqio = pytest.importorskip("seqio")
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    for number in reversed(range(100)):
        model.pieces.add(piece=f"▁<extra_id_{number}>", score=0.0, type=4)
    (tmp_path / "mt5.model").write_bytes(model.SerializeToString())
    ours, t5 = Vocabulary.load(tmp_path / "mt5.model"), Vocabulary.load(path)
    assert (ours.size, ours.extra_ids, ours.added_ids) == (SIZE + 100, 100, 0)
    assert (t5.size, t5.extra_ids, t5.added_ids) == (SIZE + 100, 100, 100)
    theirs = seqio.SentencePieceVocabulary(str(tmp_path / "mt5.model"), extra_ids=0)
    for text in [*make_texts(20, seed=2), "the <extra_id_0> market <extra_id_6> rose"]:
        assert ours.encode(text) == theirs.encode(text) == t5.encode(text)
    assert ours.sentinel_id(3) == SIZE + 96 == ours.encode("<extra_id_3>")[0]
    with open(ours.file(), "rb") as file:
        assert file.read() == ours.contents == (tmp_path / "mt5.model").read_bytes()


def test_special_ids_are_those_of_t5(path):
    ours = Vocabulary.load(path)
    assert ours.size == SIZE + 100
    assert ours.encode("<extra_id_0>") == [SIZE + 99] == [ours.sentinel_id(0)]
    assert ours.encode("the <extra_id_99>")[-1] == SIZE == ours.sentinel_id(99)
    assert vocabulary.UNK_ID in ours.encode("字")
    assert vocabulary.EOS_ID not in ours.encode("the </s> market <pad>")
    assert ours.decode([*ours.encode("old town"), 1, *ours.encode("rain")]) == "old town"
    with pytest.raises(InputError, match=r"(?s)no such sentinel.*100.*0 to 99"):
        ours.sentinel_id(100)


def test_decode_inverts_encode(path):
    ours = Vocabulary.load(path)
    for text in make_texts(50, seed=2):
        assert ours.decode(ours.encode(text)) == text


def test_training_is_deterministic_and_the_fingerprint_tells_models_apart(path, tmp_path):
    again = vocabulary.train_vocabulary(make_texts(), tmp_path / "again.model", SIZE, seed=0)
    assert (tmp_path / "again.model").read_bytes() == path.read_bytes()
    first = Vocabulary.load(path)
    assert again.fingerprint == first.fingerprint
    other = vocabulary.train_vocabulary(make_texts(seed=5), tmp_path / "other.model", SIZE, seed=0)
    smaller = SentencePieceVocabulary(path.read_bytes(), extra_ids=5)
    assert len({first.fingerprint, other.fingerprint, smaller.fingerprint}) == 3


def test_long_texts_are_not_skipped(tmp_path):
    texts = [*make_texts(), "zebra " * 3000]  # 18,000 bytes; the trainer's own limit is 4,192
    trained = vocabulary.train_vocabulary(texts, tmp_path / "v.model", SIZE, seed=0)
    assert vocabulary.UNK_ID not in trained.encode("zebra")


def test_too_few_texts_are_one_clear_error(tmp_path):
    with pytest.raises(InputError, match=r"(?s)cannot be trained.*v\.model.*5000 pieces"):
        vocabulary.train_vocabulary(["one line"], tmp_path / "v.model", 5000, seed=0)
    assert not (tmp_path / "v.model").exists()


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"(?s)no vocabulary here.*none\.model"):
        Vocabulary.load(tmp_path / "none.model")
    for content in (b"", b"no model at all"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(InputError, match=r"(?s)Not a SentencePiece model.*bad\.model"):
            Vocabulary.load(tmp_path / "bad.model")


def test_other_special_ids_are_refused(tmp_path):
    import sentencepiece

    def trained(name: str, **ids: int) -> str:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(make_texts()), model_prefix=str(tmp_path / name), vocab_size=SIZE,
            minloglevel=2, **ids)
        return str(tmp_path / f"{name}.model")

    with pytest.raises(InputError, match=r"(?s)lacks a special id.*plain\.model"):  # it has no padding
        Vocabulary.load(trained("plain"))
    path = trained("llama", pad_id=3)  # EOS 2, as Llama's
    other = Vocabulary.load(path)
    assert (other.pad_id, other.eos_id) == (3, 2)
    assert other.decode([*other.encode("the market"), 2, *other.encode("no more")]) == "the market"
    with pytest.raises(InputError, match=r"(?s)special ids are not.*llama\.model.*EOS = 2.*EOS = 1"):
        other.check_ids(0, 1, path)
