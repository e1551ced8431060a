"""A study with made-up results, of the size of a real one, for the tests of the report."""

import numpy as np

from elm_jax.reporting.cells import Cell, Matrix

SEEN_SETS = ("ag_news", "trec", "cosmos_qa", "paws_labeled_final", "rotten_tomatoes", "qasc", "quarel",
             "common_gen")
UNSEEN_SETS = ("super_glue_cb", "super_glue_copa", "super_glue_rte", "winogrande_winogrande_xl", "anli_r1")
PROMPTS = ("gpt_3_style", "mnli_crowdsource", "can_we_infer", "based_on_the_previous_passage")


def facts_and_matrix(num_instances: int = 40, seed: int = 0, gain: float = 0.4,
                     num_prompts: int = 2) -> tuple[dict, Matrix]:
    """Facts as a study writes them, and the complete matrix; experts gain on their own data set.

    Args:
        num_instances: of every task.
        seed: of the made-up scores.
        gain: of an expert's accuracy on its own data set.
        num_prompts: of every data set.
    """
    seen = [f"{name}__{prompt}" for name in SEEN_SETS for prompt in PROMPTS[:num_prompts]]
    unseen = [f"{name}__{prompt}" for name in UNSEEN_SETS for prompt in PROMPTS[:num_prompts]]
    generative = ["wiki_auto__simplify", "e2e_nlg_cleaned__generate_text"]
    experts = [{"id": task, "kind": "prompt", "dataset": task.split("__")[0], "tasks": [task]}
               for task in seen]
    experts += [{"id": f"{name}-de", "kind": "dataset", "dataset": name,
                 "tasks": [task for task in seen if task.startswith(name)]} for name in SEEN_SETS]
    tasks = [*seen, *unseen, *generative]
    decisions = {task: decision(task, seen) for task in tasks}
    facts = {
        "schema_version": 1, "title": "Made-up <study>", "experts": experts, "library": seen,
        "base": "base", "multitask": "multitask", "merged_datasets": "merged_dataset_experts",
        "seen_tasks": seen, "unseen_tasks": unseen, "generative_tasks": generative,
        "decisions": decisions, "config": {
            "num_queries": 32, "max_eval_rows": 300, "eval_source_length": 256, "max_new_tokens": 32,
            "selection_note": "Chosen after a look at <these> rows."},
        "routing_figures": [
            {"encoder": "minilm", "text_format": "choice_instance", "queries": "seen prompts",
             "same_dataset": 0.9375, "num_tasks": len(seen)},
            {"encoder": "random pick", "text_format": "-", "queries": "seen prompts",
             "same_dataset": 0.125, "num_tasks": len(seen)}],
        "stage_seconds": {"pretrain the base": 421.4, "evaluate": 803.2},
        "programs": {"count": 31, "seconds": 88.0}, "versions": {"jax": "0.10.2", "numpy": "2.3.1"},
    }
    rng = np.random.default_rng(seed)
    ids = ["base", "multitask", "merged_dataset_experts", *(expert["id"] for expert in experts),
           *sorted({entry["merged"] for entry in decisions.values()})]
    own = {expert["id"]: expert["tasks"] for expert in experts}
    matrix = {(name, task): cell(rng, task, gain * (task in own.get(name, ())), num_instances)
              for name in ids for task in tasks}
    return facts, matrix


CATEGORIES = {
    "ag_news": "topic_classification", "trec": "topic_classification", "cosmos_qa": "multiple_choice_qa",
    "paws_labeled_final": "paraphrase_identification", "rotten_tomatoes": "sentiment",
    "qasc": "multiple_choice_qa", "quarel": "multiple_choice_qa", "common_gen": "topic_classification"}
"""As a study keeps them; common_gen, which is generated, stands with data sets that are classified."""
BIGBENCH, BBH = ("bigbench_winowhy",), ("bbh_navigate", "bbh_dyck_languages")
ABSENT = [{"benchmark": "BIG-bench", "task": "bigbench_strategyqa__bigbench",
           "dataset": "bigbench_strategyqa", "reason": "no data <at all>"}]


def with_groups(num_instances: int = 40) -> tuple[dict, Matrix]:
    """The same with what newer studies keep: categories, benchmarks, and a task that was absent."""
    facts, matrix = facts_and_matrix(num_instances)
    rng = np.random.default_rng(1)
    tasks = {"bigbench_tasks": [f"{name}__bigbench" for name in BIGBENCH],
             "bbh_tasks": [f"{name}__bbh" for name in BBH]}
    for task in (*tasks["bigbench_tasks"], *tasks["bbh_tasks"]):
        facts["decisions"][task] = decision(task, facts["library"])
        merged = {entry["merged"] for entry in facts["decisions"].values()}
        for name in dict.fromkeys((*(expert for expert, _ in matrix), *sorted(merged))):
            matrix[name, task] = cell(rng, task, 0.0, num_instances)
    categories = {task: CATEGORIES[task.split("__")[0]] for task in facts["seen_tasks"]}
    return {**facts, **tasks, "categories": categories, "absent_tasks": ABSENT,
            "multitask_tasks": facts["seen_tasks"]}, matrix


def decision(task: str, library: list[str]) -> dict:
    """A routing decision for one task: the library turned by the task's hash-free number."""
    start = sum(map(ord, task)) % len(library)
    ranking = library[start:] + library[:start]
    return {"top_k": ranking[:3], "merged": f"roe3-{start}", "num_queries": 32,
            "ranking": [{"expert": name, "votes": max(0, 20 - 8 * place), "best_similarity": 0.5,
                         "mean_similarity": 0.3} for place, name in enumerate(ranking)]}


def cell(rng: np.random.Generator, task: str, gain: float, num_instances: int) -> Cell:
    """One made-up cell: guessing among two, plus a gain; ROUGE-L for the generative ones.

    The first 60% of the answers are of one kind; winogrande's are positions, its inputs cut by half.
    """
    dataset = task.split("__")[0]
    indices = np.arange(num_instances) * 3
    if dataset in ("wiki_auto", "e2e_nlg_cleaned", "common_gen", "bbh_dyck_languages"):
        return Cell(np.clip(rng.normal(0.2 + gain / 2, 0.1, num_instances), 0, 1), indices, "rouge_l",
                    dataset, num_cut=0)
    winogrande = dataset.startswith("winogrande")
    return Cell((rng.random(num_instances) < 0.5 + gain).astype(np.float64), indices, "accuracy", dataset,
                0.5, majority=(np.arange(num_instances) < 0.6 * num_instances).astype(np.float64),
                by_position=winogrande, num_cut=num_instances // 2 if winogrande else 0)
