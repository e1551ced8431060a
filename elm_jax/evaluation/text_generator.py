"""Generates texts with any network: for batches of unequal prompts, or for one prompt piece by piece.

Rows are padded to few widths, so that few programs are compiled; the loop over tokens stays on the device.
"""

import collections
import hashlib
import itertools
from collections.abc import Generator, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from elm_jax.data.arrays.batch_forms import form_of
from elm_jax.data.arrays.batches import Tokens, pad_prompts, padded
from elm_jax.errors import InputError, describe
from elm_jax.evaluation.answer_text import CONTEXT, LENGTH, Answer, AnswerText
from elm_jax.evaluation.generation_settings import GenerationSettings
from elm_jax.models.decode import Decoding, Rules, advance, begin
from elm_jax.models.network import TASK_IDS, Network, context_of, ends_of
from elm_jax.models.sampling import Sampling, row_keys
from elm_jax.types import Array, Params
from elm_jax.vocabularies.vocabulary import Vocabulary

MOST_ROWS = 8
"""Prompts that are decoded together."""
STEPS = 8
"""Tokens between two looks at stop strings, and between two pieces of a streamed text but the first ones."""
SMALLEST = 16
"""The least width of a batch of prompts, and the least number of steps that a cache holds."""


class TextGenerator:
    """Generates texts with one model.

    Attributes:
        network: of the model.
        params: on the device.
        vocabulary: of its base.
        task: number of the task that all prompts are of, for a network whose gates read tasks; None for
            others.
    """

    def __init__(self, network: Network, params: Params, vocabulary: Vocabulary, task: int | None = None
                 ) -> None:
        """Puts the parameters onto the first device, unless they are on devices already."""
        self.network, self.vocabulary, self.task = network, vocabulary, task
        self.params = jax.tree.map(jnp.asarray, params)
        self._form, self._ends = form_of(network), ends_of(network.config)
        self._context = context_of(network.config)

    def prompt(self, text: str, where: str = "the prompt", room: int | None = None) -> Tokens:
        """Encodes a text as a prompt, with the tokens that this network's prompts have at their ends.

        A text that begins with BOS already, as chat templates write it, gets no second one.

        Args:
            text: of the prompt.
            where: it came from, for the error.
            room: tokens of the context that are kept free behind it: what does not fit is cut on the left.
                None cuts nothing.

        Raises:
            InputError: the context does not hold the prompt and one token more.
        """
        tokens = [*self.vocabulary.encode(text), self.vocabulary.eos_id]
        tokens = np.asarray(tokens[1:] if tokens[0] == self._form.ids.bos else tokens, np.int32)
        if room is not None and self._context is not None and self._context > room:
            tokens = self._form.last_of(tokens, self._context - room)
        prompt = self._form.prompt(tokens, len(tokens) + 1)
        if self._context is not None and len(prompt) >= self._context:
            raise InputError(describe(
                "A prompt is longer than the network's context", where=where, got=f"{len(prompt)} tokens",
                expected=f"at most {self._context - 1}, so that a token more fits in",
                cure="shorten the text"))
        return prompt

    def answer(self, prompts: Sequence[Tokens], settings: GenerationSettings, front: str = ""
               ) -> list[Answer]:
        """Generates one text a prompt, `MOST_ROWS` together; the order of the prompts changes no text.

        Args:
            prompts: of `prompt`.
            settings: of all of them.
            front: left out of texts that begin with it (see `AnswerText`).
        """
        words = row_words(prompts)
        answers: dict[int, Answer] = {}
        for numbers in self._batches(prompts, settings):
            own = [prompts[number] for number in numbers]
            texts = self._texts(own, settings, front)
            # Without stop strings no look at the tokens is needed before all rows have ended.
            steps = STEPS if settings.stop else settings.max_new_tokens
            for _ in self._decode(texts, own, words[numbers], settings, itertools.repeat(steps)):
                pass
            answers.update((number, text.answer) for number, text in zip(numbers, texts, strict=True))
        return [answers[number] for number in range(len(prompts))]

    def stream(self, prompt: Tokens, settings: GenerationSettings, before: int = 0, front: str = ""
               ) -> Generator[str, None, Answer]:
        """Generates one text and yields it piece by piece; returns the whole. The text is `answer`'s.

        Args:
            prompt: of `prompt`.
            settings: of the text.
            before: how often the same prompt was asked before: each time it is drawn anew.
            front: as for `answer`.
        """
        texts, words = self._texts([prompt], settings, front), row_words([prompt] * (before + 1))[-1:]
        for pieces in self._decode(texts, [prompt], words, settings, _growing(STEPS)):
            if pieces[0]:
                yield pieces[0]
        return texts[0].answer

    def _limit(self, prompt: Tokens, settings: GenerationSettings) -> tuple[int, str]:
        """Most tokens that may follow a prompt, and the reason."""
        room = settings.max_new_tokens if self._context is None else self._context - len(prompt)
        return (settings.max_new_tokens, LENGTH) if settings.max_new_tokens <= room else (room, CONTEXT)

    def _texts(self, prompts: Sequence[Tokens], settings: GenerationSettings, front: str
               ) -> list[AnswerText]:
        return [AnswerText(self.vocabulary, self._ends, settings.stop, self._limit(prompt, settings), front)
                for prompt in prompts]

    def _batches(self, prompts: Sequence[Tokens], settings: GenerationSettings) -> Iterator[list[int]]:
        """Numbers of prompts that are decoded together, of about one length.

        One that the context does not let grow to `max_new_tokens` is decoded alone: beside a longer one its
        row would be longer than the context.
        """
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        alone = [number for number in order if self._limit(prompts[number], settings)[1] == CONTEXT]
        order = [number for number in order if number not in set(alone)]
        yield from (order[start:start + MOST_ROWS] for start in range(0, len(order), MOST_ROWS))
        yield from ([number] for number in alone)

    def _shape(self, longest: int, limit: int) -> tuple[int, int]:
        """Width of the prompts' rows, and steps that the cache holds; together within the context."""
        width, steps = width_of(longest), width_of(limit)
        if self._context is None or width + steps <= self._context:
            return width, steps
        return min(width, self._context - limit), limit

    def _decode(self, texts: Sequence[AnswerText], prompts: Sequence[Tokens], words: np.ndarray,
                settings: GenerationSettings, steps: Iterator[int]) -> Iterator[list[str]]:
        """Decodes a batch until all texts have ended; yields their new pieces after each of `steps`."""
        rows = 1 << (len(prompts) - 1).bit_length()
        width, most = self._shape(max(map(len, prompts)), max(text.limit for text in texts))
        batch = pad_prompts([*prompts, *prompts[:1] * (rows - len(prompts))], rows, width, self._form.ids.pad)
        if self.task is not None:
            batch = {**batch, TASK_IDS: np.full(rows, self.task, np.int32)}
        limits = np.asarray([text.limit for text in texts] + [0] * (rows - len(texts)), np.int32)
        rules = Rules(np.asarray(self._ends, np.int32), limits,
                      *_sampling(settings, np.resize(words, (rows, words.shape[1]))))
        state = begin(self.network, self.params, padded(batch, "inputs"), limits,
                      max_length=most)
        while any(text.answer is None for text in texts):
            state = advance(self.network, self.params, state, rules, np.int32(next(steps)))
            pieces, state = _read(texts, state)
            yield pieces


