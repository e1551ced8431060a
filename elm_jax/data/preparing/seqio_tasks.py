"""SeqIO: registers prompted tasks and mixtures with SeqIO, and turns SeqIO's rows into prepared arrays.

The only module that imports SeqIO and TensorFlow. After `import_tasks` (or the import of
``elm_jax.tasks.for_seqio``) ``seqio.get_mixture_or_task(name).get_dataset(...)`` works as usual. A
SeqIO task names its vocabulary when it is registered, but ours is known only when the task runs: its features
hold a `RunVocabulary`, which forwards to the vocabulary in use.
"""

import collections
import contextlib
import contextvars
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from elm_jax.data.arrays.prepared import LEFT, PreparedSplit
from elm_jax.data.preparing.prepare import prepare as prepare_rows
from elm_jax.data.registry import registry
from elm_jax.data.registry.registry import (
    add_mixture,
    add_prompted_task,
    describe_task,
    mixture_names,
    mixture_rates,
    mixture_tasks,
    task_names,
)
from elm_jax.errors import InputError, describe
from elm_jax.vocabularies.vocabulary import Vocabulary

__all__ = [
    "RunVocabulary", "add_mixture", "add_prompted_task", "describe_task", "evaluation_name",
    "import_tasks", "mixture_names", "mixture_rates", "mixture_tasks", "prepare", "register",
    "set_vocabulary", "task_names", "use_vocabulary",
]

logger = logging.getLogger(__name__)

TextMetric = Callable[[Sequence[Any], Sequence[str]], dict[str, float]]
"""Metric ``(targets, predictions)`` of texts, in SeqIO's terms; a target is a text, or the list of all that
are right."""
ScoreMetric = Callable[[Sequence[Mapping[str, Any]], Sequence[float]], dict[str, float]]
"""Metric ``(targets, scores)``, in SeqIO's terms: a target is a choice's `CHOICE_FACTS` and its text
under ``choice``, a score the log-probability of its tokens."""
CHOICE_FACTS = ("index", "place", "num_choices")
"""The row's index in the source, the choice's place in the row, their number; beside them stand the choice's
``credit`` and its number of tokens, ``length``."""
VOCABULARY_VARIABLE = "ELM_VOCABULARY"
SCORED_SUFFIX = "_score_eval"
"""Suffix of the SeqIO tasks whose metric reads the scores of answer choices."""
_vocabulary_path: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "elm_jax_vocabulary_path", default=None)


@contextlib.contextmanager
def use_vocabulary(path: str) -> Iterator[None]:
    """Sets the vocabulary of the SeqIO tasks' features to the file at `path`, within a block."""
    token = _vocabulary_path.set(str(path))
    try:
        yield
    finally:
        _vocabulary_path.reset(token)


_load_vocabulary = functools.cache(Vocabulary.load)


