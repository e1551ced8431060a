"""PyTorch files: code in a pickle never runs, damage is one clear error."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from elm_jax.errors import InputError
from elm_jax.formats.tensors import streaming, torch_files
from elm_jax.runtime import storage


class Code:
    """What a hostile checkpoint holds: a call that unpickling makes."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


def open_file(path):
    return torch_files.TorchFiles().stored(storage.as_path(path))


@pytest.mark.parametrize("save", [
    lambda value, path: torch.save(value, path),
    lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)),
])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, save):
    path, witness = tmp_path / "pytorch_model.bin", tmp_path / "witness"
    save({"shared.weight": torch.ones(3), "x": Code(witness)}, path)
    with pytest.raises(InputError, match="something else than tensors") as caught:
        open_file(path)
    assert str(path) in str(caught.value) and not witness.exists()


@pytest.mark.parametrize("old", [False, True])
def test_truncated_files(tmp_path, old):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=not old)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="truncated or damaged"):
        open_file(path)


@pytest.mark.parametrize("value", [torch.ones(3), {"a": torch.ones(2), "epoch": 3}, {}, [torch.ones(2)]])
def test_files_of_something_else(tmp_path, value):
    torch.save(value, tmp_path / "x.bin")
    with pytest.raises(InputError, match="something else than tensors by name"):
        open_file(tmp_path / "x.bin")


def test_views_parameters_and_bfloat16(tmp_path):
    weight = torch.randn(6, 4).to(torch.bfloat16)
    torch.save({"view": weight.T, "parameter": torch.nn.Parameter(torch.randn(3))}, tmp_path / "x.bin")
    stored = open_file(tmp_path / "x.bin")
    assert stored["view"].dtype == "bfloat16" and stored["view"].shape == (4, 6)
    np.testing.assert_array_equal(streaming.read_part(stored["view"], transposed=True).astype(np.float32),
                                  weight.float().numpy())
    assert streaming.read_part(stored["parameter"]).shape == (3,)


def test_without_torch_it_is_one_clear_line(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    program = ("import sys; sys.modules['torch'] = None\n"
               "from elm_jax.errors import InputError\n"
               "from elm_jax.formats.tensors import torch_files\n"
               "try: torch_files.open_tensors(sys.argv[1])\n"
               "except InputError as error: print(str(error).splitlines()[0])")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "Reading this file needs PyTorch, which is not installed", done.stderr
