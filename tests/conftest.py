"""Strict JAX on eight simulated devices for every test; helpers to import; what several folders share."""

import dataclasses
import os
import pathlib
import sys

# Tests compile much and run little: the compiler's expensive passes are left out.
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(pathlib.Path(__file__).parent / "helpers"))

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Sentences of the embedded passages."""
    from elm_jax.tasks.embedded.datasets import passages

    return [line for passage in list(passages())[:400] for line in passage.split("\n") if line]


@pytest.fixture(scope="session")
def vocabulary_proto(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A SentencePiece model of 212 pieces: 312 ids on 320 rows, as 32,100 stand on 32,128."""
    import hf_folders

    path: pathlib.Path = tmp_path_factory.mktemp("vocabulary") / "v.model"
    return hf_folders.make_vocabulary(path, texts)


@dataclasses.dataclass
class World:
    """What the tests of the workflows share; they write elsewhere."""

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
    """One base, three experts and a library."""
    import tiny_study as tiny

    from elm_jax.workflows.build_library import build_library

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