class RunVocabulary(seqio.Vocabulary):
    """Forwards to the vocabulary in use: that of `use_vocabulary`, else of the variable ELM_VOCABULARY.

    It gives the ids of the `Vocabulary` of whichever kind that the file holds, which are those of SeqIO's own
    class where it has one. TensorFlow asks it through ``tf.numpy_function``: TensorFlow Text has another
    version of the sentencepiece library, which breaks ties between equally likely pieces in another way,
    and a text must have one tokenisation everywhere; and of ``tokenizer.json`` it knows nothing.
    """

    @property
    def actual(self) -> Vocabulary:
        """The vocabulary in use.

        Raises:
            InputError: none is in use, or its file holds none.
        """
        path = _vocabulary_path.get() or os.environ.get(VOCABULARY_VARIABLE)
        if not path:
            raise InputError(describe(
                "No vocabulary is in use", where="features of a SeqIO task",
                cure=f"set {VOCABULARY_VARIABLE} to a vocabulary's file, or read the data set "
                "within seqio_tasks.use_vocabulary(path)"))
        return _load_vocabulary(path)

    @property
    def bos_id(self) -> int:
        """Id of the token that begins a text; None in T5's vocabularies (-1 in SentencePiece)."""
        return -1

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a text."""
        return self.actual.eos_id

    @property
    def unk_id(self) -> int | None:
        """Id of the unknown token; None if the vocabulary can encode every text."""
        return self.actual.unk_id

    @property
    def extra_ids(self) -> int:
        """Number of sentinels."""
        return self.actual.extra_ids

    @property
    def vocab_size(self) -> int:
        """Number of ids, sentinels included."""
        return self.actual.size

    @property
    def _base_vocab_size(self) -> int:
        return self.actual.size

    def _encode(self, s: str) -> Sequence[int]:
        return self._encoder()(s)

    def _encoder(self) -> Callable[[str], list[int]]:
        return self.actual.encode

    def _decode(self, ids: Sequence[int]) -> str:
        return self.actual.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor | tf.RaggedTensor:
        """Encodes string[] to i32[n], or string[N] to ragged i32[N, None]."""
        encode = self._encoder()  # now: the function runs in threads without this context

        def encode_all(texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            ids = [encode(text.decode()) for text in texts]
            flat = np.array([token for sequence in ids for token in sequence], np.int32)
            return flat, np.array([len(sequence) for sequence in ids], np.int64)

        flat, lengths = tf.numpy_function(
            encode_all, [tf.reshape(s, [-1])], [tf.int32, tf.int64], stateful=False)
        flat.set_shape([None])
        lengths.set_shape([None])
        return flat if s.shape.rank == 0 else tf.RaggedTensor.from_row_lengths(flat, lengths)

    def _decode_tf(self, ids: tf.Tensor | tf.RaggedTensor) -> tf.Tensor:
        """Decodes i32[n] to string[], or i32[N, n] to string[N]."""
        decode = self.actual.decode  # now, as above
        rows = ids.to_tensor() if isinstance(ids, tf.RaggedTensor) else ids

        def decode_all(rows: np.ndarray) -> np.ndarray:
            texts = np.empty(rows.shape[:-1], object)
            for place in np.ndindex(texts.shape):
                texts[place] = decode(rows[place]).encode()
            return texts

        texts = tf.numpy_function(decode_all, [rows], tf.string, stateful=False)
        texts.set_shape(rows.shape[:-1])
        return texts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunVocabulary)

    def __hash__(self) -> int:
        return hash(RunVocabulary)

    def __str__(self) -> str:
        return "RunVocabulary()"


class TargetVocabulary(RunVocabulary):
    """A `RunVocabulary` of targets and choices, which in decoders follow a prompt (`encode_target`)."""

    def _encoder(self) -> Callable[[str], list[int]]:
        return self.actual.encode_target


def set_vocabulary(path: str) -> RunVocabulary:
    """Sets the vocabulary of the SeqIO tasks' features to the file at `path`, in every thread.

    Raises:
        InputError: there is no such file, or it does not hold a fitting vocabulary.
    """
    _load_vocabulary(str(path))
    os.environ[VOCABULARY_VARIABLE] = str(path)
    return RunVocabulary()


EXAMPLES_PER_BATCH = 256
_ROW_SPEC = {
    "inputs": tf.TensorSpec([], tf.string),
    "targets": tf.TensorSpec([], tf.string),
    "choices": tf.TensorSpec([None], tf.string),
    "scores": tf.TensorSpec([None], tf.float32),
    "references": tf.TensorSpec([None], tf.string),
    "index": tf.TensorSpec([], tf.int64),
}


_dropped: dict[tuple[str, str], dict[str, int]] = {}
"""Number of dropped rows, by reason, of each task and split when it was last read to its end."""


def _dataset_fn(split: str, shuffle_files: bool, seed: int | None = None, *, name: str) -> Any:
    """Rendered rows of a task as a tf.data set, in the source's order."""
    del shuffle_files, seed  # SeqIO shuffles the rows themselves
    task = registry.get_task(name)

    def rows() -> Iterator[dict[str, Any]]:
        dropped: collections.Counter[str] = collections.Counter()
        _dropped.pop((name, split), None)
        for index, rendered in task.render_rows(split, dropped):
            choices = rendered.choices if task.kind == "rank" else ()
            yield {"inputs": rendered.inputs, "targets": rendered.targets,
                   "choices": np.array(choices, dtype=object), "index": index,
                   "scores": np.array(rendered.scores or (), np.float32),
                   "references": np.array(rendered.references, dtype=object)}
        _dropped[name, split] = dict(dropped)

    return tf.data.Dataset.from_generator(rows, output_signature=_ROW_SPEC)


