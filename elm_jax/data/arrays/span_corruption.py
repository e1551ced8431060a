"""Pretraining objectives over raw passages: span corruption and prefix language modelling.

Sources: Raffel et al. 2020, https://arxiv.org/abs/1910.10683: sections 3.1.4 (15% of the tokens are
noise, each run of it is replaced by one sentinel), 3.3.4 (spans of mean length 3) and 3.3.1 (prefix
LM). Both in one run, for a base that can be prompted: the LM adaptation of Lester et al. 2021,
https://arxiv.org/abs/2104.08691, section 2.2, done from the start.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np

from elm_jax.errors import InputError, describe
from elm_jax.vocabularies.vocabulary import Vocabulary

NOISE_DENSITY = 0.15
MEAN_SPAN_LENGTH = 3.0
MIN_CHUNK = 8
"""Chunks of fewer tokens are left out: nothing can be learnt from them."""
MAX_CHUNK = 2000
"""Tokens whose noise spans take up T5's 100 sentinels."""


@dataclasses.dataclass(frozen=True)
class PretrainingSource:
    """Pretraining examples, one for each chunk of a passage, with new noise in every epoch.

    Attributes:
        chunks: i32[n] token ids of each chunk, without EOS.
        sentinels: i32[n] ids of sentinels 0, 1 and so on, as many as a chunk may need.
        prefix_lm_share: share of chunks that become prefix-LM examples, drawn again every epoch.
        seed: of the noise.
        eos_id: ends inputs and targets.
    """

    chunks: tuple[np.ndarray, ...]
    sentinels: np.ndarray
    prefix_lm_share: float
    seed: int
    eos_id: int

    @classmethod
    def from_texts(cls, texts: Iterable[str], vocabulary: Vocabulary, *, chunk_length: int,
                   prefix_lm_share: float, seed: int) -> "PretrainingSource":
        """Tokenises passages and cuts them into chunks; a chunk never spans two passages.

        Raises:
            InputError: no passage gives a chunk of enough tokens, a number is out of range, or the
                vocabulary has fewer sentinels than span corruption needs.
        """
        for what, value, low, high in (("chunk_length", chunk_length, MIN_CHUNK, MAX_CHUNK),
                                       ("prefix_lm_share", prefix_lm_share, 0, 1)):
            if not low <= value <= high:
                raise InputError(describe("A pretraining setting is out of range", where=what,
                                          got=value, expected=f"{low} to {high}"))
        sentinels = _sentinels(vocabulary, chunk_length if prefix_lm_share < 1 else 0)
        chunks = []
        for text in texts:
            ids = vocabulary.encode(" ".join(text.split()))
            for start in range(0, len(ids), chunk_length):
                chunk = np.asarray(ids[start:start + chunk_length], np.int32)
                if len(chunk) >= MIN_CHUNK:
                    chunks.append(chunk)
        if not chunks:
            raise InputError(describe("No passage is long enough to pretrain on",
                                      expected=f"passages of {MIN_CHUNK} tokens or more"))
        return cls(tuple(chunks), sentinels, prefix_lm_share, seed, vocabulary.eos_id)

    def __len__(self) -> int:
        return len(self.chunks)

    def example(self, index: int, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Returns (inputs i32[n], targets i32[m]) of a chunk: a function of (seed, epoch, index)."""
        rng = np.random.default_rng((self.seed, epoch, index))
        chunk = self.chunks[index]
        if rng.random() < self.prefix_lm_share:
            return prefix_lm(chunk, rng, self.eos_id)
        return span_corruption(chunk, noise_mask(len(chunk), rng), self.sentinels, self.eos_id)


def _sentinels(vocabulary: Vocabulary, chunk_length: int) -> np.ndarray:
    """Ids of as many sentinels as chunks of at most `length` tokens can have noise spans."""
    noise, spans = _noise(chunk_length, NOISE_DENSITY, MEAN_SPAN_LENGTH) if chunk_length else (0, 0)
    if vocabulary.extra_ids < spans:
        raise InputError(describe(
            "The vocabulary has too few sentinels for span corruption", where="pretraining",
            got=vocabulary.extra_ids,
            expected=f"{spans}, one for each span of the {noise} noise tokens of a chunk of {chunk_length}",
            cure="choose shorter chunks, prefix_lm_share = 1, or a vocabulary with <extra_id_0> and so on"))
    return np.array([vocabulary.sentinel_id(number) for number in range(spans)], np.int32)


def prefix_lm(chunk: np.ndarray, rng: np.random.Generator, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits a chunk at a random point into an input and a target, EOS-terminated; neither is empty."""
    cut = int(rng.integers(1, len(chunk)))
    return _with_eos(chunk[:cut], eos_id), _with_eos(chunk[cut:], eos_id)


def noise_mask(length: int, rng: np.random.Generator, density: float = NOISE_DENSITY,
               mean_span: float = MEAN_SPAN_LENGTH) -> np.ndarray:
    """Draws random noise spans: bool[length], True where a token is to be predicted.

    ``round(length * density)`` tokens (at least 1, at most length - 1) are noise, in
    ``round(noise / mean_span)`` spans (at least 1); lengths of noise and of kept spans are uniformly
    random compositions; the sequence starts with a kept span.
    """
    noise, spans = _noise(length, density, mean_span)
    kept_lengths = _composition(length - noise, spans, rng)
    noise_lengths = _composition(noise, spans, rng)
    lengths = np.stack([kept_lengths, noise_lengths], axis=1).reshape(-1)
    return np.repeat(np.tile([False, True], spans), lengths)


def _noise(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """Number of noise tokens and of noise spans in a chunk of `length` tokens."""
    noise = min(max(round(length * density), 1), length - 1)
    return noise, min(max(round(noise / mean_span), 1), length - noise)


def _composition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Splits `total` into an ordered sum of `parts` positive integers, uniformly at random."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def span_corruption(chunk: np.ndarray, mask: np.ndarray, sentinels: np.ndarray,
                    eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Replaces each noise span by one sentinel; the target lists sentinels and spans.

    Args:
        chunk: i32[n].
        mask: bool[n], True where a token is noise.
        sentinels: i32[n] ids of at least as many sentinels as there are spans, sentinel 0 first.
        eos_id: ends both.

    Returns:
        (inputs, targets), EOS-terminated, e.g. ``a b <0> e </s>`` and ``<0> c d </s>``.
    """
    starts = mask & ~np.concatenate([[False], mask[:-1]])
    marks = sentinels[np.maximum(np.cumsum(starts) - 1, 0)]
    inputs = np.where(starts, marks, chunk)[~mask | starts]
    numbers = np.flatnonzero(mask)
    targets: list[int] = []
    for position in numbers:
        if starts[position]:
            targets.append(int(marks[position]))
        targets.append(int(chunk[position]))
    return _with_eos(inputs, eos_id), _with_eos(np.asarray(targets), eos_id)


def _with_eos(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    return np.append(tokens, eos_id).astype(np.int32)


def check_overlap(passages: Sequence[str], forbidden: Iterable[str], words: int = 12) -> dict[int, str]:
    """Finds the passages that contain forbidden text.

    Args:
        passages: what pretraining sees.
        forbidden: texts that it must not see: prompted inputs, answers, rows of unseen data sets.
        words: length of the runs of words that are compared, whatever their case, white space and
            punctuation. A forbidden text of fewer words must be a whole passage to count: short
            answers stand in any text.

    Returns:
        Passage number -> the first shared run of words.
    """
    runs: dict[tuple[str, ...], str] = {}
    for text in forbidden:
        found = _words(text)
        if len(found) < words:
            runs[tuple(found)] = text
        for start in range(len(found) - words + 1):
            runs[tuple(found[start:start + words])] = text
    overlaps = {}
    for number, passage in enumerate(passages):
        found = _words(passage)
        candidates = [tuple(found)] + [
            tuple(found[start:start + words]) for start in range(len(found) - words + 1)]
        shared = next((run for run in candidates if run and run in runs), None)
        if shared is not None:
            overlaps[number] = " ".join(shared)
    return overlaps


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
