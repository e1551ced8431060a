"""Functions for the gin files of `gin/t5x/`, with which T5X itself trains this program's experts.

`python -m t5x.train` runs the loop, the checkpoints and the mesh. This module provides the vocabulary, the
optimisers that train a part of the leaves, the start from a base without adapters, and the evaluation
tasks. The network is `models.t5x_module`; `t5x_expert` reads the result back. T5X resolves a gin
file's references as plain Python names, so nothing here imports gin.
"""

import atexit
import importlib
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import traverse_util

from elm_jax.errors import InputError, describe
from elm_jax.evaluation.rank import accuracy_of_scores
from elm_jax.experts.overlay import trained_leaves
from elm_jax.formats import tree_checks
from elm_jax.formats.t5x import t5x_checkpoints as t5x_format
from elm_jax.models.adapters.kind import is_adapter_leaf
from elm_jax.models.t5.network import role_of
from elm_jax.runtime import trees
from elm_jax.training.optimizers import OptimizerConfig, make_optimizer
from elm_jax.types import Params
from elm_jax.workflows.convert.t5x_expert import T5X_COMMIT, expert_from_checkpoint

try:
    from t5x import optimizers, state_utils

    from elm_jax.data.preparing import seqio_tasks  # TensorFlow, which T5X needs too
except ImportError as missing:
    raise InputError(describe(
        "T5X cannot be imported", got=str(missing), expected=f"T5X at commit {T5X_COMMIT}",
        cure="T5X is on no package index: put clones of google-research/t5x, google/airio and "
        "google-research/jestimator on PYTHONPATH, as docs/t5x.md shows")) from missing

__all__ = [
    "T5X_COMMIT", "adapter_optimizer", "evaluation_name", "expert_from_checkpoint", "start_from_base",
    "trained_parameters", "vocabulary",
]

_PARAMETERS = "target/"


def vocabulary(path: str, rows: int) -> seqio_tasks.RunVocabulary:
    """Loads the model's vocabulary, and makes it that of all tasks' features.

    Args:
        path: a vocabulary's file, of any kind (`Vocabulary.load`).
        rows: of the network's embedding.

    Raises:
        InputError: no such file, or one with more ids than rows, whose embedding would be no number.
    """
    found = seqio_tasks.set_vocabulary(path)
    if found.vocab_size > rows:
        raise InputError(describe("The vocabulary is larger than the embedding", where=path,
                                  got=found.vocab_size, expected=f"at most VOCAB_SIZE = {rows}"))
    return found


def evaluation_name(name: str, module: str) -> str:
    """Name of the SeqIO task or mixture that evaluates `name`: choices by rank, generation by ROUGE-L.

    Args:
        name: of a registered task or mixture.
        module: whose import registers it.
    """
    importlib.import_module(module)
    return seqio_tasks.evaluation_name(name, accuracy_of_scores)


def trained_parameters(train_norms: bool = True) -> traverse_util.ModelParamTraversal:
    """Selects an expert's adapters (and norms) for `t5x.optimizers.MultiOptimizer`.

    Leaves outside of it get neither an update nor any optimiser state.
    """
    trains = trained_leaves(role_of, "adapter", train_norms)
    return traverse_util.ModelParamTraversal(lambda path, _: trains(path.lstrip("/")))


def adapter_optimizer(
    config: OptimizerConfig, train_steps: int, train_norms: bool = True
) -> optimizers.OptaxWrapper:
    """Makes `elm train`'s optimiser for an expert's adapters (and norms), as a T5X optimiser.

    Leaves that do not train get neither an update nor any optimiser state. The learning rate is the
    config's: that of T5X's trainer is logged, and not used.

    Args:
        config: AdamW; T5X cannot place the state of optax's Adafactor on its mesh.
        train_steps: length of the run, for a schedule that decays.
        train_norms: whether the RMS norms train with the adapters.
    """
    if config.name != "adamw":
        raise InputError(describe(
            "T5X does not know this optimiser's state", got=config.name, expected="adamw",
            cure="gin/t5x/prompt_adafactor.gin uses T5X's own Adafactor"))
    trains = trained_leaves(role_of, "adapter", train_norms)

    def labels(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda keys, _: "trained" if trains("/".join(key.key for key in keys)) else "frozen", params)

    return optimizers.OptaxWrapper(optax.multi_transform(
        {"trained": make_optimizer(config, train_steps), "frozen": optax.set_to_zero()}, labels))


def start_from_base(
    checkpoint: Mapping[str, Any], state: Mapping[str, Any], *, path: str | None = None,
    is_resuming: bool = False,
) -> Mapping[str, Any]:
    """Maps a base's checkpoint to a new run's state, for T5X's `state_transformation_fns`.

    Only parameters: the step and the optimiser's statistics start again, as in `elm train`; T5X by
    itself would continue with those of the pretraining. Adapters that the checkpoint lacks altogether are
    initialised by T5X, which must be told so (`fallback_to_scratch`).

    Args:
        checkpoint: state dictionary of the checkpoint, whose leaves T5X has not read yet.
        state: state dictionary of the run, shapes only.
        path: the checkpoint's folder, to compare shapes, which T5X itself does for its older layout only;
            None compares names.
        is_resuming: whether the checkpoint is the run's own; it is then taken whole.

    Raises:
        InputError: the checkpoint lacks parameters of the base, or has others, or of other shapes; all
            are named.
    """
    if is_resuming:
        return checkpoint
    found, wanted = (
        {name.removeprefix(_PARAMETERS): leaf for name, leaf in state_utils.flatten_state_dict(tree).items()
         if name.startswith(_PARAMETERS)} for tree in (checkpoint, state))
    adapters = {name for name in wanted if is_adapter_leaf(name)}
    needed = {name: leaf for name, leaf in wanted.items() if name not in adapters or adapters & found.keys()}
    shapes = t5x_format.parameter_shapes(path) if path is not None else {
        name: wanted[name].shape if name in wanted else () for name in found}
    tree_checks.check_leaves(
        "The checkpoint does not hold this network's base", path or "INITIAL_CHECKPOINT_PATH", shapes,
        {name: leaf.shape for name, leaf in needed.items()},
        "give the gin file of the base's size after that of the run")
    return {"target": trees.unflatten({name: found[name] for name in needed})}


def _end_failed_launch() -> None:
    """Ends a failed T5X process with status 1.

    The error's frames still hold the data sets, and TensorFlow's destructors wait for calls into Python
    that no longer come back once the interpreter shuts down: the process would hang, or abort.
    """
    program = getattr(sys.modules["__main__"], "__spec__", None)
    failed = getattr(sys, "last_value", None) is not None
    if failed and program is not None and program.name.startswith("t5x."):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


atexit.register(_end_failed_launch)