@seqio.map_over_dataset
def _tokenize_choices(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Encodes the answer choices, each ended by EOS.

    ``choices`` string[C] becomes ``choices`` i32[sum of lengths], ``choice_lengths`` i32[C] and
    ``choices_pretokenized`` string[C].
    """
    choices = example["choices"]
    tokens = TargetVocabulary().encode_tf(choices)
    tokens = tf.concat([tokens, tf.fill([tokens.nrows(), 1], RunVocabulary().eos_id)], axis=1)
    return {
        **example,
        "choices": tf.cast(tokens.flat_values, tf.int32),
        "choice_lengths": tf.cast(tokens.row_lengths(), tf.int32),
        "choices_pretokenized": choices,
    }


def _postprocess(output: str, example: Mapping[str, Any] | None = None, is_target: bool = False,
                 **_: Any) -> str | list[str]:
    """Strips white space around a text before it is compared; of a target gives all texts that are right."""
    if not is_target or example is None:
        return output.strip()
    right = [*np.asarray(example.get("references", ())).tolist(), *(
        choice for choice, score in zip(example.get("choices_pretokenized", ()), example.get("scores", ()),
                                        strict=False) if score)]
    return [text.decode().strip() for text in right] or output.strip()


def _features() -> dict[str, seqio.Feature]:
    return {name: seqio.Feature(vocabulary=vocabulary, add_eos=True) for name, vocabulary in (
        ("inputs", RunVocabulary()), ("targets", TargetVocabulary()))}


def _seqio_task(task: registry.PromptedTask, metric: TextMetric | None) -> seqio.Task:
    """Builds the SeqIO task of a registered task, without registering it; no metric means rows only."""
    return seqio.Task(
        task.name,
        source=_TaskSource(task),
        preprocessors=[seqio.preprocessors.tokenize, _tokenize_choices,
                       seqio.preprocessors.append_eos, *_cuts(task)],
        output_features=_features(),
        postprocess_fn=_postprocess,
        metric_fns=[] if metric is None else [metric],
    )


def _cuts(task: registry.PromptedTask) -> list[Callable[..., tf.data.Dataset]]:
    """The step that cuts inputs on the left, of a task that says so; SeqIO itself cuts on the right."""
    def keep_end(dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None) -> tf.data.Dataset:
        if sequence_length is None:
            return dataset
        return dataset.map(lambda row: {**row, "inputs": row["inputs"][-sequence_length["inputs"]:]})

    return [keep_end] if task.cut_prompt == LEFT else []


def evaluation_name(name: str, score_metric: ScoreMetric, split: str = "validation") -> str:
    """Name of the SeqIO task or mixture that evaluates `name`; registers it on first use.

    A task of kind ``rank`` is evaluated by the scores of its answer choices: its SeqIO task
    ``<name>_score_eval`` has one example a choice, and its metric sees all of them. A task of kind
    ``generation`` is its own evaluation, and a mixture's is the mixture of its tasks' evaluations,
    less those that have no row in the split.

    Args:
        name: of a registered task or mixture.
        score_metric: metric of the scored tasks, see `ScoreMetric`.
        split: of the evaluation.

    Raises:
        InputError: there is neither a task nor a mixture of that name, or it has no row in the split.
    """
    names = mixture_tasks(name) if name in registry.mixture_names() else [name]
    tasks = [task for task in map(registry.get_task, names) if _has_rows(task, split)]
    if not tasks:
        raise InputError(describe(f"{name} has nothing to evaluate", where=f"split {split}"))
    if len(tasks) < len(names):
        logger.warning("%s: %d of %d tasks have no row in split %s", name, len(names) - len(tasks),
                       len(names), split)
    evaluated = [_scored_task(task, score_metric) if task.kind == "rank" else task.name for task in tasks]
    if names == [name]:
        return evaluated[0]
    if name + SCORED_SUFFIX not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add(name + SCORED_SUFFIX, evaluated, default_rate=1.0)
    return name + SCORED_SUFFIX


def _has_rows(task: registry.PromptedTask, split: str) -> bool:
    """Whether the split exists and a row of it is left after rendering."""
    return split in task.splits and next(task.render_rows(split), None) is not None


def _scored_task(task: registry.PromptedTask, score_metric: ScoreMetric) -> str:
    name = task.name + SCORED_SUFFIX
    if name not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(
            name,
            source=_TaskSource(task),
            preprocessors=[_one_example_a_choice, seqio.preprocessors.tokenize,
                           seqio.preprocessors.append_eos, *_cuts(task)],
            output_features=_features(),
            postprocess_fn=_choice_facts,
            metric_fns=[score_metric],
        )
    return name


def _one_example_a_choice(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Turns each answer choice into an example of its own; the choices of a row follow one another."""
    def split(row: Mapping[str, tf.Tensor]) -> tf.data.Dataset:
        number = tf.size(row["choices"])
        right = tf.cast(row["choices"] == row["targets"], tf.float32)
        credit = tf.cond(tf.size(row["scores"]) > 0, lambda: row["scores"], lambda: right)
        return tf.data.Dataset.range(tf.cast(number, tf.int64)).map(lambda place: {
            "inputs": row["inputs"], "targets": row["choices"][place], "index": row["index"],
            "place": tf.cast(place, tf.int32), "credit": credit[place], "num_choices": number,
        })

    return dataset.flat_map(split)


def _choice_facts(output: str, example: Mapping[str, Any], **_: Any) -> dict[str, Any]:
    """The facts of a choice that a score metric gets."""
    return {"choice": output, "credit": float(example["credit"]), "length": len(example["targets"]),
            **{name: int(example[name]) for name in CHOICE_FACTS}}


class _TaskSource(seqio.FunctionDataSource):
    """A FunctionDataSource that counts its rows on request."""

    def __init__(self, task: registry.PromptedTask):
        super().__init__(functools.partial(_dataset_fn, name=task.name), splits=task.splits)
        self._task = task

    def num_input_examples(self, split: str) -> int:
        """Number of rows before rendering."""
        return self._task.num_rows(split)


def register(metrics: Mapping[str, TextMetric]) -> None:
    """Registers every task and mixture that has data with SeqIO.

    May be called again after more were added or the data folder changed; mixtures are then made
    again from the tasks that have data now.

    Args:
        metrics: of predicted texts, by kind of task; `evaluation.metrics.TEXT_METRICS` are this program's.
    """
    known = set(seqio.TaskRegistry.names())
    available = set(task_names(available_only=True))
    for name in sorted(available - known):
        task = registry.get_task(name)
        seqio.TaskRegistry.add_provider(name, _seqio_task(task, metrics[task.kind]))
    for name in mixture_names():
        mixture = registry.get_mixture(name)
        tasks = [task for task in mixture.tasks if task in available]
        if name in seqio.MixtureRegistry.names():
            seqio.MixtureRegistry.remove(name)
        if tasks:
            rate = _rate_of(name)
            seqio.MixtureRegistry.add(name, [(task, rate) for task in tasks])


def _rate_of(mixture: str) -> Callable[[seqio.Task], float]:
    """A SeqIO rate that counts the mixture's rows once, on first use."""
    rates = functools.cache(lambda: mixture_rates(mixture))
    return lambda task: rates()[task.name]


def import_tasks(module_names: Sequence[str], metrics: Mapping[str, TextMetric]) -> None:
    """Imports task registries by name and registers their tasks with SeqIO.

    Args:
        module_names: of the registries.
        metrics: see `register`.

    Raises:
        InputError: there is no such module.
    """
    registry.import_tasks(module_names)
    register(metrics)


def prepare(
    task: str, split: str, vocabulary: str, *, max_rows: int | None = None, seed: int = 0
) -> PreparedSplit:
    """Prepares a split as `prepare.prepare` does, but through SeqIO; `vocabulary` is the path of its file."""
    def rows_of(facts: registry.PromptedTask, split: str, _: Vocabulary,
                dropped: collections.Counter[str]) -> list[dict[str, Any]]:
        known = task in seqio.TaskRegistry.names()
        made = seqio.TaskRegistry.get(task) if known else _seqio_task(facts, metric=None)
        with use_vocabulary(vocabulary):
            rows = [_prepared_row(example) for example in _examples(made, split)]
        dropped.update(_dropped[task, split])
        return rows

    return prepare_rows(task, split, Vocabulary.load(vocabulary), max_rows=max_rows, seed=seed,
                        rows_of=rows_of)


def _examples(task: seqio.Task, split: str) -> Iterator[dict[str, Any]]:
    """Yields the SeqIO task's examples as numpy arrays; an InputError of the source is raised as it is.

    Takes many at a time from TensorFlow: taking them one by one costs more than making them.
    """
    data = task.get_dataset(sequence_length=None, split=split, shuffle=False)
    try:
        for batch in data.ragged_batch(EXAMPLES_PER_BATCH).as_numpy_iterator():
            columns = {name: _rows_of(values) for name, values in batch.items()}
            for row in zip(*columns.values(), strict=True):
                yield dict(zip(columns, row, strict=True))
    except tf.errors.OpError:
        # tf.data turns the source's own error into a string: rendering again raises the original.
        for _ in registry.get_task(task.name).render_rows(split):
            pass
        raise


def _rows_of(values: Any) -> Sequence[Any]:
    """The rows of a batched feature, which is ragged where rows have unlike lengths."""
    if isinstance(values, np.ndarray):
        return values
    return np.split(values.values, values.row_splits[1:-1])


def _prepared_row(example: Mapping[str, Any]) -> dict[str, Any]:
    ends = np.cumsum(example["choice_lengths"])[:-1]
    choices = np.split(example["choices"], ends) if len(example["choice_lengths"]) else []
    return {
        "inputs": example["inputs"], "targets": example["targets"], "choices": choices,
        "text": {
            "inputs": example["inputs_pretokenized"].decode(),
            "targets": example["targets_pretokenized"].decode(),
            "choices": [choice.decode() for choice in example["choices_pretokenized"]],
            "index": int(example["index"]),
            **_several_right(example),
        },
    }


def _several_right(example: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The scores and references of a row that has them, as `prepare.several_right` gives them."""
    found = {"scores": [float(score) for score in example["scores"]],
             "references": [text.decode() for text in example["references"]]}
    return {name: own for name, own in found.items() if own}
