"""Real text, and a vocabulary trained on it, for the tests of foreign formats."""

import pathlib

import pytest
from elm_jax.tasks.embedded.datasets import passages


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Sentences of the embedded passages."""
    return [line for passage in list(passages())[:400] for line in passage.split("\n") if line]


@pytest.fixture(scope="session")
def vocabulary_proto(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A SentencePiece model of 212 pieces: 312 ids on 320 rows, as 32,100 stand on 32,128."""
    import hf_folders

    path: pathlib.Path = tmp_path_factory.mktemp("vocabulary") / "v.model"
    return hf_folders.make_vocabulary(path, texts)
