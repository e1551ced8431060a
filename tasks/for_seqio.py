"""Import this to have every task and mixture in SeqIO's own registries (``MIXTURE_OR_TASK_MODULE``)."""

from elm_jax.data import pipeline

pipeline.import_tasks(["elm_jax.tasks"])
