"""A tiny decoder of the Llama type goes through the ordinary verbs: train, stack, evaluate, merge.

Its padding is its EOS, id 0 is a real token, BOS stands in front of prompts, and LoRA is on every projection.
"""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import small_decoder
import tiny_study as tiny
import weights

from elm_jax.cli import flags, gin_config, run_config
from elm_jax.cli.main import main
from elm_jax.data.preparing.task_data import TaskData
from elm_jax.data.registry import registry
from elm_jax.experts.base import load_base, save_base
from elm_jax.experts.overlay import load_expert, resolve
from elm_jax.models import families
from elm_jax.models.decoder.config import DecoderConfig
from elm_jax.runtime import trees
from elm_jax.types import Padded
from elm_jax.vocabularies import tokenizer_json

TASK = tiny.TOPIC
COMMON = ["--module", "elm_jax.tasks.embedded", "--batch_size", "4", "--steps", "3",
          "--learning_rate", "1e-2", "--source_length", "48", "--target_length", "16",
          "--gin.MESH_DATA=1", "--gin.train.tensorboard=False"]


def places(folder, name, task):
    return ["--output", str(folder / name), "--base", str(folder / "base"), "--task", task,
            "--prepared", str(folder / "prepared")]


def train(folder, kind, name, task, *more):
    assert main(["train", "--kind", kind, *places(folder, name, task), *COMMON, *more]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    contents = tokenizer_json.with_ids(small_decoder.tokenizer(), pad_id=2, eos_id=2)
    (folder / "tokenizer.json").write_bytes(contents)
    config = DecoderConfig(258, 24, 6, 2, 4, 32, 2, 128, pad_id=2, eos_id=2, bos_id=1, tied_head=True)
    params = weights.drawn(families.network_of(config))
    save_base(folder / "base", params, config, folder / "tokenizer.json", {})
    train(folder, "prompt", "topic", TASK, "--gin.train.expert_id='topic'")
    return folder


def test_a_stack_trains_what_a_run_alone_trains(folder):
    train(folder, "prompt_stack", "stack", f"{TASK},{tiny.REVIEW}")
    found = trees.flatten(load_expert(folder / "stack" / TASK).overlay)
    wanted = trees.flatten(load_expert(folder / "topic").overlay)
    assert found.keys() == wanted.keys() and any("mlp_adapter" in path for path in wanted)
    for path, leaf in wanted.items():
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=2e-5, err_msg=path)


def test_a_dataset_expert_learns(folder):
    train(folder, "dataset", "whole", "mini_topic", "--steps", "12", "--gin.train.log_period=1")
    rows = [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])


def test_where_nothing_is_said_a_decoder_gets_lora_and_the_lengths_of_its_rows(folder, caplog):
    words = ["train", *places(folder, "lora", TASK), "--source_length", "90"]
    arguments = flags.make_parser().parse_args(words)
    arguments.gin_bindings = ["train.few_shot = 0"]  # exemplars take what room there is
    assert not run_config.read_train(arguments)
    arguments.gin_bindings, arguments.gin_file = ["BATCH_SIZE = 4"], None
    assert run_config.read_train(arguments)
    whole = gin_config.build("train")
    assert (whole.lora_rank, whole.task_feature_lengths) == (8, {"inputs": 90, "targets": 128})
    with caplog.at_level("INFO"):
        config, data = run_config.fit_lengths(arguments, whole)
    rows, vocabulary = data.split(TASK, "train"), load_base(folder / "base").vocabulary
    texts = [rows.text(row) for row in range(len(rows))]
    longest = max(len(vocabulary.encode(text["targets"])) + 1 for text in texts)  # EOS
    assert config.task_feature_lengths == {"inputs": 90, "targets": math.ceil(longest / 8) * 8}
    cut = sum(len(vocabulary.encode(text["inputs"])) + 1 > 90 for text in texts)  # BOS
    assert f"90 tokens of input (cut: {cut} of {len(rows)} rows)" in caplog.text and cut > 0
    gin_config.parse_flags(arguments)  # what the flags say now says all of it
    assert gin_config.build("train") == config


@pytest.mark.parametrize("side", ["right", "left"])
def test_show_tells_what_a_prompt_of_a_decoder_loses(folder, side, monkeypatch, capsys):
    """Of 12 tokens one is BOS; there is no EOS in front of the target."""
    registry.import_tasks(["elm_jax.tasks.embedded"])
    task = dataclasses.replace(registry.get_task(TASK), cut_prompt=side)
    monkeypatch.setitem(registry._TASKS, TASK, task)
    vocabulary = load_base(folder / "base").vocabulary
    words = ["tasks", "show", TASK, "--base", str(folder / "base"), "--module", "elm_jax.tasks.embedded",
             "--source_length", "12"]
    assert main([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["cut_prompt"] == side and len(shown["rows"]) == 3
    for row in shown["rows"]:
        tokens = vocabulary.encode(row["input"])
        assert row["tokens"]["input"] == len(tokens) + 1 > 12
        lost = tokens[:-11] if side == "left" else tokens[11:]
        assert row["cut"]["input"] == {"length": 12, "text": vocabulary.decode(lost)}
    assert main(words) == 0 and f"cut_prompt: {side}\n" in capsys.readouterr().out


def test_experts_are_scored_and_merged(folder):
    """`elm evaluate` against sums of `target_log_probs`, one row and one choice at a time."""
    base, expert = load_base(folder / "base"), load_expert(folder / "topic")
    output = folder / "results" / "results.jsonl"
    assert main(["evaluate", "--base", str(folder / "base"), "--expert", str(folder / "topic" / "expert"),
                 "--task", TASK, "--max_rows", "4", "--output", str(output), "--source_length", "48",
                 "--max_new_tokens", "4", "--prepared", str(folder / "prepared"),
                 "--module", "elm_jax.tasks.embedded"]) == 0
    network, params = resolve(base, expert)
    split = TaskData(base.vocabulary, tiny.MODULES, str(folder / "prepared")).split(TASK, "validation", 4)
    score = jax.jit(network.target_log_probs)
    right = 0
    for number in range(len(split)):
        prompt = np.append(1, split.inputs(number)[:-1])[:48]  # BOS in front, and the choice follows
        choices = split.choices(number)
        longest = np.full((1, len(choices), 24), 9, np.int32)
        for row, choice in zip(longest[0], choices, strict=True):
            row[:len(choice)] = choice
        wide = np.full((1, 48), 7, np.int32)
        wide[0, :len(prompt)] = prompt
        sizes = np.array([list(map(len, choices))], np.int32)
        found = score(params, Padded(wide, np.array([len(prompt)])), Padded(longest, sizes)).sum(axis=-1)
        right += int(np.argmax(found[0])) == split.label(number)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows[0]["value"] == pytest.approx(right / len(split))
    sizes = [len(split.inputs(number)) for number in range(len(split))]  # with EOS, for which there is BOS
    assert rows[0]["num_cut"] == sum(size > 48 for size in sizes)
    assert main(["merge", "--output", str(folder / "merged"), str(folder / "topic" / "expert"),
                 str(folder / "topic" / "expert")]) == 0
    own = trees.flatten(expert.overlay)
    for path, leaf in trees.flatten(load_expert(folder / "merged").overlay).items():
        np.testing.assert_allclose(leaf, own[path], rtol=0, atol=1e-6)
