"""Lengths of inputs and targets that a run's rows need, for those who give none.

A row of training holds as many examples as fit into its length, so lengths far above those of the examples
make a step of many examples and an epoch of few steps.
"""

import collections
import logging
from collections.abc import Mapping

from elm_jax.data.arrays.batch_forms import form_of
from elm_jax.data.preparing.task_data import TaskData
from elm_jax.experts.base import load_reader
from elm_jax.models import families
from elm_jax.workflows.train.train_config import TrainConfig
from elm_jax.workflows.train.train_expert import framed, task_data, tasks_of

logger = logging.getLogger(__name__)
MULTIPLE = 8
"""Lengths are multiples of this."""


def needed(config: TrainConfig, fixed: Mapping[str, int]) -> tuple[dict[str, int], TaskData]:
    """Finds the lengths that cut no row of a run's train splits, but at most those of its config; logs them.

    Args:
        config: the run; its base is read without parameters.
        fixed: lengths that are as they are, by their names.

    Returns:
        ``{'inputs': S, 'targets': T}``, multiples of 8 (or the config's), and the task data that were read.

    Raises:
        InputError: the task is unknown or has no data; the base has no vocabulary, or no chat template where
            the rows want one.
    """
    base = load_reader(config.initial_checkpoint_path)
    data = task_data(config, base)
    as_read = framed(config, base, data)
    form = form_of(families.network_of(base.config))
    splits = [as_read.split(task, "train") for task in tasks_of(config, data)]
    sizes = collections.Counter(split.lengths_of(row) for split in splits for row in range(len(split)))
    tokens = {"inputs": [(form.prompt_length(inputs), rows) for (inputs, _), rows in sizes.items()],
              "targets": [(targets, rows) for (_, targets), rows in sizes.items()]}
    longest = {name: max(found, default=(1, 0))[0] for name, found in tokens.items()}
    lengths = {name: min(most, -(-longest[name] // MULTIPLE) * MULTIPLE)
               for name, most in config.task_feature_lengths.items()} | dict(fixed)
    cut = {name: sum(rows for size, rows in found if size > lengths[name]) for name, found in tokens.items()}
    logger.info("lengths: %d tokens of input (cut: %d of %d rows), %d of target (cut: %d); others by "
                "--source_length and --target_length", lengths["inputs"], cut["inputs"], sizes.total(),
                lengths["targets"], cut["targets"])
    return lengths, data
