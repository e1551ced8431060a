"""Every family that T5X can express, by way of this program: every bit, the logits, the greedy texts.

The peers are real T5X, with its own network, checkpoints and decoding, and transformers.
"""

import hf_folders
import numpy as np
import pytest
import t5x_checkpoints as made
import torch
from t5_rows import rows

from elm_jax.experts.base import load_base
from elm_jax.models.decode import greedy
from elm_jax.models.t5.network import T5Network, shift_right
from elm_jax.workflows.convert.convert_model import ConvertConfig, convert

try:
    import jax
    from t5x_peers import as_saved, flat, initial
except ImportError as error:
    pytest.skip(f"real T5X cannot be imported ({error}); it is on no package index", allow_module_level=True)

pytestmark = pytest.mark.slow
ROWS, SOURCE_LENGTH, LENGTH = 50, 10, 8
CASES = [*((family, form) for family in made.GENERATIONS for form in ("minimal", "scalable")),
         ("t5_1_0_tied", "scalable_unscanned"), ("t5_1_1_untied", "scalable_unscanned")]
_logits = jax.jit(lambda network, params, batch: network.logits(params, batch), static_argnums=0)


@pytest.fixture(autouse=True)
def t5x_promotes_ranks():
    """T5X adds arrays of different ranks, which this program's tests forbid."""
    with jax.numpy_rank_promotion("allow"):
        yield


def tokens(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of unlike lengths, and decoder inputs."""
    draw = np.random.default_rng(6)
    inputs, targets = (hf_folders.tokens(draw, ROWS, size, vocab_size) for size in (SOURCE_LENGTH, LENGTH))
    return inputs, np.asarray(shift_right(targets))


def texts_of(base, inputs: np.ndarray) -> np.ndarray:
    """Greedy texts of this program; they differ, so that comparing them says something."""
    texts = np.asarray(greedy(T5Network(base.config), base.params, rows(inputs), max_length=LENGTH))
    assert len({tuple(row) for row in texts}) > 10
    return texts


@pytest.mark.parametrize(("family", "form"), CASES)
def test_t5x_to_elm_to_t5x(tmp_path, family, form):
    """A checkpoint that T5X made; T5X decodes from what came back, this program from what lay between."""
    config = made.config(family)
    of_t5x, state = initial(config, form, lively=True)
    of_t5x.save(tmp_path / "run", state, "zarr" if form == "scalable" else "orbax", "float32")
    convert(ConvertConfig(str(tmp_path / "run"), "t5x", str(tmp_path / "base"), "elm"))
    convert(ConvertConfig(str(tmp_path / "base"), "elm", str(tmp_path / "back"), "t5x"))
    back = of_t5x.restore(tmp_path / "back" / "checkpoint_1234", training=False, use_orbax=True).params
    made.assert_same(flat(back), as_saved(state, "float32"))
    inputs, decoder_inputs = tokens(config.vocab_size)
    base = load_base(tmp_path / "base")
    assert (base.config, base.name) == (config, "base")
    theirs = of_t5x.logits(back, inputs, decoder_inputs)
    batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": decoder_inputs}
    difference = np.abs(theirs - np.asarray(_logits(T5Network(config), base.params, batch))).max()
    print(f"{family}, {form}: logits differ by {difference:.1e} of {np.abs(theirs).max():.1f}")
    assert difference < 1e-4 and theirs.std() > 0.1
    np.testing.assert_array_equal(of_t5x.greedy(back, inputs, LENGTH), texts_of(base, inputs))


@pytest.mark.parametrize("form", ["minimal", "scalable"])
@pytest.mark.parametrize("family", sorted(hf_folders.PUBLISHED))
def test_hf_to_t5x_to_hf(tmp_path, family, form):
    """T5X decodes what transformers made, as transformers does; and every bit goes back."""
    model = hf_folders.build(family, seed=1)
    hf_folders.publish(model, family, tmp_path / "source")
    convert(ConvertConfig(
        str(tmp_path / "source"), "hf", str(tmp_path / "t5x"), "t5x", scanned=form == "scalable"))
    convert(ConvertConfig(str(tmp_path / "t5x"), "t5x", str(tmp_path / "back"), "hf"))
    hf_folders.assert_same_bits(hf_folders.stored(tmp_path / "source"), hf_folders.stored(tmp_path / "back"))
    config = load_base(tmp_path / "source").config
    of_t5x, _ = initial(config, form)
    params = of_t5x.restore(tmp_path / "t5x" / "checkpoint_0", training=False, use_orbax=True).params
    inputs, decoder_inputs = tokens(config.vocab_size)
    feed = {"input_ids": torch.tensor(inputs).long(), "attention_mask": torch.tensor(inputs > 0).long()}
    with torch.no_grad():
        logits = model(**feed, decoder_input_ids=torch.tensor(decoder_inputs).long()).logits.numpy()
        # transformers 5.23 sizes the cache after the encoder's layers, so a deeper decoder needs none.
        texts = model.generate(**feed, max_new_tokens=LENGTH, do_sample=False, use_cache=False).numpy()[:, 1:]
    difference = np.abs(of_t5x.logits(params, inputs, decoder_inputs) - logits).max()
    print(f"{family}, {form}: logits differ by {difference:.1e} of {np.abs(logits).max():.1f}")
    assert difference < 1e-4
    texts = np.pad(texts, ((0, 0), (0, LENGTH - texts.shape[1])))
    np.testing.assert_array_equal(of_t5x.greedy(params, inputs, LENGTH), texts)
    assert len({tuple(row) for row in texts}) > 10
