"""Makes ``folders.tar.xz`` and ``expected.json``, with the program of the commit that README.md names.

    python record.py CHECKOUT WORK

CHECKOUT is of that commit, and installed; WORK is a folder that is made anew.
"""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import shutil
import signal
import sys
import tarfile
from collections.abc import Iterator, Sequence

import older_folders as older

os.environ["XLA_FLAGS"] = older.XLA_FLAGS
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import sentencepiece
from elm_jax.tasks.embedded.datasets import passages

from elm_jax import preemption
from elm_jax.cli import main as elm

jax.config.update("jax_numpy_rank_promotion", "raise")  # as tests/conftest.py
GIN = ("runs/pretrain.gin", "runs/train.gin", "models/tiny.gin", "experts/prompt.gin", "experts/dataset.gin",
       "experts/prompt_stack.gin", "studies/_study.gin")
STUDY = """include 'models/tiny.gin'
include 'studies/_study.gin'
T5Config.emb_dim = 4
T5Config.num_heads = 2
T5Config.head_dim = 2
T5Config.mlp_dim = 8
T5Config.num_encoder_layers = 1
T5Config.num_decoder_layers = 1
VOCAB_SIZE = 224
LENGTHS = {'inputs': 48, 'targets': 16}
study.vocab_pieces = 100
study.chunk_length = 32
study.modules = ('older_tasks',)
study.passages = ('corpus.txt',)
study.adapter_bottleneck = 2
study.prompt_tasks = ('tickets__which_team', 'tickets__sum_up')
study.datasets = ('tickets', 'notes')
study.unseen_tasks = ('later_tickets__ask',)
study.generative_tasks = ('later_tickets__write',)
study.heldout_prompts = ('tickets__who_answers',)
study.max_eval_rows = 4
study.eval_source_length = 48
study.max_new_tokens = 6
study.instances_per_expert = 5
study.num_queries = 4
study.top_k = 2
study.encoder = 'tfidf'
study.mesh_data = 1
pretrain/StageSettings.task_feature_lengths = %LENGTHS
pretrain/StageSettings.train_steps = 2
pretrain/StageSettings.batch_size = 4
pretrain/StageSettings.checkpoint_period = 2
pretrain/OptimizerConfig.learning_rate = 0.03
prompt/StageSettings.task_feature_lengths = %LENGTHS
prompt/StageSettings.train_steps = 4
prompt/StageSettings.batch_size = 4
prompt/StageSettings.checkpoint_period = 2
prompt/OptimizerConfig.learning_rate = 0.01
dataset/StageSettings.task_feature_lengths = %LENGTHS
dataset/StageSettings.train_steps = 4
dataset/StageSettings.batch_size = 4
dataset/StageSettings.checkpoint_period = 2
dataset/OptimizerConfig.learning_rate = 0.02
multitask/StageSettings.task_feature_lengths = %LENGTHS
multitask/StageSettings.train_steps = 2
multitask/StageSettings.batch_size = 4
multitask/StageSettings.checkpoint_period = 2
multitask/OptimizerConfig.learning_rate = 0.02
"""


_train_pieces = sentencepiece.SentencePieceTrainer.train
# Without SentencePiece's table of characters, which would be most of the archive; no run trains it again.
sentencepiece.SentencePieceTrainer.train = functools.partial(_train_pieces,
                                                             normalization_rule_name="identity")


@contextlib.contextmanager
def _sigterm_after(steps: int) -> Iterator[None]:
    """A real SIGTERM to this process, once its training loops asked so often whether to stop."""
    asked, ordinary = 0, preemption.stop_flag

    @contextlib.contextmanager
    def flag() -> Iterator:
        with ordinary() as told:
            def ask() -> bool:
                nonlocal asked
                asked += 1
                if asked == steps:
                    os.kill(os.getpid(), signal.SIGTERM)
                return told()
            yield ask

    preemption.stop_flag = flag
    try:
        yield
    finally:
        preemption.stop_flag = ordinary


def _stopped(command: Sequence[str], steps: int) -> None:
    with _sigterm_after(steps):
        status = elm(command)
    assert status == preemption.STOPPED, (status, command)


