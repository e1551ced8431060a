"""The flags of runs that need no gin: each sets a macro of a gin file. Imports nothing that is slow."""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from elm_jax.workflows.choices import TRAIN_KINDS

LENGTHS = "TASK_FEATURE_LENGTHS"
"""The macro of two flags: ``{'inputs': S, 'targets': T}``."""


def written(text: str) -> str:
    """Returns a text that is not empty: as a folder, "" would be the current one."""
    if not text.strip():
        raise argparse.ArgumentTypeError("nothing is written here (a shell's variable that is not set?)")
    return text


class RunFlag(NamedTuple):
    """A flag of a run.

    Attributes:
        name: without its dashes.
        macro: that it sets.
        metavar: of its value.
        help: what it is.
        type: of its value: `written`, `int`, or `number`.
        several: makes one value of several where it may be given again; None where it may not.
        unsets: a macro that it sets to None, where the gin file has it.
        part: the key that it sets where the macro is a dictionary.
    """

    name: str
    macro: str
    metavar: str
    help: str
    type: Any = written
    several: Callable[[Iterable[str]], Any] | None = None
    unsets: str | None = None
    part: str | None = None

    @property
    def spelled(self) -> str:
        """The flag as it is typed."""
        return f"--{self.name}"


def number(text: str) -> int | float:
    """Parses a finite number as gin would read it, so that both spellings give one config."""
    try:
        return int(text)
    except ValueError:
        found = float(text)
    if not math.isfinite(found):
        raise ValueError(text)
    return found


_STEPS = RunFlag("steps", "TRAIN_STEPS", "N", "optimiser steps, in place of epochs", int, unsets="EPOCHS")
_RATE = RunFlag("learning_rate", "LEARNING_RATE", "X", "of the optimiser", number)
_ROWS = RunFlag("batch_size", "BATCH_SIZE", "N", "rows in a step; a row holds several short examples", int)
_SEED = RunFlag("seed", "RANDOM_SEED", "N", "of order, dropout and initialisation", int)
_OUTPUT = RunFlag("output", "MODEL_DIR", "DIR", "run folder; the expert will be in its expert/")
_BASE = RunFlag("base", "INITIAL_CHECKPOINT_PATH", "DIR", "base to train on: a folder, or a hub name")

SETTINGS = (
    _STEPS,
    RunFlag("epochs", "EPOCHS", "X", "passes over the rows", number, unsets="TRAIN_STEPS"),
    _RATE,
    _ROWS,
    RunFlag("lora_rank", "LORA_RANK", "R", "of LoRA's updates", int),
    RunFlag("lora_alpha", "LORA_ALPHA", "X", "LoRA's updates are scaled by alpha / rank", number),
    RunFlag("source_length", LENGTHS, "S", "tokens of an input that are kept", int, part="inputs"),
    RunFlag("target_length", LENGTHS, "T", "tokens of a target that are kept", int, part="targets"),
    RunFlag("rendering", "RENDERING", "FORM", "of inputs: plain, or chat for an instructed base's own turns"),
    RunFlag("module", "TASK_MODULES", "NAME", "task registry to import, also from the current folder; may be "
            "given again", several=tuple),
    _SEED,
)
"""Flags of `elm farm init`, and of `elm train` with `PLACES`."""
PLACES = (
    RunFlag("task", "TASK", "NAME", "task or mixture to learn; may be given again",
            several=",".join),
    _BASE,
    _OUTPUT,
    RunFlag("prepared", "PREPARED_DIR", "DIR", "folder of prepared arrays (see `elm tasks cache`)"),
)
TRAIN = (*PLACES, *SETTINGS)
FARM = (_BASE, PLACES[-1], *SETTINGS)
PRETRAIN = (
    RunFlag("passages", "PASSAGES", "FILE", "raw text, a passage a line, or module:function; may be given "
            "again", several=tuple),
    _OUTPUT._replace(help="run folder; the base will be in its base/"),
    RunFlag("vocab_size", "VOCAB_SIZE", "N", "rows of the embedding; N - 192 are pieces of the vocabulary",
            int),
    _STEPS._replace(help="optimiser steps"),
    _RATE,
    _ROWS._replace(help="rows in a step"),
    RunFlag("source_length", LENGTHS, "S", "tokens of a row's inputs; a decoder's rows hold S + T", int,
            part="inputs"),
    RunFlag("target_length", LENGTHS, "T", "tokens of a row's targets", int, part="targets"),
    _SEED._replace(help="of vocabulary, initialisation, order and noise"),
)
STUDY = (
    RunFlag("output", "WORKDIR", "DIR", "folder of the whole study; its report will be in results/"),
    _BASE._replace(help="base of all experts, where the study does not make its own"),
)
FLAG_OF = {flag.macro: flag.spelled for flag in (*STUDY, *PRETRAIN, *TRAIN)}
"""The flag that sets a macro, for errors."""


def add_run_flags(parser: argparse.ArgumentParser, flags: Sequence[RunFlag], *, kind: bool = False) -> None:
    """Adds flags to the parser of a verb; `kind` adds ``--kind``, which chooses the gin file."""
    group = parser.add_argument_group("what is run, without gin", "each flag sets a macro of the gin file")
    if kind:
        group.add_argument("--kind", choices=TRAIN_KINDS, help="the file of gin/experts/ to take (default: "
                           "lora for a decoder, prompt for a T5)")
    for flag in flags:
        how = {"action": "append"} if flag.several else {}
        group.add_argument(flag.spelled, metavar=flag.metavar, help=flag.help, default=None, type=flag.type,
                           **how)
    parser.set_defaults(run_flags=flags)


def given(arguments: argparse.Namespace) -> dict[RunFlag, Any]:
    """The flags that the command line gives, with their values."""
    found = ((flag, getattr(arguments, flag.name)) for flag in arguments.run_flags)
    return {flag: flag.several(value) if flag.several else value
            for flag, value in found if value is not None}


def flag_hint(macros: Sequence[str]) -> str:
    """Says how macros that are missing are given: by flags, or in gin."""
    flags = " ".join(f"{FLAG_OF[name]} ..." for name in macros if name in FLAG_OF)
    gin = f"--gin.{macros[0]}=..."
    return f"add {flags} (in gin: {gin})" if flags else f"add {gin}"
