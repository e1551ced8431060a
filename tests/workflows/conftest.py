"""One base, three experts and a library, made once for all tests of the workflows."""

import dataclasses
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import tiny_study as tiny

from elm_jax.workflows.build_library import build_library


@dataclasses.dataclass
class World:
    """What the tests share; they write elsewhere."""

    folder: pathlib.Path
    base: object
    other_base: object
    topic: object
    review: object
    dataset: object
    data: object
    library: object


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    base = tiny.make_base(folder / "base")
    topic = tiny.make_expert(base, folder / "topic")
    review = tiny.make_expert(base, folder / "review", task=tiny.REVIEW)
    dataset = tiny.make_expert(base, folder / "dataset", task="mini_topic", kind="dataset",
                               expert_id="topic-de")
    data = tiny.make_data(base, folder)
    library = build_library(folder / "library", [folder / "topic" / "expert", folder / "review"], data,
                            encoder="tfidf", instances_per_expert=40)
    other_base = tiny.make_base(folder / "other", seed=1)
    return World(folder, base, other_base, topic, review, dataset, data, library)
