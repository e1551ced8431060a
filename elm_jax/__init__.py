"""elm_jax: expert language models in JAX. Train, route, merge and evaluate per-task experts.

    import elm_jax as elm
    base = elm.load_base("runs/base/base")
    library = elm.ExpertLibrary.open("library")
    decision = elm.route(library, texts)
    merged = elm.merge(library, decision=decision, top_k=3)
    rows = elm.evaluate(base, merged, tasks=["super_glue_rte__can_we_infer"])
    answers = elm.generate(base, merged, ["Is it good? I liked every minute."])

Each name is imported on first use, so `import elm_jax` is fast. SeqIO and TensorFlow are imported only when
SeqIO serves a task, or when rows of TFDS are read.
"""

from typing import TYPE_CHECKING

from elm_jax.runtime import lazy

__version__ = "0.1.0"

if TYPE_CHECKING:  # for type checkers and editors; at run time `_MODULES` says the same
    # Experts and their bases.
    from elm_jax.data.arrays.prepared import PreparedSplit
    from elm_jax.data.preparing.task_data import TaskData
    from elm_jax.data.registry.own_task import add_task
    from elm_jax.errors import ElmError, InputError, RunError
    from elm_jax.experts.base import Base, load_base, save_base
    from elm_jax.experts.card import ExpertCard
    from elm_jax.experts.library import ExpertLibrary
    from elm_jax.experts.overlay import Expert, load_expert, resolve, save_expert
    from elm_jax.experts.peft_adapters import load_peft
    from elm_jax.experts.peft_export import save_peft
    from elm_jax.models.adapters.config import AdapterConfig
    from elm_jax.models.families import FAMILIES
    from elm_jax.models.layers.sparse_config import SparseConfig
    from elm_jax.routing.cases import RouterSettings
    from elm_jax.routing.text import RoutingInstance
    from elm_jax.routing.vote import RoutingDecision
    from elm_jax.training.optimizers import OptimizerConfig
    from elm_jax.vocabularies.vocabulary import Vocabulary

    # Operations on them.
    from elm_jax.workflows.build_library import build_library
    from elm_jax.workflows.calibrate.calibrate_library import CalibrateConfig, calibrate_library
    from elm_jax.workflows.convert.convert_model import ConvertConfig, convert
    from elm_jax.workflows.evaluate.evaluate_folders import EvaluateConfig, evaluate_folders
    from elm_jax.workflows.evaluate.evaluate_mixed import evaluate_mixed
    from elm_jax.workflows.evaluate.evaluate_models import evaluate
    from elm_jax.workflows.expert_scorer import LibraryScorer, ScoredRow
    from elm_jax.workflows.generate import generate
    from elm_jax.workflows.merge.in_memory import merge
    from elm_jax.workflows.merge.search_merge import SearchConfig, search_and_merge, search_weights
    from elm_jax.workflows.route import RouteConfig, RouteStream, route
    from elm_jax.workflows.target_task import route_task
    from elm_jax.workflows.task_vectors import TaskVectorConfig, embed_tasks
    from elm_jax.workflows.train.pretrain import PretrainConfig, pretrain
    from elm_jax.workflows.train.train_config import TrainConfig
    from elm_jax.workflows.train.train_expert import train
    from elm_jax.workflows.upcycle.upcycle_base import UpcycleConfig, upcycle, upcycle_folders

    T5Config, T5Network = FAMILIES["t5"]

