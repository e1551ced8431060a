"""Settings of sparse feed-forwards (mixtures of experts in the network): gates, capacity, layers."""

import dataclasses
import itertools
from collections.abc import Collection, Mapping
from typing import Any

from elm_jax.errors import InputError, describe, in_short, unknown_name
from elm_jax.runtime.config_checks import check_dimension

TOKENS, EXPERTS = CHOICES = ("tokens", "experts")
"""Who chooses: tokens their experts (top-K), or experts their tokens (expert choice)."""
POSITION, CHOICE, PROBABILITY = ORDERS = ("position", "choice", "probability")
"""In which order tokens fill an expert's places: only the first never looks at later tokens."""
TOKEN, TASK, BOTH = GATES = ("token", "task", "both")
"""What the router reads: the token's state, the task's vector, or the sum of both logits."""
RULES = ("t5x", "hf")
"""Names of the offset of sparse layers: the last of every `step` layers (T5X), the second (transformers)."""


@dataclasses.dataclass(frozen=True)
class SparseConfig:
    """Settings of a network's sparse feed-forwards; frozen and hashable, a part of the network's config.

    A token's output is ``sum_k g_k E_k(x)`` over its K experts; a choice beyond an expert's capacity adds 0.
    Sources: Switch, https://arxiv.org/abs/2101.03961; ST-MoE, https://arxiv.org/abs/2202.08906; choice by
    experts, https://arxiv.org/abs/2202.09368; task gates, https://arxiv.org/abs/2204.07689.

    Attributes:
        num_experts: experts E of each sparse layer.
        experts_per_token: K, for the choice by tokens; with the choice by experts, that of an
            encoder-decoder's decoder, whose tokens choose.
        choice: ``tokens``, or ``experts`` (which look at later tokens, so in encoders only).
        normalize_gates: a token's K gates are divided by their sum, before anything is dropped; otherwise
            they are the router's probabilities.
        capacity_factor: while training an expert has ``capacity_factor * N / E`` places, rounded up, in a
            group of N places, times K if `capacity_counts_choices`; None: as many as are chosen (no
            dropping). Needed for the choice by experts.
        eval_capacity_factor: the same outside of training; None: no dropping. A step of cached decoding
            never drops, nor do the choices of a row that a decoder scores side by side.
        capacity: a number of places of an expert in a group, while training and outside of it, in place of
            the two factors, which are None then (transformers' SwitchTransformers).
        capacity_counts_choices: whether the capacity has the factor K; T5X leaves it out.
        min_capacity: places of an expert, at least.
        group_rows: rows of a batch that share the places; padding takes none.
        order: in which choices fill an expert's places. ``position``: all of a token's before those of the
            next, so that no token depends on a later one. In encoders only, since they look at later tokens:
            ``choice``, all first choices before all second ones, each left to right (T5X); ``probability``,
            the same with the tokens sorted by their first choice's probability, largest first.
        jitter: while training the router reads ``x * U(1 - jitter, 1 + jitter)``; the experts do not.
        expert_dropout: rate of dropout in the experts' hidden layers; None: the network's.
        step: of every `step` layers of a stack one is sparse; 0: none of an encoder's.
        offset: number of a stack's first sparse layer, counted from 0; or one of `RULES`.
        decoder_step: `step` of an encoder-decoder's decoder; None: the same.
        dense_sublayer: a dense feed-forward with a norm of its own follows each sparse one (ST-MoE).
        gate: what the router reads: one of `GATES`.
        tasks: names of the tasks that have a vector, in the order of the table's rows, for a gate that reads
            tasks; a name of a data set stands for all its tasks. Where the gate reads none: the tasks whose
            choices are counted apart, which a run over several tasks fills in by itself.
        task_dim: width of a task's vector, for a gate that reads tasks.
    """

    num_experts: int
    experts_per_token: int = 1
    choice: str = TOKENS
    normalize_gates: bool = False
    capacity_factor: float | None = 1.25
    eval_capacity_factor: float | None = None
    capacity: int | None = None
    capacity_counts_choices: bool = True
    min_capacity: int = 4
    group_rows: int = 1
    order: str = POSITION
    jitter: float = 0.0
    expert_dropout: float | None = None
    step: int = 2
    offset: int | str = "t5x"
    decoder_step: int | None = None
    dense_sublayer: bool = False
    gate: str = TOKEN
    tasks: tuple[str, ...] = ()
    task_dim: int | None = None

    def __post_init__(self) -> None:
        """Checks types, ranges and settings without effect; a list of tasks becomes a tuple."""
        if isinstance(self.tasks, list):
            object.__setattr__(self, "tasks", tuple(self.tasks))
        for name, known in (("choice", CHOICES), ("order", ORDERS), ("gate", GATES)):
            if getattr(self, name) not in known:
                raise unknown_name(name, str(getattr(self, name)), known, f"SparseConfig.{name}")
        for name in ("num_experts", "experts_per_token", "min_capacity", "group_rows"):
            check_dimension(f"SparseConfig.{name}", getattr(self, name), 1 << 20)
        for name in ("normalize_gates", "capacity_counts_choices", "dense_sublayer"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "True or False")
        self._check_numbers()
        self._check_layers()
        self._check_tasks()
        self._check_effects()

    def _check_numbers(self) -> None:
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value <= 1 << 20):
                raise _wrong(name, value, "None (no dropping) or a number above 0")
        if self.capacity is not None:
            check_dimension("SparseConfig.capacity", self.capacity, 1 << 20)
            if not self.capacity_factor is self.eval_capacity_factor is None:
                raise _without_effect("capacity_factor and eval_capacity_factor (give None)", "capacity=None")
        if not (_is_number(self.jitter) and 0 <= self.jitter < 1):
            raise _wrong("jitter", self.jitter, "a number in [0, 1)")
        rate = self.expert_dropout
        if rate is not None and not (_is_number(rate) and 0 <= rate < 1):
            raise _wrong("expert_dropout", rate, "None (the network's) or a number in [0, 1)")
        if self.experts_per_token > self.num_experts:
            raise InputError(describe(
                "A token cannot have more experts than there are", where="SparseConfig.experts_per_token",
                got=self.experts_per_token, expected=f"at most num_experts, {self.num_experts}"))

    def _check_layers(self) -> None:
        for name in ("step", "decoder_step"):
            value = getattr(self, name)
            if not (name == "decoder_step" and value is None) and not (
                    type(value) is int and 0 <= value <= 1024):
                raise _wrong(name, value, "a whole number from 0 to 1024")
        if isinstance(self.offset, str):
            if self.offset not in RULES:
                raise unknown_name("offset", self.offset, RULES, "SparseConfig.offset")
        elif type(self.offset) is not int or not 0 <= self.offset < max(self.step, self.decoder_step or 0, 1):
            raise _wrong("offset", self.offset, f"one of {RULES}, or a whole number from 0 to below step")

    def _check_tasks(self) -> None:
        if not isinstance(self.tasks, tuple) or any(not isinstance(name, str) for name in self.tasks):
            raise _wrong("tasks", self.tasks, "a tuple of names of tasks")
        if len(set(self.tasks)) < len(self.tasks):
            raise _wrong("tasks", self.tasks, "each name once")
        if self.gate == TOKEN and self.task_dim is not None:
            raise _without_effect("task_dim", "gate='task' or gate='both'")
        if self.gate != TOKEN and not self.tasks:
            raise _wrong("tasks", self.tasks, f"names of tasks, for gate={self.gate!r}")
        if self.gate != TOKEN:
            check_dimension("SparseConfig.task_dim", self.task_dim, 1 << 16)

    def _check_effects(self) -> None:
        if self.jitter and self.gate == TASK:
            raise _without_effect("jitter", "a gate that reads tokens")
        if self.choice == EXPERTS:
            if None in (self.capacity_factor, self.eval_capacity_factor):
                raise _wrong("capacity_factor", None,
                             "capacity_factor and eval_capacity_factor, for choice='experts'")
            if self.order != POSITION:
                raise _without_effect("order", "choice='tokens'")
        elif self.order != POSITION and (
                self.capacity_factor is self.eval_capacity_factor is self.capacity is None):
            raise _without_effect("order", "a capacity_factor or a capacity")
        elif self.order == CHOICE and self.experts_per_token < 2:
            raise _without_effect("order='choice'", "experts_per_token of 2 or more")

    def is_sparse(self, layer: int, decoder: bool = False) -> bool:
        """Whether a layer of a stack is sparse.

        Args:
            layer: its number in the stack, from 0.
            decoder: whether the stack is an encoder-decoder's decoder.
        """
        step = self.decoder_step if decoder and self.decoder_step is not None else self.step
        if step == 0:
            return False
        offset = {"t5x": step - 1, "hf": 1 % step}.get(self.offset, self.offset)
        return layer % step == offset % step

    def of_decoder(self) -> "SparseConfig":
        """The settings of an encoder-decoder's decoder, in which no token may depend on later ones.

        Tokens choose, and fill the places by position. Where the encoder's experts choose, the decoder drops
        nothing outside of training.
        """
        if self.choice == EXPERTS:
            return dataclasses.replace(self, choice=TOKENS, eval_capacity_factor=None)
        return dataclasses.replace(self, order=POSITION)

    @property
    def drops_in_use(self) -> bool:
        """Whether a token's output can depend on other tokens outside of training."""
        return self.eval_capacity_factor is not None or self.capacity is not None

    def without_drops(self) -> "SparseConfig":
        """The settings of the same layers, of a decoder, where nothing is dropped outside of training."""
        return dataclasses.replace(self, eval_capacity_factor=None, capacity=None)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dictionary. Inverse of `sparse_of`."""
        return {**dataclasses.asdict(self), "tasks": list(self.tasks)}


def steps_of(layers: Collection[int], count: int, decoder_layers: Collection[int] = (), decoder_count: int = 0
             ) -> dict[str, Any] | None:
    """Finds the settings that make certain layers sparse and no others.

    Args:
        layers: numbers of a network's sparse layers, or of its encoder's.
        count: of its layers.
        decoder_layers: numbers of an encoder-decoder's decoder's.
        decoder_count: of its layers; 0 for a network of one stack.

    Returns:
        ``step``, ``offset`` (a rule's name if one fits) and, of two stacks with different steps,
        ``decoder_step``; None if the layers are not at equal distances.
    """
    steps = []
    for found, stack in ((sorted(layers), count), (sorted(decoder_layers), decoder_count)):
        distances = {after - before for before, after in itertools.pairwise(found)}
        if len(distances) > 1:
            return None
        # One layer alone: it is the last of its step, or the step is as long as the stack.
        steps.append([*distances] or ([found[0] + 1, stack] if found else [0]))
    offsets = (*RULES, *range(max(count, decoder_count)))
    for offset, step, decoder_step in itertools.product(offsets, steps[0], steps[1]):
        if isinstance(offset, int) and offset >= max(step, decoder_step, 1):
            continue
        same = decoder_step == step or not decoder_count
        settings = {"step": step, "offset": offset} | ({} if same else {"decoder_step": decoder_step})
        tried = SparseConfig(1, **settings)
        made = [{layer for layer in range(length) if tried.is_sparse(layer, decoder)}
                for length, decoder in ((count, False), (decoder_count, True))]
        if made == [set(layers), set(decoder_layers)]:
            return settings
    return None


def sparse_of(values: Any) -> SparseConfig | None:
    """Builds the settings from a config's value: None, a `SparseConfig`, or the dictionary of its fields.

    Raises:
        InputError: a field is unknown, missing or wrong.
    """
    if values is None or isinstance(values, SparseConfig):
        return values
    if not isinstance(values, Mapping):
        raise InputError(describe("The settings of sparse layers are wrong", where="sparse",
                                  got=in_short(values), expected="None or the fields of a SparseConfig"))
    known = [field.name for field in dataclasses.fields(SparseConfig)]
    for name in values:
        if name not in known:
            raise unknown_name("SparseConfig field", str(name), known, "sparse")
    if "num_experts" not in values:
        raise InputError(describe("SparseConfig lacks fields", expected="num_experts"))
    return SparseConfig(**values)


def check_layers(sparse: SparseConfig | None, layers: int, where: str, decoder_layers: int | None = None
                 ) -> None:
    """Checks that a network has a layer for its settings of sparse layers.

    Args:
        sparse: the settings, or None.
        layers: of the network, or of its encoder.
        where: the config's field, for the error.
        decoder_layers: of an encoder-decoder's decoder; None for a network of one stack.

    Raises:
        InputError: no layer is sparse, or a setting is of an encoder-decoder alone.
    """
    if sparse is None:
        return
    if decoder_layers is None and sparse.decoder_step is not None:
        raise _without_effect("decoder_step", "an encoder-decoder")
    if not any([*(sparse.is_sparse(layer) for layer in range(layers)),
                *(sparse.is_sparse(layer, True) for layer in range(decoder_layers or 0))]):
        raise InputError(describe(
            "No layer is sparse", where=f"{where}.step", got=f"step={sparse.step}, offset={sparse.offset!r}, "
            f"{layers} layers" + (f" and {decoder_layers} of a decoder" if decoder_layers else ""),
            expected="a step of at most the number of layers", cure="give a smaller step, or no `sparse`"))


def with_sparse(sparse: SparseConfig | None, values: dict[str, Any]) -> dict[str, Any]:
    """Writes ``sparse`` into the dictionary of a network's config; a dense network's has no such key."""
    values.pop("sparse", None)
    return values if sparse is None else {**values, "sparse": sparse.to_dict()}


def check_causal(sparse: SparseConfig | None, where: str) -> None:
    """Raises InputError if a token's output would depend on later tokens: refused in a decoder."""
    if sparse is not None and (sparse.choice == EXPERTS or sparse.order != POSITION):
        name, value = ("choice", sparse.choice) if sparse.choice == EXPERTS else ("order", sparse.order)
        raise InputError(describe(
            "In a decoder a token's experts may not depend on later tokens", where=f"{where}.{name}",
            got=repr(value), expected=f"{'tokens' if name == 'choice' else 'position'!r}",
            cure="keep it for an encoder"))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _wrong(field: str, value: object, expected: str) -> InputError:
    return InputError(describe("The settings of sparse layers are wrong", where=f"SparseConfig.{field}",
                               got=in_short(value), expected=expected))


def _without_effect(what: str, needs: str) -> InputError:
    return InputError(describe("A setting of sparse layers has no effect", where=f"SparseConfig: {what}",
                               expected=needs, cure=f"leave out {what}"))
