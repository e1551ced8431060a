"""The installed `elm` command in a process of its own: exit status, message, and no network."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import tiny_study as tiny
from checkout import ROOT

ELM = pathlib.Path(sys.executable).with_name("elm")
MODULE = ["--module", "elm_jax.tasks.embedded"]
OWN_MODULE = '''
from elm_jax.data import registry
from elm_jax.data.prompts.templates import PromptTemplate

ROWS = [{"text": f"row {number}", "label": number % 2} for number in range(6)]
PROMPT = PromptTemplate("Ask", "{{text}} ||| {{answer_choices[label]}}", "no ||| yes", ("Accuracy",))
registry.add_prompted_task("own", None, PROMPT, kind="rank", role="bigbench", splits=("test",),
                           rows=lambda split: ROWS)
'''
NO_NETWORK = '''
import socket
def refuse(*_, **__):
    raise AssertionError("the network was asked for")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
'''


def elm(*words, cwd=ROOT, **environment):
    """The finished process of one `elm` command; whatever it prints, never a traceback."""
    paths = [environment.pop("PYTHONPATH", ""), str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [ELM, *map(str, words)], capture_output=True, text=True, timeout=600, cwd=cwd,
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))})
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


def train_words(world, folder, *bindings):
    settings = {
        "MODEL_DIR": str(folder), "INITIAL_CHECKPOINT_PATH": world.base.path, "TASK": tiny.TOPIC,
        "PREPARED_DIR": str(world.folder / "prepared"), "TASK_MODULES": tiny.MODULES, "EPOCHS": None,
        "TRAIN_STEPS": 5, "BATCH_SIZE": 4, "TASK_FEATURE_LENGTHS": tiny.LENGTHS, "MESH_DATA": 1,
        "train.log_period": 1, "train.tensorboard": False}
    return ["train", "--gin_file", "experts/prompt.gin",
            *(f"--gin.{name}={value!r}" for name, value in settings.items()),
            *(f"--gin.{binding}" for binding in bindings)]


def test_a_run_that_leaves_the_finite_numbers_is_status_1(world, tmp_path):
    done = elm(*train_words(world, tmp_path / "run", "LEARNING_RATE=1e30"))
    assert done.returncode == 1 and "elm train: Training left the finite numbers at step" in done.stderr
    assert done.stdout == "" and not (tmp_path / "run" / "expert").exists()


def test_a_base_that_does_not_fit_its_config_is_status_2_and_names_the_leaf(world, tmp_path):
    shutil.copytree(world.base.path, tmp_path / "base")
    facts = json.loads((tmp_path / "base" / "base.json").read_text())
    facts["network"]["mlp_dim"] *= 2
    (tmp_path / "base" / "base.json").write_text(json.dumps(facts))
    done = elm(*train_words(world, tmp_path / "run", f"INITIAL_CHECKPOINT_PATH={str(tmp_path / 'base')!r}"))
    assert done.returncode == 2 and "elm train: The base does not fit its network config" in done.stderr
    assert "mlp/wi" in done.stderr and str(tmp_path / "base") in done.stderr
    assert not (tmp_path / "run" / "expert").exists()


def test_keys_of_another_encoder_are_status_2(world, tmp_path):
    from elm_jax.routing.encoders import TfidfEncoder, save_encoder

    shutil.copytree(world.library.path, tmp_path / "lib")
    shutil.rmtree(tmp_path / "lib" / "encoder")
    save_encoder(TfidfEncoder.fit([f"other words of row {number}" for number in range(40)]),
                 tmp_path / "lib" / "encoder")
    done = elm("route", "--library", tmp_path / "lib", "--task", tiny.REVIEW, *MODULE)
    assert done.returncode == 2 and done.stdout == ""
    assert "another encoder" in done.stderr and world.library.encoder.fingerprint in done.stderr


def test_a_text_is_answered_on_standard_output_alone(world):
    import elm_jax

    done = elm("generate", "--expert", world.folder / "topic", "--max_new_tokens", "4", "What is it about?")
    expected = elm_jax.generate(world.base, world.topic, ["What is it about?"], max_new_tokens=4)
    assert (done.returncode, done.stdout) == (0, f"{expected[0]}\n")


def test_a_module_of_the_current_folder_is_a_registry(world, tmp_path):
    (tmp_path / "own_tasks.py").write_text(OWN_MODULE)
    done = elm("tasks", "prepare", "--base", world.base.path, "--prepared", "arrays", "own__ask",
               "mini_emotion__name_the_emotion", "--module", "own_tasks", *MODULE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "task\tsplit\trows\tdropped\twhy\nown__ask\ttest\t6\t0\t\n"
        "mini_emotion__name_the_emotion\tvalidation\t150\t0\t\n")
    done = elm("tasks", "list", "--module", "own_taks", cwd=tmp_path)
    assert done.returncode == 2 and "own_taks cannot be imported" in done.stderr
    assert "in the current folder" in done.stderr


@pytest.mark.parametrize("words", [
    ("list",), ("show", "mini_topic__about_what", "--rows", "1"), ("show", "ag_news__classify")])
def test_the_tasks_need_no_network(tmp_path, words):
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    done = elm("tasks", *words, PYTHONPATH=str(tmp_path), ELM_DATA_DIR="")
    assert done.returncode == (2 if "ag_news__classify" in words else 0), done.stderr
    assert ("set ELM_DATA_DIR" in done.stderr) == ("ag_news__classify" in words)
    if "list" not in words:
        return
    proof = subprocess.run([sys.executable, "-c", "import urllib.request as r; r.urlopen('http://localhost')"],
                           capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert "the network was asked for" in proof.stderr, "the trap is not set"
