"""Import this to have every task and mixture in SeqIO's own registries (``MIXTURE_OR_TASK_MODULE``)."""

from elm_jax.data.preparing import seqio_tasks
from elm_jax.evaluation.metrics import TEXT_METRICS

seqio_tasks.import_tasks(["elm_jax.tasks"], TEXT_METRICS)