def _read(texts: Sequence[AnswerText], state: Decoding) -> tuple[list[str], Decoding]:
    """Gives new tokens to the texts; returns their new pieces, and the state in which ended texts rest."""
    count = int(state.index)
    tokens = np.array(state.tokens[:, :count])  # a copy: the next call uses the state up
    pieces = [text.add(row) for text, row in zip(texts, tokens, strict=False)]
    ended = np.array(state.ended)
    stopped = np.asarray([text.answer is not None for text in texts] + [True] * (len(ended) - len(texts)))
    if (stopped & ~ended).any():
        state = state._replace(ended=jnp.asarray(ended | stopped))
    return pieces, state


def _sampling(settings: GenerationSettings, words: np.ndarray) -> tuple[Sampling | None, Array | None]:
    if not settings.samples:
        return None, None
    values = Sampling(np.float32(settings.temperature),
                      None if settings.top_k is None else np.int32(settings.top_k),
                      None if settings.top_p is None else np.float32(settings.top_p))
    return values, row_keys(settings.seed or 0, words)


def row_words(prompts: Sequence[Tokens]) -> np.ndarray:
    """Hashes each prompt to u32[B, 2]; the second of two equal prompts has another hash than the first."""
    counts: collections.Counter[bytes] = collections.Counter()
    words = []
    for prompt in prompts:
        contents = np.asarray(prompt, "<i4").tobytes()
        digest = hashlib.sha256(contents + b"#%d" % counts[contents]).digest()
        counts[contents] += 1
        words.append(np.frombuffer(digest[:8], "<u4"))
    return np.asarray(words, np.uint32).reshape(len(words), 2)


def width_of(length: int) -> int:
    """The smallest width of 16, 24, 32, 48, 64, 96 and so on that holds `length`."""
    power = max(SMALLEST, 1 << (length - 1).bit_length())
    between = power * 3 // 4
    return between if length <= between and between > SMALLEST else power


def _growing(most: int) -> Iterator[int]:
    """1, 2, 4 and so on, up to `most`, then always that: the first pieces come soon."""
    size = 1
    while True:
        yield size
        size = min(2 * size, most)
