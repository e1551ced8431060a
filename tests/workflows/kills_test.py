"""A kill at any moment leaves nothing behind: the same verb ends well afterwards, and all is there."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import kills
import pytest
import tiny_study as tiny
from checkout import HELPERS, ROOT
from older_library import make_older

from elm_jax.cli import main
from elm_jax.workflows import get_base

MODULE = ["--module", *tiny.MODULES]


@dataclasses.dataclass
class Bench:
    """What a verb reads, and the folder that it writes.

    Attributes:
        world: of `conftest`.
        folder: for sources that are made.
        work: what the verb writes lies in it.
    """

    world: object
    folder: pathlib.Path
    work: pathlib.Path

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.base, self.prepared = self.world.base.path, self.world.folder / "prepared"
        self.experts = {name: self.world.folder / name / "expert" for name in ("topic", "review", "dataset")}

    @functools.cached_property
    def made(self):
        import merge_made  # late: imports PyTorch

        return merge_made

    @functools.cached_property
    def models(self) -> dict[str, list[str]]:
        """Of each kind two small models."""
        return self.made.save_models(self.folder / "models", count=2)

    @functools.cached_property
    def own_base(self) -> str:
        return self.made.save_own_base(self.folder / "own_base")

    @functools.cached_property
    def loras(self) -> list[str]:
        """Two experts of `own_base`."""
        return self.made.save_experts(self.folder / "loras", "lora", 2)

    @functools.cached_property
    def gguf(self) -> pathlib.Path:
        import gguf_files
        import transformers

        config = transformers.Qwen2Config(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64)
        return gguf_files.write_gguf(self.folder / "small.gguf", transformers.Qwen2ForCausalLM(config))


def tasks_cache(bench):
    return ["tasks", "cache", "--base", bench.base, "--prepared", bench.work, tiny.TOPIC, "--split",
            "validation", "--max_rows", 20, *MODULE]


def library_build(bench):
    return ["library", "build", "--library", bench.work / "library", "--base", bench.base, "--encoder",
            "tfidf", "--instances", 8, "--prepared", bench.prepared, *MODULE, bench.experts["topic"],
            bench.experts["review"]]


def library_add(bench):
    shutil.copytree(bench.world.folder / "library", bench.work)
    return ["library", "add", "--library", bench.work, "--base", bench.base, "--prepared", bench.prepared,
            *MODULE, bench.experts["dataset"]]


def library_add_older(bench):
    words = library_add(bench)
    make_older(bench.work)
    return words


def library_remove(bench):
    shutil.copytree(bench.world.folder / "library", bench.work)
    return ["library", "remove", "--library", bench.work, tiny.TOPIC]


def library_calibrate(bench):
    shutil.copytree(bench.world.folder / "library", bench.work)
    return ["library", "calibrate", "--library", bench.work, "--base", bench.base, "--rows", 4, "--task",
            "mini_question__asks_for", "--source_length", 64, "--mesh_data", 1, *MODULE]


def convert(bench, source, source_kind, target_kind, *words):
    return ["convert", "--from", source_kind, "--to", target_kind, source, bench.work / "out", *words]


def convert_peft(bench):
    assert main.main(["convert", "--from", "elm", "--to", "peft", "--base", bench.own_base, bench.loras[0],
                      str(bench.folder / "peft")]) == 0
    return convert(bench, bench.folder / "peft", "peft", "elm", "--base", bench.own_base)


def base_get(bench):
    shutil.copy(bench.gguf, bench.folder / "__init__.py")  # is looked for, and never imported
    os.symlink(bench.folder, bench.world.folder / "own_small_model")
    small = dataclasses.replace(get_base.PACKAGED["smollm2"], name="small", module="own_small_model",
                                file="small.gguf")
    get_base.PACKAGED["small"] = small
    return ["base", "get", "small", bench.work / "base"]


def merge(folders, *words):
    return lambda bench: ["merge", "--output", bench.work / "merged", *words, *folders(bench)]


def evaluate(bench):
    return ["evaluate", "--base", bench.base, "--task", tiny.TOPIC, "--output", bench.work / "results.jsonl",
            "--expert", bench.experts["topic"], "--max_rows", 8, "--source_length", 64, "--mesh_data", 1,
            "--prepared", bench.prepared, *MODULE]


def report(bench):
    assert verb_of(evaluate(bench))() == 0
    return ["report", bench.work]


def farm_init(bench):
    table = bench.folder / "table.csv"
    table.write_text(f"task,expert_id\n{tiny.TOPIC},a\n{tiny.REVIEW},b\n")
    return ["farm", "init", "--dir", bench.work, "--table", table, "--gin_file",
            ROOT / "gin/experts/prompt.gin", f"--gin.INITIAL_CHECKPOINT_PATH='{bench.base}'"]


def train(bench):
    prepared = str(bench.prepared)
    return lambda: tiny.make_expert(bench.world.base, bench.work / "run", prepared_dir=prepared) and 0


def pretrain(bench):
    return lambda: tiny.make_base(bench.work / "run") and 0


def verb_of(words) -> kills.Verb:
    return words if callable(words) else functools.partial(main.main, [str(word) for word in words])


CHEAP = {
    "tasks cache": tasks_cache, "library add": library_add, "library remove": library_remove,
    "convert expert": lambda bench: convert(bench, bench.experts["topic"], "elm", "elm"),
}
VERBS = CHEAP | {
    "library build": library_build, "library add older": library_add_older,
    "library calibrate": library_calibrate,
    "convert elm hf": lambda bench: convert(bench, bench.models["elm"][0], "elm", "hf", "--max_shard_size",
                                            "20KB"),
    "convert hf elm": lambda bench: convert(bench, bench.models["hf"][0], "hf", "elm"),
    "convert hf elm verify": lambda bench: convert(bench, bench.models["hf"][0], "hf", "elm", "--verify"),
    "convert elm t5x": lambda bench: convert(bench, bench.models["elm"][0], "elm", "t5x"),
    "convert elm zarr": lambda bench: convert(bench, bench.models["elm"][0], "elm", "t5x", "--layout",
                                              "zarr"),
    "convert t5x elm": lambda bench: convert(bench, bench.models["t5x"][0], "t5x", "elm"),
    "convert lora": lambda bench: convert(bench, bench.loras[0], "elm", "elm", "--base", bench.own_base),
    "convert expert hf": lambda bench: convert(bench, bench.experts["topic"], "elm", "hf"),
    "convert lora peft": lambda bench: convert(bench, bench.loras[0], "elm", "peft", "--base",
                                               bench.own_base),
    "convert peft elm": convert_peft,
    "convert gguf elm": lambda bench: convert(bench, bench.gguf, "gguf", "elm"), "base get": base_get,
    "merge elm": merge(lambda bench: bench.models["elm"]),
    "merge hf": merge(lambda bench: bench.models["hf"], "--max_shard_size", "20KB"),
    "merge t5x": merge(lambda bench: bench.models["t5x"]),
    "merge loras": merge(lambda bench: bench.loras, "--lora_rank", "4"),
    "evaluate": evaluate, "report": report, "farm init": farm_init, "train": train, "pretrain": pretrain,
}
"""Words of each verb, or what calls it, by name."""


def of_training(work: pathlib.Path) -> tuple:
    """What is equal of two runs: files but for those with speeds, of which the losses are."""
    found = kills.tree(work)
    rows = (work / "run" / "metrics.jsonl").read_text().splitlines()
    for name in ("metrics.jsonl", "expert/expert.json", "base/base.json"):
        found.pop(f"run/{name}", None)
    return found, [json.loads(line).get("loss") for line in rows]


FACTS = {"train": of_training, "pretrain": of_training}


def test_kills_of_some_verbs_at_some_moments(world, tmp_path):
    for name, words in CHEAP.items():
        folder = tmp_path / name
        folder.mkdir()
        bench = Bench(world, folder / "from", folder / "work")
        (folder / "states").mkdir()
        assert kills.sweep(verb_of(words(bench)), bench.work, folder / "states", every=14) >= 2, name


@pytest.mark.slow
def test_a_kill_at_every_change_of_every_short_verb(world, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(world.folder)
    monkeypatch.setattr(get_base, "PACKAGED", dict(get_base.PACKAGED))
    for name, words in VERBS.items():
        folder = tmp_path / name
        folder.mkdir()
        bench = Bench(world, folder / "from", folder / "work")
        verb = verb_of(words(bench))
        (folder / "states").mkdir()
        every = 4 if name == "pretrain" else 1  # each run trains a vocabulary
        assert kills.sweep(verb, bench.work, folder / "states", every, FACTS.get(name)) >= 3, name
        shutil.rmtree(folder)


@pytest.mark.slow
def test_processes_that_are_really_killed(world, tmp_path):
    """Each at every seventh change, with SIGKILL; the next process ends well, and nothing is left."""
    for name in CHEAP:
        folder = tmp_path / name
        folder.mkdir()
        bench = Bench(world, folder / "from", folder / "work")
        words = VERBS[name](bench)
        paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
        done = subprocess.run([sys.executable, HELPERS / "kills.py", bench.work, "7", *map(str, words)],
                              capture_output=True, text=True, timeout=500,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
        assert done.returncode == 0, (name, done.stdout[-2000:], done.stderr[-2000:])
        assert json.loads(done.stdout.splitlines()[-1])["kills"] >= 3, name
