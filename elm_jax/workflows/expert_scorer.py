"""Scores experts of a library on rows of a task, for routers that look at what experts do.

Rows have answer choices; an expert picks the one of the largest log-probability, as `elm evaluate` does it.
Experts of adapters of one shape are scored in one program, the others one after another.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.preparing.chat_rows import with_chat
from elm_jax.errors import InputError, describe
from elm_jax.evaluation import stacked_evaluator
from elm_jax.evaluation.evaluator import EvaluationSettings, Scoring, evaluate_task
from elm_jax.experts.base import Base
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.library import ExpertLibrary
from elm_jax.experts.overlay import Expert, check_base, resolve
from elm_jax.experts.rendering import frame_of
from elm_jax.runtime import sharding, trees

STACK = 8
"""Most experts of one program."""


@dataclasses.dataclass(frozen=True)
class ScoredRow:
    """One row to score experts on.

    Attributes:
        inputs: the prompt.
        choices: at least two answers.
        target: the right one.
    """

    inputs: str
    choices: tuple[str, ...]
    target: str

    def check(self, where: Any) -> "ScoredRow":
        """Returns the row; raises InputError unless it has choices, the target among them."""
        if len(self.choices) < 2:
            raise InputError(describe("A row to score experts on needs answer choices", where=where,
                                      got=f"{len(self.choices)} choices",
                                      expected='a field "choices" with at least two texts'))
        if self.target not in self.choices:
            raise InputError(describe("The right answer is none of a row's choices", where=where,
                                      got=repr(self.target), expected=f"one of {list(self.choices)}"))
        return self


class LibraryScorer:
    """Scores experts of a library on rows of one task: a `RowScorer`.

    Attributes:
        num_rows: that there are.
    """

    def __init__(self, library: ExpertLibrary, base: Base, rows: Sequence[ScoredRow], *,
                 settings: EvaluationSettings | None = None, mesh: Mesh | None = None) -> None:
        """Takes experts and rows; reads no expert yet.

        Args:
            library: an open library.
            base: of its experts.
            rows: of the target task, in an order that stays.
            settings: lengths and budgets.
            mesh: rows are split over its data axis; by default all devices.

        Raises:
            InputError: a row without choices, or the base is not that of the experts.
        """
        self.library, self.base, self.num_rows = library, base, len(rows)
        self.settings = settings or EvaluationSettings()
        self._rows = [row.check(f"row {number}") for number, row in enumerate(rows, start=1)]
        self._scoring = Scoring(self.settings, base.vocabulary,
                                mesh or sharding.make_mesh(len(jax.devices()), 1), base.fingerprint)
        self._loaded: dict[str, Expert] = {}  # adapters alone: a whole model is read whenever it is scored
        for name, entry in library.entries.items():
            check_base(base, entry.card, name)

    def __call__(self, experts: np.ndarray, start: int, end: int) -> np.ndarray:
        """Scores f64[n, rows] of experts i64[n], positions in the library, on rows from `start` to `end`."""
        names = [self.library.index.experts[expert] for expert in experts]
        found: dict[str, list[dict[str, Any]]] = {}
        for group in self._groups(dict.fromkeys(names)):
            found.update(self._score(group, start, end))
        return np.array([[one["correct"] for one in found[name]] for name in names], np.float64)

    def _groups(self, names: Sequence[str]) -> Iterator[list[Expert]]:
        """Experts that fit into one program, at most `STACK` at once."""
        alike: dict[Any, list[Expert]] = {}
        for name in names:
            card = self.library[name].card
            if card.form != "adapter":
                yield [self.library.load(name)]
                continue
            expert = self._loaded.get(name) or self._loaded.setdefault(name, self.library.load(name))
            leaves = [(path, np.shape(leaf)) for path, leaf in sorted(trees.flatten(expert.overlay).items())]
            alike.setdefault(repr((card.rendering, card.network, leaves)), []).append(expert)
        for group in alike.values():
            for first in range(0, len(group), STACK):
                yield group[first:first + STACK]

    def _score(self, experts: Sequence[Expert], start: int, end: int) -> dict[str, list[dict[str, Any]]]:
        """Predictions of each expert of a group for the rows, in their order."""
        split = self._split(experts[0].card, start, end)
        resolved = [resolve(self.base, expert) for expert in experts]  # each fits its own network
        network, names = resolved[0][0], [expert.card.id for expert in experts]
        if len(experts) == 1:
            placed = sharding.put_tree(resolved[0][1], sharding.tree_shardings(
                network.logical_axes(), resolved[0][1], self._scoring.mesh))
            results = [evaluate_task(network, placed, split, self._scoring, names[0])]
        else:
            # A few sizes, so that successive rounds over fewer experts share their programs.
            size = 1 << (len(experts) - 1).bit_length()
            filled = [*experts, *[experts[-1]] * (size - len(experts))]
            params = stacked_evaluator.put_stack(
                network, self.base.params, [expert.overlay for expert in filled], self._scoring.mesh)
            results = stacked_evaluator.evaluate_task_stacked(
                network, params, split, self._scoring, [expert.card.id for expert in filled])
        return {name: result.predictions for name, result in zip(names, results, strict=False)}

    def _split(self, card: ExpertCard, start: int, end: int) -> PreparedSplit:
        """The rows, tokenised, in the rendering of an expert."""
        vocabulary = self.base.vocabulary
        rows = [{
            "inputs": [*vocabulary.encode(row.inputs), vocabulary.eos_id],
            "targets": [*vocabulary.encode_target(row.target), vocabulary.eos_id],
            "choices": [[*vocabulary.encode_target(choice), vocabulary.eos_id] for choice in row.choices],
            "text": {"inputs": row.inputs, "targets": row.target, "choices": list(row.choices),
                     "index": number},
            "label": row.choices.index(row.target),
        } for number, row in enumerate(self._rows[start:end], start=start)]
        info = {"kind": "rank", "dataset": "rows", "config": None, "template": "rows"}
        split = PreparedSplit.from_rows("rows", "rows", info, rows)
        frame = frame_of(self.base, card.rendering, self.settings.source_length, f"the card of {card.id}")
        return split if frame is None else with_chat(split, vocabulary, frame)
