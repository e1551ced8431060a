"""What configs of studies of arms refuse."""

import dataclasses

import pytest
from checkout import HELPERS, ROOT

from elm_jax.cli import gin_config
from elm_jax.errors import InputError
from elm_jax.models.layers.sparse_config import SparseConfig
from elm_jax.models.losses import LossConfig
from elm_jax.models.t5.config import T5Config
from elm_jax.training.optimizers import OptimizerConfig
from elm_jax.workflows.arms.arm_settings import ArmSettings, GridPoint
from elm_jax.workflows.arms.flan_study import check_flan_study
from elm_jax.workflows.study.study_config import StageSettings

DENSE = T5Config(vocab_size=100, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32, num_encoder_layers=1,
                 num_decoder_layers=1)
SPARSE = dataclasses.replace(DENSE, sparse=SparseConfig(num_experts=2, step=1))


def flan(*bindings):
    gin_config.parse([str(HELPERS / "tiny_flan.gin")], ["WORKDIR='none'", *bindings], [str(ROOT / "gin")])
    return gin_config.build("flan_study")


@pytest.mark.parametrize(("settings", "words"), [
    ({"network": DENSE, "loss": LossConfig(balance_loss=0.1)}, "no layer is sparse"),
    ({"network": DENSE, "origin": "upcycled"}, "A dense network"),
    ({"network": SPARSE, "origin": "upcycle"}, "upcycled"),
    ({"network": SPARSE, "upcycle_noise": 0.1, "origin": "scratch"}, "nothing is copied"),
    ({"network": SPARSE, "origin": "regated"}, "the base of one arm"),
    ({"network": DENSE, "name": "../a"}, "name of an arm"),
])
def test_an_arm_refuses(settings, words):
    with pytest.raises(InputError, match=words):
        ArmSettings(**{"name": "arm", **settings})


@pytest.mark.parametrize(("binding", "words"), [
    ("flan_study.arms = (@upcycled/Arm(), @dense/Arm())", "the dense network that the others are compared"),
    ("flan_study.arms = (@dense/Arm(),)", "too few values"),
    ("flan_study.tuning_counts = (2, 1)", "rising numbers, the last 2"),
    ("flan_study.grid_tasks = 3", "more tasks than there are"),
    ("flan_study.ablated_arm = 'dense'", "of an arm with experts"),
    ("flan_study.ablations = ('no router',)", "unknown or takes nothing away"),
    ("LossConfig.balance_loss = 0.0", "no balance loss"),
    ("flan_study.seeds = (0, 0)", "one twice"),
])
def test_a_study_of_instruction_tuning_refuses(binding, words):
    with pytest.raises(InputError, match=words):
        flan(binding)


def test_instruction_tuning_sees_no_data_set_that_it_is_scored_on():
    seen = "('mini_topic__which_section', 'mini_headline__write_a_headline')"
    with pytest.raises(InputError, match="mini_topic__about_what") as raised:
        check_flan_study(flan(f"flan_study.tuning_tasks = {seen}"))
    assert "mini_topic__which_section" in str(raised.value)
    check_flan_study(flan())


def test_every_batch_size_of_the_grid_sees_as_many_rows():
    stage = StageSettings(train_steps=100, batch_size=4, task_feature_lengths={"inputs": 8, "targets": 4},
                          optimizer=OptimizerConfig())
    assert [GridPoint(0.1, size).steps(stage) * size for size in (2, 4, 8)] == [400, 400, 400]
    assert GridPoint(0.1, 8).steps(stage, 0.5) == 25