def make(folder: pathlib.Path, checkout: pathlib.Path) -> None:
    """All folders, in the folder; some are left half done."""
    for name in GIN:
        target = folder / "gin" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkout / "gin" / name, target)
    shutil.copy(older.HERE / "older_tasks.py", folder)
    folder.joinpath("corpus.txt").write_text("".join(
        f"{line}\n" for passage in itertools.islice(passages(), 150) for line in passage.split("\n")))
    folder.joinpath("study.gin").write_text(STUDY)
    folder.joinpath("experts.jsonl").write_text("".join(
        json.dumps({"task": task, "train.adapter_bottleneck": 2, "TRAIN_STEPS": 4}) + "\n"
        for task in (older.WHICH, older.SUM_UP)))
    run = lambda *command: older.said(elm, command)  # noqa: E731
    run(*older.FINISHED["base"])
    run(*older.FINISHED["arrays"])
    for name in ("prompt", "lora", "sum_up", "dataset"):
        run(*older.FINISHED[name])
    run("merge", "--output", "merged", "--id", "merged", "runs/prompt/expert", "runs/sum_up/expert")
    run("library", "build", "--library", "library", *older.BASE, *older.MODULE, "--prepared", "arrays",
        "--encoder", "tfidf", "--instances", "6", *(f"runs/{name}/expert" for name in ("prompt", "sum_up",
                                                                                      "lora")))
    run(*older.FINISHED["evaluation"])
    run(*older.FINISHED["base's evaluation"])
    run("convert", "--from", "elm", "--to", "t5x", "runs/prompt/expert", "t5x_export", *older.MODULE)
    run("convert", "--from", "elm", "--to", "hf", "runs/prompt/expert", "hf_export", *older.MODULE)
    _stopped(older.HALF_DONE["half_base"], 3)
    _stopped(older.HALF_DONE["half_prompt"], 3)
    _stopped(older.training("experts/prompt.gin", "half_lora", older.WHO, **older.LORA), 2)
    _stopped(older.HALF_DONE["half_dataset"], 3)
    _stopped(older.STACK, 7)
    farm = ["farm", "init", "--dir", "half_farm", "--table", "experts.jsonl",
            *older.training("experts/prompt.gin", "", "")[1:]]
    run(*[word for word in farm if not word.startswith(("--gin.MODEL_DIR", "--gin.TASK="))])
    run("farm", "work", "--dir", "half_farm", "--max_experts", "1")
    _stopped(["farm", "work", "--dir", "half_farm"], 4)
    _stopped(older.STUDY, 2 + 4 + 4 + 3)
    for left in ("base", "half_study/base", *(f"runs/{name}" for name in ("prompt", "lora", "sum_up",
                                                                          "dataset"))):
        shutil.rmtree(folder / left / "checkpoints")
        shutil.rmtree(folder / left / "vocabulary", ignore_errors=True)
    for finished in (folder / "half_farm" / "runs", folder / "half_study" / "experts", folder / "half_stack"):
        for run_folder in finished.iterdir():
            if (run_folder / "expert").exists():
                shutil.rmtree(run_folder / "checkpoints", ignore_errors=True)


def observe(folder: pathlib.Path) -> dict:
    """What the older program itself says, finds done, and ends half-done runs with; in a copy."""
    found = {"commands": older.told(elm), "finished": older.run_facts(folder)}
    before = older.files(folder)
    for command in older.FINISHED.values():
        older.said(elm, command)
    found["written_again"] = sorted(name for name, digest in older.files(folder).items()
                                    if before.get(name) != digest)
    for name, command in older.HALF_DONE.items():
        older.said(elm, command)
        found[name] = older.run_facts(folder / name)
    return found


def main(checkout: pathlib.Path, work: pathlib.Path) -> None:
    """Makes both files."""
    made, copy = work / "made", work / "copy"
    made.mkdir(parents=True)
    with older.inside(made):
        make(made, checkout)
    shutil.rmtree(made / "__pycache__", ignore_errors=True)
    with tarfile.open(older.ARCHIVE, "w:xz", preset=9) as archive:
        archive.add(made, ".", filter=_nobodys)
    shutil.copytree(made, copy)
    with older.inside(copy):
        found = observe(copy)
    facts = {"compiler": older.compiler(), **found}
    lines = [f"{json.dumps(name)}: {json.dumps(value, sort_keys=True)}" for name, value in facts.items()]
    older.EXPECTED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _nobodys(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    main(*(pathlib.Path(argument).resolve() for argument in sys.argv[1:]))
