"""The registry of prompted tasks and mixtures, and functions that add one's own.

    from elm_jax.data import registry
    registry.add_prompted_task("my_data", None, "my prompt", kind="rank", role="train")

Each name is imported on first use.
"""

from elm_jax.runtime import lazy

_MODULES = {
    **dict.fromkeys((
        "EVALUATION_ONLY", "ROLES", "PromptMixture", "add_cached_task", "add_mixture", "add_origin",
        "add_prompted_task", "capped_mixture", "check_trainable", "describe_task", "evaluation_only",
        "find_mixture", "find_task", "get_mixture", "get_task", "import_module", "import_tasks",
        "mixture_names", "mixture_rates", "mixture_tasks", "origin_of", "task_names"),
        "elm_jax.data.registry.registry"),
    **dict.fromkeys(("PromptedTask", "Recipe"), "elm_jax.data.registry.prompted_task"),
    "RowLists": "elm_jax.data.registry.task_rows",
    "add_task": "elm_jax.data.registry.own_task",
}
"""Where each public name is defined."""
__getattr__, __dir__ = lazy.exports(__name__, _MODULES)
__all__ = sorted(_MODULES)
