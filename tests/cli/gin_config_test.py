"""Gin at the edge: every binding is used or refused, and every value is of its field's type."""

import pytest
from checkout import ROOT

import gin
from elm_jax.cli import gin_config
from elm_jax.errors import InputError
from elm_jax.models.t5.config import T5Config
from elm_jax.training.optimizers import OptimizerConfig
from elm_jax.workflows.study.study_config import StageSettings
from elm_jax.workflows.train.pretrain import PretrainConfig
from elm_jax.workflows.train.train_config import TrainConfig

GIN = ROOT / "gin"
BINDINGS = {
    "train": ["MODEL_DIR='runs/a'", "INITIAL_CHECKPOINT_PATH='base'", "TASK='ag_news__classify'"],
    "pretrain": ["MODEL_DIR='runs/base'", "PASSAGES=('corpus.txt',)"],
    "study": ["WORKDIR='study'"],
}
RUNS = [("experts/prompt.gin", "train"), ("experts/dataset.gin", "train"), ("experts/multitask.gin", "train"),
        ("runs/pretrain.gin", "pretrain"), ("studies/demo.gin", "study"), ("studies/p3_small.gin", "study"),
        ("studies/t0_data.gin", "study"),
        *((f"scale/{path.name}", "train") for path in sorted((GIN / "scale").glob("*.gin")))]
SHARDINGS = sorted((GIN / "sharding").glob("*.gin"))


def build(file, name, *bindings):
    gin_config.parse([str(GIN / file)], [*BINDINGS[name], *bindings])
    return gin_config.build(name)


@pytest.mark.parametrize(("file", "name"), RUNS)
def test_every_binding_of_the_shipped_runs_is_used(file, name):
    build(file, name)


def test_the_study_at_the_papers_scale_has_its_experts_and_targets():
    study = build("studies/roe_xl.gin", "study", "INITIAL_CHECKPOINT_PATH='base'")
    assert len(study.prompt_tasks) == 296 and len(study.datasets) == 36 and len(study.unseen_tasks) == 113
    assert [task.split("__")[0].removeprefix("bigbench_") for task in study.bigbench_tasks] == [
        "code_line_description", "conceptual_combinations", "formal_fallacies_syllogisms_negation",
        "hindu_knowledge", "known_unknowns", "language_identification", "logic_grid_puzzle",
        "logical_deduction", "misconceptions", "movie_dialog_same_or_different", "strategyqa",
        "vitaminc_fact_verification", "winowhy"]  # the paper's 13
    assert study.prompt.epochs == 5 and study.prompt.train_steps is None
    assert study.dataset.sharding_rules != study.prompt.sharding_rules


@pytest.mark.parametrize("path", SHARDINGS, ids=lambda path: path.stem)
def test_the_shipped_sharding_rules_are_rules(path):
    gin_config.parse([str(GIN / "experts" / "prompt.gin"), str(path)], BINDINGS["train"])
    rules = dict(gin_config.build("train").rules())
    split = {name for name, axis in rules.items() if axis == "model"}
    assert bool(split) == ("model" in path.stem)
    assert (rules["embed"] == "data") == ("fsdp" in path.stem)


@pytest.mark.parametrize(("binding", "message"), [
    ("SHARDING_RULES=(('embd','data'),)", "Unknown logical axis 'embd'"),
    ("SHARDING_RULES=(('embed','modle'),)", "Unknown mesh axis 'modle'"),
    ("REMAT='layers'", "Unknown remat policy 'layers'"), ("SCAN_LAYERS='yes'", "True or False"),
    ("BASE_DTYPE='float16'", "base_dtype")])
def test_how_a_step_is_laid_out_is_checked_before_anything_is_loaded(binding, message):
    with pytest.raises(InputError, match=message):
        build("experts/prompt.gin", "train", binding)


def test_only_what_decides_a_result_is_in_the_digest():
    plain = build("experts/prompt.gin", "train").digest()
    assert plain == build("experts/prompt.gin", "train", "SHARDING_RULES=(('embed','data'),)",
                          "REMAT='layer'", "SCAN_LAYERS=True", "MESH_DATA=4", "BASE_DTYPE='float32'").digest()
    assert plain != build("experts/prompt.gin", "train", "BASE_DTYPE='bfloat16'").digest()
    with pytest.raises(InputError, match="no frozen base"):
        build("experts/dataset.gin", "train", "BASE_DTYPE='bfloat16'")


