"""elm_jax: expert language models in JAX. Train, route, merge and evaluate per-task T5 experts.

    import elm_jax as elm
    base = elm.load_base("runs/base/base")
    library = elm.ExpertLibrary.open("library")
    decision = elm.route(library, texts, num_queries=32)
    merged = elm.merge(library, decision=decision, top_k=3)
    rows = elm.evaluate(base, merged, tasks=["super_glue_rte__can_we_infer"])

SeqIO and TensorFlow are imported only where SeqIO is asked for a task, or rows of TFDS are read.
"""

# Experts and what they stand on.
from elm_jax.data.own_task import add_task
from elm_jax.data.prepared import PreparedSplit
from elm_jax.data.vocabulary import Vocabulary
from elm_jax.errors import ElmError, InputError, RunError
from elm_jax.experts.base import Base, load_base, save_base
from elm_jax.experts.card import ExpertCard
from elm_jax.experts.library import ExpertLibrary
from elm_jax.experts.overlay import Expert, load_expert, resolve, save_expert
from elm_jax.models.t5 import T5Network
from elm_jax.models.t5_config import AdapterConfig, T5Config
from elm_jax.routing.text import RoutingInstance
from elm_jax.routing.vote import RoutingDecision
from elm_jax.training.optimizers import OptimizerConfig

# What is done with them.
from elm_jax.workflows.build_library import build_library
from elm_jax.workflows.convert import ConvertConfig, convert
from elm_jax.workflows.evaluate import evaluate
from elm_jax.workflows.merge import merge
from elm_jax.workflows.merge_search import SearchConfig, search_and_merge, search_weights
from elm_jax.workflows.pretrain import PretrainConfig, pretrain
from elm_jax.workflows.route import route
from elm_jax.workflows.task_data import TaskData
from elm_jax.workflows.train import TrainConfig, train

__all__ = [
    "AdapterConfig", "Base", "ConvertConfig", "ElmError", "Expert", "ExpertCard", "ExpertLibrary",
    "InputError", "OptimizerConfig", "PreparedSplit", "PretrainConfig", "RoutingDecision",
    "RoutingInstance", "RunError", "SearchConfig", "T5Config", "T5Network", "TaskData", "TrainConfig",
    "Vocabulary", "add_task", "build_library", "convert", "evaluate", "load_base", "load_expert", "merge",
    "pretrain", "resolve", "route", "save_base", "save_expert", "search_and_merge", "search_weights", "train",
]