_MODULES = {
    "AdapterConfig": "elm_jax.models.adapters.config",
    "Base": "elm_jax.experts.base",
    "CalibrateConfig": "elm_jax.workflows.calibrate.calibrate_library",
    "ConvertConfig": "elm_jax.workflows.convert.convert_model",
    "ElmError": "elm_jax.errors",
    "EvaluateConfig": "elm_jax.workflows.evaluate.evaluate_folders",
    "Expert": "elm_jax.experts.overlay",
    "ExpertCard": "elm_jax.experts.card",
    "ExpertLibrary": "elm_jax.experts.library",
    "InputError": "elm_jax.errors",
    "LibraryScorer": "elm_jax.workflows.expert_scorer",
    "OptimizerConfig": "elm_jax.training.optimizers",
    "PreparedSplit": "elm_jax.data.arrays.prepared",
    "PretrainConfig": "elm_jax.workflows.train.pretrain",
    "RouteConfig": "elm_jax.workflows.route",
    "RouteStream": "elm_jax.workflows.route",
    "RouterSettings": "elm_jax.routing.cases",
    "RoutingDecision": "elm_jax.routing.vote",
    "RoutingInstance": "elm_jax.routing.text",
    "RunError": "elm_jax.errors",
    "ScoredRow": "elm_jax.workflows.expert_scorer",
    "SearchConfig": "elm_jax.workflows.merge.search_merge",
    "SparseConfig": "elm_jax.models.layers.sparse_config",
    "T5Config": "elm_jax.models.t5.config",
    "T5Network": "elm_jax.models.t5.network",
    "TaskData": "elm_jax.data.preparing.task_data",
    "TaskVectorConfig": "elm_jax.workflows.task_vectors",
    "TrainConfig": "elm_jax.workflows.train.train_config",
    "UpcycleConfig": "elm_jax.workflows.upcycle.upcycle_base",
    "Vocabulary": "elm_jax.vocabularies.vocabulary",
    "add_task": "elm_jax.data.registry.own_task",
    "build_library": "elm_jax.workflows.build_library",
    "calibrate_library": "elm_jax.workflows.calibrate.calibrate_library",
    "convert": "elm_jax.workflows.convert.convert_model",
    "embed_tasks": "elm_jax.workflows.task_vectors",
    "evaluate": "elm_jax.workflows.evaluate.evaluate_models",
    "evaluate_folders": "elm_jax.workflows.evaluate.evaluate_folders",
    "evaluate_mixed": "elm_jax.workflows.evaluate.evaluate_mixed",
    "generate": "elm_jax.workflows.generate",
    "load_base": "elm_jax.experts.base",
    "load_expert": "elm_jax.experts.overlay",
    "load_peft": "elm_jax.experts.peft_adapters",
    "merge": "elm_jax.workflows.merge.in_memory",
    "pretrain": "elm_jax.workflows.train.pretrain",
    "resolve": "elm_jax.experts.overlay",
    "route": "elm_jax.workflows.route",
    "route_task": "elm_jax.workflows.target_task",
    "save_base": "elm_jax.experts.base",
    "save_expert": "elm_jax.experts.overlay",
    "save_peft": "elm_jax.experts.peft_export",
    "search_and_merge": "elm_jax.workflows.merge.search_merge",
    "search_weights": "elm_jax.workflows.merge.search_merge",
    "train": "elm_jax.workflows.train.train_expert",
    "upcycle": "elm_jax.workflows.upcycle.upcycle_base",
    "upcycle_folders": "elm_jax.workflows.upcycle.upcycle_base",
}
"""Where each public name is defined."""
__getattr__, __dir__ = lazy.exports(__name__, _MODULES)

__all__ = [
    "AdapterConfig", "Base", "CalibrateConfig", "ConvertConfig", "ElmError", "EvaluateConfig", "Expert",
    "ExpertCard", "ExpertLibrary", "InputError", "LibraryScorer", "OptimizerConfig", "PreparedSplit",
    "PretrainConfig", "RouteConfig", "RouteStream", "RouterSettings", "RoutingDecision",
    "RoutingInstance", "RunError", "ScoredRow", "SearchConfig", "SparseConfig", "T5Config", "T5Network",
    "TaskData", "TaskVectorConfig", "TrainConfig", "UpcycleConfig", "Vocabulary", "add_task", "build_library",
    "calibrate_library", "convert", "embed_tasks", "evaluate", "evaluate_folders", "evaluate_mixed",
    "generate", "load_base", "load_expert", "load_peft", "merge", "pretrain", "resolve", "route",
    "route_task", "save_base", "save_expert", "save_peft", "search_and_merge", "search_weights", "train",
    "upcycle", "upcycle_folders",
]
