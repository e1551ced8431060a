"""A mixture of one's own, for MIXTURE_OR_TASK_MODULE: ranked, written, and one without a row to evaluate."""

from elm_jax.tasks import for_seqio

from elm_jax.data.preparing import seqio_tasks
from elm_jax.evaluation.metrics import TEXT_METRICS

TASKS = ("ag_news__classify", "common_gen__example_prompt", "trec__trec1", "trec__fine_grained_abbr")

__all__ = ["TASKS", "for_seqio"]
seqio_tasks.add_mixture("few_tasks", TASKS)
seqio_tasks.register(TEXT_METRICS)
