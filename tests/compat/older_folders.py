"""What is kept of an older version: commands that read or finish its folders, and the facts on disk after.

Both `record.py`, with the program of then, and the tests, with that of today, run these. Nothing here imports
the program: facts are read from files, and `elm` is given.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

HERE = pathlib.Path(__file__).parent
ARCHIVE = HERE / "folders.tar.xz"
EXPECTED = HERE / "expected.json"
XLA_FLAGS = ("--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
             "--xla_llvm_disable_expensive_passes=true")
"""Those of tests/conftest.py."""
WHICH, WHO, SUM_UP = "tickets__which_team", "tickets__who_answers", "tickets__sum_up"
MODULE = ["--module", "older_tasks"]
BASE = ["--base", "base/base"]
LENGTHS = "TASK_FEATURE_LENGTHS={'inputs': 48, 'targets': 16}"
Elm = Callable[[Sequence[str]], int]


def gin(file: str, **macros: Any) -> list[str]:
    """Flags of a verb that takes gin; the older version's own gin files are in the folder ``gin``."""
    bindings = [f"--gin.{name.replace('__', '.')}={value!r}" for name, value in macros.items()]
    return ["--gin_file", file, "--gin_search_paths", "gin", *bindings]


def training(file: str, folder: str, task: str, **macros: Any) -> list[str]:
    """Flags of a training run of a few steps."""
    settings = {"BATCH_SIZE": 4, "EPOCHS": None, "LEARNING_RATE": 3e-3, "MESH_DATA": 1, **macros}
    return ["train", *gin(file, MODEL_DIR=folder, TASK=task, INITIAL_CHECKPOINT_PATH="base/base",
                          TASK_MODULES=("older_tasks",), PREPARED_DIR="arrays", **settings),
            f"--gin.{LENGTHS}", "--gin.train.log_period=1", "--gin.train.tensorboard=False",
            "--gin.train.checkpoint_period=2", "--gin.train.keep_checkpoints=1"]


def pretraining(folder: str) -> list[str]:
    """`elm train` with a gin file that binds `pretrain`, as the older version's README had it."""
    return ["train", *gin("runs/pretrain.gin", MODEL_DIR=folder, PASSAGES=("corpus.txt",), TRAIN_STEPS=6,
                          VOCAB_SIZE=224, pretrain__vocab_pieces=100, BATCH_SIZE=4, pretrain__chunk_length=32,
                          pretrain__log_period=1, pretrain__keep_checkpoints=1, pretrain__checkpoint_period=2,
                          pretrain__tensorboard=False,
                          pretrain__mesh_data=1, T5Config__emb_dim=4, T5Config__num_heads=2,
                          T5Config__head_dim=2, T5Config__mlp_dim=8, T5Config__num_encoder_layers=1,
                          T5Config__num_decoder_layers=1), f"--gin.{LENGTHS}"]