@pytest.mark.parametrize(("file", "name", "binding", "set_name", "nearest"), [
    ("studies/demo.gin", "study", "promt/StageSettings.train_steps=5",
     "promt/StageSettings.train_steps", "prompt/StageSettings.train_steps"),
    ("studies/demo.gin", "study", "StageSettings.train_steps=5",  # every scope binds its own
     "StageSettings.train_steps", "prompt/StageSettings.train_steps"),
    ("studies/demo.gin", "study", "prompt/T5Config/OptimizerConfig.learning_rate=1",
     "prompt/T5Config/OptimizerConfig.learning_rate", "prompt/OptimizerConfig.learning_rate"),
    ("experts/prompt.gin", "train", "pretrain.batch_size=4", "pretrain.batch_size", "train.batch_size"),
    ("experts/prompt.gin", "train", "StageSettings.max_examples=9",
     "StageSettings.max_examples", "train.max_examples"),
    ("runs/pretrain.gin", "pretrain", "train.train_steps=4", "train.train_steps", "pretrain.train_steps"),
    ("studies/demo.gin", "study", "VOCABSIZE=4", "VOCABSIZE", "VOCAB_SIZE"),
])
def test_a_binding_that_nothing_uses_is_refused_with_the_nearest(file, name, binding, set_name, nearest):
    with pytest.raises(InputError) as found:
        build(file, name, binding)
    assert str(found.value).startswith(f"{set_name} is set but nothing uses it")
    assert f"Did you mean {nearest}?" in str(found.value)


def test_a_scope_that_says_less_takes_the_rest_from_the_outside():
    study = build("studies/demo.gin", "study", "StageSettings.dropout_rate=0.2",
                  "prompt/StageSettings.dropout_rate=0.3")
    assert (study.prompt.dropout_rate, study.multitask.dropout_rate) == (0.3, 0.2)


@pytest.mark.parametrize(("change", "expected"), [
    ({"batch_size": 8.5}, "a whole number"),
    ({"batch_size": True}, "a whole number"),
    ({"train_steps": -3}, "above 0"),
    ({"train_steps": None, "epochs": -1.0}, "above 0"),
    ({"train_steps": None, "epochs": float("nan")}, "a finite number or None"),
    ({"train_norms": "False"}, "True or False"),
    ({"pack": "no"}, "True or False"),
    ({"max_examples": "7"}, "a whole number or None"),
    ({"max_examples": 0}, "above 0"),
    ({"dropout_rate": 1.0}, "from 0 to below 1"),
    ({"random_seed": -1}, "at least 0"),
    ({"adapter_bottleneck": 0}, "above 0"),
    ({"dtype": "float16"}, "nearest: bfloat16"),
    ({"modules": 3}, "a tuple, each item a string in quotes"),
    ({"task_feature_lengths": {"inputs": 8, "targets": "4"}}, "each value a whole number"),
    ({"optimizer": "adamw"}, "@OptimizerConfig()"),
    ({"model_dir": None}, "a string in quotes"),
])
def test_every_field_of_a_training_run_has_its_type_and_range(change, expected):
    with pytest.raises(InputError) as found:
        TrainConfig(**{"model_dir": "runs/a", "task": "t", "initial_checkpoint_path": "base",
                       "train_steps": 3, **change})
    assert expected in str(found.value) and list(change)[-1] in str(found.value)


def test_studies_and_bases_check_their_types_too():
    with pytest.raises(InputError, match=r"StageSettings\.train_steps"):
        StageSettings(train_steps=2.5, batch_size=4, task_feature_lengths={"inputs": 8, "targets": 8},
                      optimizer=OptimizerConfig())
    network = T5Config(vocab_size=128, emb_dim=8, num_heads=1, head_dim=8, mlp_dim=8, num_encoder_layers=1,
                       num_decoder_layers=1)
    with pytest.raises(InputError, match=r"PretrainConfig.passages(.|\n)*a tuple, each item a string"):
        PretrainConfig(model_dir="runs/base", network=network, passages=("corpus.txt", 1))
    with pytest.raises(InputError, match=r"StudyConfig.top_k(.|\n)*a whole number"):
        build("studies/demo.gin", "study", "study.top_k=2.0")


def test_a_gin_file_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "mine.gin").write_bytes(b"\xef\xbb\xbftrain.batch_size = 3\n")
    gin_config.parse([str(tmp_path / "mine.gin")], [])
    assert gin.query_parameter("train.batch_size") == 3
