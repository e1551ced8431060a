"""Merging experts: properties of the mean, and who is refused."""

import dataclasses

import numpy as np
import pytest
import tiny_study as tiny

from elm_jax.errors import InputError
from elm_jax.experts.overlay import load_expert, resolve
from elm_jax.runtime import trees
from elm_jax.workflows.merge.in_memory import merge
from elm_jax.workflows.route import route


def test_mean_equals_float64_numpy(world):
    merged = merge([world.topic, world.review], weights=[3, 1])
    left, right = trees.flatten(world.topic.overlay), trees.flatten(world.review.overlay)
    for path, leaf in trees.flatten(merged.overlay).items():
        wanted = 0.75 * left[path].astype(np.float64) + 0.25 * right[path].astype(np.float64)
        np.testing.assert_allclose(leaf, wanted, atol=1e-7, err_msg=path)
    assert [parent["weight"] for parent in merged.card.parents] == [0.75, 0.25]


def test_merging_an_expert_with_itself_changes_nothing(world):
    merged = merge([world.topic, world.topic])
    assert trees.fingerprint(merged.overlay) == trees.fingerprint(world.topic.overlay)


def test_a_merged_dataset_expert_has_the_leaves_of_the_base(world, tmp_path):
    other = tiny.make_expert(world.base, tmp_path / "x", task="mini_topic", kind="dataset", random_seed=1,
                             expert_id="other", prepared_dir=str(world.folder / "prepared"))
    merged = merge([world.dataset, other], output=tmp_path / "merged")
    network, params = resolve(world.base, load_expert(tmp_path / "merged"))
    assert trees.first_difference(params, world.base.params) is None
    assert network.config == world.base.config and merged.card.kind == "merged"


def test_adapters_and_full_weights_are_refused_with_the_first_differing_leaf(world):
    with pytest.raises(InputError, match=r"unlike kind(.|\n)*first differing leaf: \S+"):
        merge([world.topic, world.dataset])


def test_experts_of_unlike_bases_are_refused(world):
    other = dataclasses.replace(
        world.review, card=dataclasses.replace(
            world.review.card, base={"name": "other", "fingerprint": world.other_base.fingerprint}))
    with pytest.raises(InputError, match="unlike base"):
        merge([world.topic, other])


def test_experts_of_unlike_kinds_and_networks_are_refused(world):
    def changed(**changes):
        return dataclasses.replace(world.dataset, card=dataclasses.replace(world.dataset.card, **changes))

    with pytest.raises(InputError, match=r"unlike kind(.|\n)*dataset and multitask"):
        merge([world.dataset, changed(kind="multitask")])
    network = {**world.dataset.card.network, "relative_attention_max_distance": 64}
    with pytest.raises(InputError, match="unlike network"):
        merge([world.dataset, changed(network=network)])
    merged = merge([world.dataset, world.dataset])
    assert merge([merged, world.dataset]).card.parents[0]["kind"] == "dataset"


def test_adapters_of_unlike_width_are_refused_by_leaf(world, tmp_path):
    wide = tiny.make_expert(world.base, tmp_path / "x", adapter_bottleneck=8,
                            prepared_dir=str(world.folder / "prepared"))
    with pytest.raises(InputError, match=r"unlike network(.|\n)*decoder/layers_0/mlp_adapter/down/bias, "
                                         r"\[4\] and \[8\]"):
        merge([world.topic, wide])


def test_from_library_to_merged_in_one_call(world):
    decision = route(world.library, ["The coach of the team left after the match."])
    merged = merge(world.library, decision=decision, top_k=2)
    assert {parent["id"] for parent in merged.card.parents} == {tiny.TOPIC, tiny.REVIEW}


def test_too_few_experts_or_weights(world):
    with pytest.raises(InputError, match=r"(?s)Weights are numbers.*'votes'.*need a library"):
        merge([world.topic, world.review], weights="votes")
    with pytest.raises(InputError, match="two or more"):
        merge([world.topic])
    with pytest.raises(InputError, match="one value an expert"):
        merge([world.topic, world.review], weights=[1.0])
