"""Prepared splits: the rows of a task, tokenised once, as flat arrays that are read without TensorFlow.

Everything downstream of rendering and of SeqIO reads this form. A folder holds

```
info.json      schema version, name, split, number of rows, info; of each array bytes and SHA-256
tokens.npy     i32[tokens]         all sequences of all rows, one after another
sequences.npy  i64[sequences + 1]  where each one starts; per row inputs, targets, choices
rows.npy       i64[rows + 1]       where each row starts in sequences
labels.npy     i32[rows]           index of the right choice, the first of the best; -1 if the row has none
texts.npy      u8[bytes]           one JSON object per row: inputs, targets, choices, index; if the choices
                                   have scores, these; if several texts are right, these as references
text_ends.npy  i64[rows + 1]       where each row starts in texts
```

and a commit marker, written last, which holds the SHA-256 of ``info.json``. `prepared_files` writes, reads
and checks the folder.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from elm_jax.data.arrays import prepared_files
from elm_jax.data.draw import draw_rows
from elm_jax.errors import InputError, describe, in_short
from elm_jax.runtime import storage

KINDS = ("rank", "generation")
PROMPT_CUTS = LEFT, RIGHT = ("left", "right")
"""Sides on which prompts that are too long are cut."""
RENDERINGS = PLAIN, CHAT = ("plain", "chat")
"""How inputs are rendered: as their template has them, or as a user's turn of a base's chat template."""
TEXT_KEYS = ("inputs", "targets", "choices", "index")
OPTIONAL_KEYS = ("scores", "references")


@dataclasses.dataclass(frozen=True)
class PreparedSplit:
    """One split of a task: untrimmed tokens, every sequence ended by EOS, and the rendered texts.

    Attributes:
        name: registered name of the task.
        split: ``train`` or ``validation``.
        info: facts of the task: ``dataset``, ``config``, ``template``, ``kind`` (``rank`` or
            ``generation``), ``choices_expression``, ``vocabulary`` (a fingerprint), ``num_dropped``
            and ``dropped`` (rows left out in rendering, and why), ``cut_prompt`` if it is `LEFT`,
            ``rendering`` if it is `CHAT`, and others.
        arrays: the arrays of the module's docstring, by name.
    """

    name: str
    split: str
    info: dict[str, Any]
    arrays: Mapping[str, np.ndarray]

    def __repr__(self) -> str:
        """Says what it is, without its arrays."""
        return f"PreparedSplit({self.name!r}, {self.split!r}, {len(self)} rows, {self.kind})"

    @classmethod
    def from_rows(
        cls, name: str, split: str, info: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]
    ) -> "PreparedSplit":
        """Packs tokenised rows into flat arrays.

        Args:
            name: registered name of the task.
            split: ``train`` or ``validation``.
            info: see the class; must hold ``kind``.
            rows: each ``{"inputs": i32[n], "targets": i32[n], "choices": [i32[n], ...], "text":
                {"inputs": str, "targets": str, "choices": [str, ...], "index": int}}``. Rows of a
                generation task may leave out ``choices``. The text may have ``scores``, a credit from 0 to
                1 for each choice, and ``references``, all texts that are right. ``label`` may be given;
                without it, it is the first choice of the highest score, or the place of the target's text
                among the choices' texts, -1 if it is not there.

        Raises:
            InputError: no such kind, an empty sequence, or choices whose tokens and texts differ
                in number.
        """
        if info.get("kind") not in KINDS:
            raise InputError(describe("A prepared split needs a kind", where=f"{name} {split}",
                                      got=info.get("kind"), expected=" or ".join(KINDS)))
        tokens: list[np.ndarray] = []
        ends, row_ends, labels, texts, text_ends = [0], [0], [], bytearray(), [0]
        for number, row in enumerate(rows):
            where = f"{name} {split}, row {number}"
            text = _check_text(row["text"], where)
            choices = list(row.get("choices", ()))
            if len(choices) != len(text["choices"]):
                raise InputError(describe(
                    "Choices differ in number", where=where,
                    got=f"{len(choices)} as tokens, {len(text['choices'])} as text"))
            for sequence in (row["inputs"], row["targets"], *choices):
                sequence = np.asarray(sequence, np.int32)
                if sequence.ndim != 1 or not sequence.size:
                    raise InputError(describe("A token sequence is empty or not flat", where=where,
                                              got=f"shape {sequence.shape}"))
                tokens.append(sequence)
                ends.append(ends[-1] + sequence.size)
            row_ends.append(row_ends[-1] + 2 + len(choices))
            labels.append(_label(row, text, where))
            texts += json.dumps(text, ensure_ascii=False).encode()
            text_ends.append(len(texts))
        arrays = {
            "tokens": np.concatenate(tokens) if tokens else np.zeros(0), "sequences": ends,
            "rows": row_ends, "labels": labels, "texts": np.frombuffer(bytes(texts), np.uint8),
            "text_ends": text_ends,
        }
        arrays = {key: np.asarray(value, prepared_files.ARRAYS[key]) for key, value in arrays.items()}
        return cls(name, split, dict(info), arrays)

    def __len__(self) -> int:
        return len(self.arrays["labels"])

    @property
    def kind(self) -> str:
        """``rank`` or ``generation``."""
        return self.info["kind"]

    @property
    def cut_prompt(self) -> str:
        """The side on which prompts that are too long are cut, one of `PROMPT_CUTS`."""
        return self.info.get("cut_prompt", RIGHT)

    def sequences(self, index: int) -> list[np.ndarray]:
        """Returns all token sequences of a row, each i32[n]: inputs, targets, and every choice."""
        first, end = self._row(index)
        ends = self.arrays["sequences"][first:end + 1].tolist()
        tokens = self.arrays["tokens"]
        return [tokens[start:stop] for start, stop in itertools.pairwise(ends)]

    def _sequence(self, position: int) -> np.ndarray:
        ends = self.arrays["sequences"]
        return self.arrays["tokens"][ends[position]:ends[position + 1]]

    def _row(self, index: int) -> tuple[int, int]:
        """Returns the numbers of a row's first sequence and of the one behind its last."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {self.name} {self.split}, which has {len(self)} rows")
        rows = self.arrays["rows"]
        return rows[index], rows[index + 1]

    def inputs(self, index: int) -> np.ndarray:
        """Input tokens of a row, i32[n], ended by EOS, untrimmed."""
        return self._sequence(self._row(index)[0])

    def targets(self, index: int) -> np.ndarray:
        """Target tokens of a row, i32[n], ended by EOS, untrimmed."""
        return self._sequence(self._row(index)[0] + 1)

    def choices(self, index: int) -> list[np.ndarray]:
        """Tokens of each answer choice, each i32[n] ended by EOS; none for a generation task."""
        return self.sequences(index)[2:]

    def label(self, index: int) -> int:
        """Index of the right choice, -1 if there is none."""
        self._row(index)
        return int(self.arrays["labels"][index])

    def credits(self, index: int) -> list[float]:
        """Credit of each choice of a row: its scores, or 1 for each that reads as the right one."""
        return _credits(self.text(index), self.label(index))

    def text(self, index: int) -> dict[str, Any]:
        """Returns a row as text: ``inputs``, ``targets``, ``choices``, and ``index`` in the source."""
        first, behind = self._row(index)
        start, end = self.arrays["text_ends"][index:index + 2]
        where = f"{self.name} {self.split}, row {index}"
        try:
            text = _check_text(json.loads(self.arrays["texts"][start:end].tobytes()), where)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(describe("The text of a prepared row is damaged", where=where,
                                      got=str(error)[:200], cure=prepared_files.CURE)) from error
        if len(text["choices"]) != behind - first - 2:
            raise InputError(describe("The texts of a prepared row are not those of its tokens", where=where,
                                      got=f"{len(text['choices'])} choices, tokens of {behind - first - 2}",
                                      cure=prepared_files.CURE))
        return text

    def subset(self, max_rows: int, seed: int = 0) -> "PreparedSplit":
        """Draws at most `max_rows` random rows by a fixed seed; keeps the source's order.

        Raises:
            InputError: `max_rows` is not a number of rows.
        """
        check_max_rows(max_rows, f"{self.name} {self.split}")
        kept = np.sort(draw_rows(len(self), max_rows, seed))
        return self.take(kept, max_rows=max_rows, seed=seed)

    def take(self, rows: Iterable[int], **info: Any) -> "PreparedSplit":
        """Returns the rows of these numbers, in the given order; `info` is added to the facts."""
        kept = ({"inputs": self.inputs(index), "targets": self.targets(index), "label": self.label(index),
                 "choices": self.choices(index), "text": self.text(index)} for index in rows)
        return self.from_rows(self.name, self.split, {**self.info, **info}, kept)

    def example(self, index: int, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Returns inputs and targets of a row, as a source of training examples does."""
        del epoch  # a prepared row is the same in every epoch
        first, _ = self._row(index)
        return self._sequence(first), self._sequence(first + 1)

    def lengths_of(self, index: int, epoch: int = 0) -> tuple[int, int]:
        """Lengths of inputs and targets of a row, without reading their tokens."""
        del epoch
        first = self._row(index)[0]
        start, middle, end = self.arrays["sequences"][first:first + 3]
        return int(middle - start), int(end - middle)

    def routing_instance(self, index: int) -> dict[str, Any]:
        """Returns what the router embeds: ``source``, ``choices_expression`` and ``labels`` of a row."""
        text = self.text(index)
        return {"source": text["inputs"], "choices_expression": self.info.get("choices_expression"),
                "labels": text["choices"]}

    def save(self, folder: storage.PathLike) -> None:
        """Writes the split into a folder; the commit marker comes last."""
        prepared_files.write(folder, self.name, self.split, self.info, self.arrays)

    @classmethod
    def open(cls, folder: storage.PathLike, *, contents: bool = True) -> "PreparedSplit":
        """Opens a split that `save` wrote; tokens and texts are memory-mapped on a local disk.

        Args:
            folder: of the split.
            contents: whether all of it is read, and compared with its digests; False where that was done.

        Raises:
            InputError: no prepared split, a half-written one, arrays that do not fit each other, values
                outside of their range, or contents that are not those that were written.
        """
        head, arrays = prepared_files.read(folder, contents)
        if head["info"].get("kind") not in KINDS:
            raise InputError(describe("A prepared split needs a kind", got=in_short(head["info"].get("kind")),
                                      where=f"{storage.as_path(folder) / 'info.json'}: info/kind",
                                      expected=" or ".join(KINDS), cure=prepared_files.CURE))
        return cls(head["name"], head["split"], head["info"], arrays)


def check_max_rows(max_rows: int | None, where: str) -> None:
    """Raises InputError if the limit is not None and below one row."""
    if max_rows is not None and max_rows < 1:
        raise InputError(describe("max_rows is not a number of rows", where=where, got=max_rows,
                                  expected="at least 1"))


def _check_text(text: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(text, Mapping) or sorted(set(text) - set(OPTIONAL_KEYS)) != sorted(TEXT_KEYS):
        raise InputError(describe("A row's text has other fields", where=where, got=sorted(text),
                                  expected=sorted(TEXT_KEYS)))
    if "scores" in text and len(text["scores"]) != len(text["choices"]):
        raise InputError(describe("Scores and choices differ in number", where=where,
                                  got=f"{len(text['scores'])} scores of {len(text['choices'])} choices"))
    return {**text, "choices": list(text["choices"]), "index": int(text["index"])}


def _credits(text: Mapping[str, Any], label: int) -> list[float]:
    if "scores" in text:
        return text["scores"]
    choices = text["choices"]
    return [float(place == label or (label >= 0 and choice == choices[label]))
            for place, choice in enumerate(choices)]


def _label(row: Mapping[str, Any], text: Mapping[str, Any], where: str) -> int:
    choices = text["choices"]
    if "label" not in row:
        if "scores" in text:
            return text["scores"].index(max(text["scores"])) if any(text["scores"]) else -1
        return choices.index(text["targets"]) if text["targets"] in choices else -1
    label = int(row["label"])
    if not -1 <= label < len(choices):
        raise InputError(describe("A label is not the index of a choice", where=where, got=label,
                                  expected=f"-1 to {len(choices) - 1}"))
    return label