def evaluation(output: str, experts: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """Flags of a small evaluation."""
    return ["evaluate", *BASE, *MODULE, "--prepared", "arrays", "--output", output, "--mesh_data", "1",
            "--source_length", "48", "--max_new_tokens", "6",
            *[word for expert in experts for word in ("--expert", expert)],
            *[word for task in tasks for word in ("--task", task)]]


BOTTLENECK = {"TRAIN_STEPS": 5, "train__adapter_bottleneck": 2}
LORA = {"TRAIN_STEPS": 5, "train__lora_rank": 2, "train__lora_alpha": 4.0}
STACK = training("experts/prompt_stack.gin", "half_stack", "tickets", STACK_EXPERTS=2, **BOTTLENECK)
STUDY = ["study", *gin("study.gin", WORKDIR="half_study")]
ROUTE = ["route", "--library", "library", "--task", "later_tickets__ask", "--queries", "6", "--json", *MODULE]
EXPERTS = [*(f"runs/{name}/expert" for name in ("prompt", "lora", "dataset")), "merged"]
FINISHED: dict[str, list[str]] = {
    "base": pretraining("base"),
    "prompt": training("experts/prompt.gin", "runs/prompt", WHICH, **BOTTLENECK),
    "lora": training("experts/prompt.gin", "runs/lora", WHO, **LORA),
    "sum_up": training("experts/prompt.gin", "runs/sum_up", SUM_UP, **BOTTLENECK),
    "dataset": training("experts/dataset.gin", "runs/dataset", "tickets", TRAIN_STEPS=3),
    "arrays": ["tasks", "cache", *BASE, *MODULE, "--prepared", "arrays", WHICH, SUM_UP, WHO],
    "evaluation": evaluation("results/results.jsonl", EXPERTS, [WHICH, SUM_UP]),
    "base's evaluation": evaluation("results/results.jsonl", [], [WHICH]),
}
"""Commands whose work is done: they write nothing, and end with 0."""
HALF_DONE: dict[str, list[str]] = {
    "half_base": pretraining("half_base"),
    "half_prompt": training("experts/prompt.gin", "half_prompt", WHICH, **BOTTLENECK),
    "half_lora": ["train", "--gin_file", "half_lora/config.gin"],
    "half_dataset": training("experts/dataset.gin", "half_dataset", "tickets", TRAIN_STEPS=5, MESH_DATA=2),
    "half_stack": STACK,
    "half_farm": ["farm", "work", "--dir", "half_farm"],
    "half_study": STUDY,
}
"""Commands that go on with what SIGTERM stopped, by the folder that they go on in."""


def compiler() -> dict[str, str]:
    """What decides the last bit of a step besides the program: the compiler, and for whom it compiles."""
    import jaxlib  # late: the flags of XLA stand in the environment by now

    cpu = pathlib.Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return {"jaxlib": jaxlib.__version__, "machine": platform.machine(),
            "instructions": hashlib.sha256(flags.encode()).hexdigest()[:16]}


@contextlib.contextmanager
def inside(folder: pathlib.Path) -> Iterator[None]:
    """The commands name their folders from here."""
    with contextlib.chdir(folder):
        yield


def said(elm: Elm, command: Sequence[str]) -> str:
    """What a command that ends well prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = elm(list(command))
    if status:
        raise RuntimeError(f"status {status}: elm {' '.join(command)}")
    return printed.getvalue()


SAID: dict[str, list[str]] = {
    "route": ROUTE,
    "library list": ["library", "list", "--library", "library", "--json"],
    "library verify": ["library", "verify", "--library", "library", "--json"],
    "farm status": ["farm", "status", "--dir", "half_farm", "--json"],
}
"""Commands that print JSON."""


def told(elm: Elm) -> dict[str, Any]:
    """What those commands print."""
    return {name: without_clock(json.loads(said(elm, command))) for name, command in SAID.items()}


def files(folder: pathlib.Path) -> dict[str, str]:
    """Every file below a folder, with its hash."""
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts}


_OF_THE_CLOCK = ("created", "versions", "tokens_per_second", "seconds", "path", "stage_seconds", "programs")
_SINCE = ("settings", "rows")


def without_clock(value: Any) -> Any:
    """JSON without times, versions and places, and without what older versions did not write of a run."""
    if isinstance(value, dict):
        kept = {name: part for name, part in value.items() if name not in _OF_THE_CLOCK}
        if "config_digest" in kept:
            kept = {name: part for name, part in kept.items() if name not in _SINCE}
        return {name: without_clock(part) for name, part in kept.items()}
    return [without_clock(part) for part in value] if isinstance(value, list) else value


def without_newer(value: Any) -> Any:
    """Facts without what rows and predictions say only since schema 3, and the intervals that it changed."""
    if isinstance(value, list):
        return [without_newer(part) for part in value]
    if not isinstance(value, dict):
        return value
    dropped = {"place"} if "prediction" in value else set()
    dropped |= {"library/library.json"}  # lists no experts since its schema 2
    if "metric" in value:
        dropped |= {"interval", "schema_version", "top_answer_share"}
        dropped |= {"ci95_low", "ci95_high"} if value["metric"] == "rouge_l" else set()
    return {name: without_newer(part) for name, part in value.items() if name not in dropped}


def json_of(path: pathlib.Path) -> Any:
    """A JSON file, or one of JSON lines, without times."""
    text = path.read_text()
    lines = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    return without_clock(lines)


def run_facts(folder: pathlib.Path) -> dict[str, Any]:
    """What a run left: losses, cards, bases' descriptions, and what was scored; a study's results alone."""
    found = [path for path in sorted(folder.rglob("*")) if "checkpoints" not in path.parts
             and "half_study/results/predictions" not in path.as_posix()
             and (path.name in _FACTS or (path.suffix == ".jsonl" and "predictions" in path.parts))]
    return {path.relative_to(folder).as_posix(): json_of(path) for path in found if os.path.getsize(path)}


_FACTS = ("metrics.jsonl", "expert.json", "base.json", "results.jsonl", "routing.json", "library.json",
          "made_of.json")
