"""The sentence encoder against transformers' BERT and sentence-transformers, and its strictness."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from elm_jax.errors import InputError
from elm_jax.models.bert import sentence_encoder
from elm_jax.runtime import trees

CONFIG = sentence_encoder.SentenceEncoderConfig(
    vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
    max_position_embeddings=20, type_vocab_size=2, layer_norm_eps=1e-12, max_seq_length=16,
)  # fmt: skip


def rows(rng: np.random.Generator, lengths: list[int], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Random token rows, and their mask."""
    mask = (np.arange(width)[None] < np.array(lengths)[:, None]).astype(np.int32)
    return rng.integers(1, CONFIG.vocab_size, mask.shape).astype(np.int32), mask


@pytest.fixture(scope="module")
def bert():
    """transformers' BERT of the tiny config with random weights, and its tensors."""
    import torch
    import transformers

    torch.manual_seed(0)
    values = dataclasses.asdict(CONFIG) | {"layer_norm_eps": 1e-12, "initializer_range": 0.5}
    values.pop("max_seq_length")
    model = transformers.BertModel(transformers.BertConfig(**values, hidden_act="gelu")).eval()
    with torch.no_grad():  # norms and biases start at 1 and 0, which would hide a swap
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model, {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.fixture
def folder(tmp_path, bert):
    """A sentence-transformers folder of the tiny encoder."""
    (tmp_path / "1_Pooling").mkdir()
    facts = dataclasses.asdict(CONFIG) | {"model_type": "bert", "hidden_act": "gelu"}
    length = {"max_seq_length": facts.pop("max_seq_length")}
    pooling = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    for name, value in (("config.json", facts), ("sentence_bert_config.json", length),
                        ("1_Pooling/config.json", pooling)):  # fmt: skip
        (tmp_path / name).write_text(json.dumps(value))
    safetensors.numpy.save_file(bert[1], tmp_path / "model.safetensors")
    return tmp_path


def test_agrees_with_transformers_mean_of_last_hidden_states(folder, bert):
    import torch

    config, params = sentence_encoder.load_sentence_encoder(folder)
    assert config == CONFIG
    tokens, mask = rows(np.random.default_rng(0), [16, 3, 9, 1], 16)
    with torch.no_grad():
        output = bert[0](torch.tensor(tokens), torch.tensor(mask))
    hidden = output.last_hidden_state.double().numpy()
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(
        sentence_encoder.encode(config, params, tokens, mask), expected, atol=2e-6
    )


def test_padding_and_neighbours_change_nothing(folder):
    config, params = sentence_encoder.load_sentence_encoder(folder)
    rng = np.random.default_rng(1)
    tokens, mask = rows(rng, [5, 12, 7], 12)
    together = np.asarray(sentence_encoder.encode(config, params, tokens, mask))
    for row, length in ((0, 5), (2, 7)):
        alone = sentence_encoder.encode(config, params, tokens[row : row + 1, :length],
                                        mask[row : row + 1, :length])  # fmt: skip
        np.testing.assert_allclose(alone[0], together[row], atol=1e-6)
    garbage = np.where(mask == 1, tokens, rng.integers(1, CONFIG.vocab_size, tokens.shape))
    np.testing.assert_array_equal(
        sentence_encoder.encode(config, params, garbage.astype(np.int32), mask), together
    )
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


def test_a_row_without_tokens_is_zero_not_nan(folder):
    config, params = sentence_encoder.load_sentence_encoder(folder)
    tokens, mask = rows(np.random.default_rng(2), [0, 4], 8)
    result = np.asarray(sentence_encoder.encode(config, params, tokens, mask))
    assert not result[0].any() and np.isfinite(result).all()


def test_every_leaf_has_a_tensor():
    row = np.zeros((1, 2), np.int32)
    params = jax.eval_shape(
        sentence_encoder.SentenceEncoder(CONFIG).init, jax.random.key(0), row, row
    )["params"]
    assert trees.flatten(params).keys() == sentence_encoder.tensor_names(CONFIG).keys()


def test_all_faults_of_the_weights_are_listed(bert):
    tensors = {name: tensor for name, tensor in bert[1].items() if "position_ids" not in name}
    del tensors["encoder.layer.1.output.dense.bias"]
    tensors["encoder.layer.2.output.dense.bias"] = np.zeros(24, np.float32)
    tensors["embeddings.LayerNorm.weight"] = np.ones(23, np.float32)
    wide = "encoder.layer.0.intermediate.dense.weight"
    tensors[wide] = tensors[wide].T  # [inputs, outputs]: would fit a square kernel unseen
    narrow = "encoder.layer.0.attention.self.query.bias"
    tensors[narrow] = tensors[narrow].astype(np.float16)
    with pytest.raises(InputError) as error:
        sentence_encoder.params_from_tensors(tensors, CONFIG, "weights")
    for part in ("5 faults", "missing encoder.layer.1.output.dense.bias",
                 "unexpected encoder.layer.2.output.dense.bias",
                 "misshaped embeddings.LayerNorm.weight: float32[23], expected float32[24]",
                 f"misshaped {wide}: float32[24, 40], expected float32[40, 24]",
                 f"misshaped {narrow}: float16[24], expected float32[24]"):  # fmt: skip
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"hidden_act": "gelu_new"}, "hidden_act"),
        ("config.json", {"model_type": "roberta"}, "model_type"),
        ("config.json", {"num_attention_heads": 5}, "a multiple of 5"),
        ("config.json", {"vocab_size": 0}, "vocab_size"),
        ("sentence_bert_config.json", {"max_seq_length": 21}, "max_seq_length"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "pooling_mode_cls_token"),
        ("1_Pooling/config.json", {"pooling_mode_lasttoken": True}, "pooling_mode_lasttoken"),
        ("1_Pooling/config.json", {"pooling_mode": "cls"}, "pooling_mode\n  got: cls"),
        ("config_sentence_transformers.json", {"truncate_dim": 8}, "truncate_dim"),
    ],
)
def test_another_kind_of_encoder_is_refused(folder, file, change, message):
    values = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(values | change))
    with pytest.raises(InputError, match=message):
        sentence_encoder.load_sentence_encoder(folder)


def test_modules_that_are_not_computed_here_are_named(folder):
    modules = [{"idx": n, "type": f"sentence_transformers.models.{name}"}
               for n, name in enumerate(("Transformer", "Pooling", "Dense", "Normalize"))]
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match=r"json: type\n  got: Transformer, Pooling, Dense, Normalize"):
        sentence_encoder.load_sentence_encoder(folder)
    for kept in (modules[:2], [*modules[:2], modules[3]]):
        (folder / "modules.json").write_text(json.dumps(kept))
        sentence_encoder.load_sentence_encoder(folder)


@pytest.mark.parametrize(("values", "message"), [
    ({"default_prompt_name": "query"}, "_prompt_name\n  got: 'query'\n  expected: one of prompts: none"),
    ({"default_prompt_name": "query", "prompts": {"doc": "d: "}}, "one of prompts: doc"),
    ({"default_prompt_name": 1, "prompts": [1]}, "default_prompt_name"),
    ({"default_prompt_name": "query", "prompts": {"query": None}}, "default_prompt_name"),
])
def test_prompts_that_are_not_there(folder, values, message):
    (folder / "config_sentence_transformers.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        sentence_encoder.read_prompt(folder)


def test_damaged_files_are_input_errors(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="weights cannot be read"):
        sentence_encoder.load_sentence_encoder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        sentence_encoder.load_sentence_encoder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"File does not exist[\s\S]*config\.json"):
        sentence_encoder.load_sentence_encoder(folder)
