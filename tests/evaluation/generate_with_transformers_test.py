"""Greedy texts of decoders against transformers' `generate`, for prompts of unequal lengths."""

import hf_decoders
import numpy as np
import pytest
import torch

from elm_jax.evaluation.generation_settings import GenerationSettings
from elm_jax.evaluation.text_generator import TextGenerator
from elm_jax.experts.base import load_base
from elm_jax.models import families

NEW = 12
LENGTHS = (7, 3, 18, 1, 25)


class Ids:
    """Token ids as texts."""

    eos_id = 2

    def decode(self, tokens):
        return " ".join(map(str, tokens))


@pytest.mark.parametrize("name", ["llama 3", "gpt2"])
def test_greedy_texts_are_those_of_transformers(name, tmp_path):
    """Llama 3's has two EOS ids."""
    model = hf_decoders.model(name)
    model.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("[{{ messages[0].content }}]")
    base = load_base(tmp_path)
    assert base.chat_template.ask("a") == "[a]"
    draw = np.random.default_rng(1)
    prompts = [draw.integers(6, hf_decoders.VOCAB_SIZE, length).astype(np.int32) for length in LENGTHS]
    expected, ended = [], 0
    for prompt in prompts:
        with torch.no_grad():
            found = model.generate(torch.tensor(prompt)[None].long(), do_sample=False, max_new_tokens=NEW,
                                   pad_token_id=2, eos_token_id=model.config.eos_token_id)[0, len(prompt):]
        tokens = found.tolist()
        ended += len(tokens) < NEW
        expected.append((" ".join(map(str, tokens[:-1] if len(tokens) < NEW else tokens)), len(tokens)))
    generator = TextGenerator(families.network_of(base.config), base.params, Ids())
    answers = generator.answer(prompts, GenerationSettings(max_new_tokens=NEW))
    assert ended or name == "gpt2", "else no row shows that EOS ends it"
    assert [(answer.text, answer.tokens) for answer in answers] == expected
