"""Parity with mergekit on the same safetensors, tensor by tensor.

Results agree within one unit in the last place of the output's dtype, taken at the largest number that is
added for that element: a sum cannot be more exact than its largest term. Where mergekit computes otherwise
than we do, a test says how and why:

- it subtracts, weighs and adds task vectors in the tensors' own dtype; with ``dtype: float32`` and an
  ``out_dtype`` in float32, as we always do;
- among equal magnitudes at TIES' threshold it keeps whichever its unstable sort puts first, and we the first
  ones of the leaf;
- where the experts' weighted signs cancel up to rounding, the vote of TIES is rounding's;
- in float32 a few steps are rounded otherwise (`FURTHER`); ours are then no further from the exact result.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mergekit_peer as peer
import numpy as np
import pytest
import safetensors.torch
import torch

from elm_jax.errors import InputError

DECIDED = 2.0**-20
"""Of the terms' sum: a vote of less is one of rounding errors in float32."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A merge as YAML has it: parameters of each expert in order, and those of all."""

    method: str
    experts: Sequence[Mapping[str, Any]]
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def base(self) -> bool:
        """Whether it works on task vectors."""
        return self.method not in ("linear", "slerp")


def weighted(*weights: Any, **each: Any) -> list[dict[str, Any]]:
    """Parameters of experts that have weights and otherwise the same settings."""
    return [{"weight": weight, **each} for weight in weights]


BY_NAME = [{"filter": "norm", "value": 0.25}, {"filter": ".0.", "value": [1.0, 0.5, 0.0]},
           {"filter": "*", "value": [0.6, 0.2]}]
DETERMINISTIC = {
    "mean": Case("linear", weighted(1.0, 1.0, 1.0)),
    "weighted": Case("linear", weighted(0.7, 0.2, 0.4)),
    "sum": Case("linear", weighted(0.5, 0.25, 1.0), {"normalize": False}),
    "negative": Case("linear", weighted(1.5, -0.5, 0.3)),
    "negative_sum": Case("linear", weighted(1.0, -1.0, 0.3), {"normalize": False}),
    "linear_by_layer": Case("linear", weighted([0.1, 1.0], [1.0, 0.2, 0.0], 0.5)),
    "linear_by_name": Case("linear", weighted(BY_NAME, 1.0, [{"filter": "1.", "value": 2}, {"value": 1}])),
    "slerp_0": Case("slerp", [{}], {"t": 0}),
    "slerp_0.3": Case("slerp", [{}], {"t": 0.3}),
    "slerp_1": Case("slerp", [{}], {"t": 1}),
    "slerp_by_layer": Case("slerp", [{}], {"t": [0.0, 0.5, 0.2, 1.0]}),
    "slerp_by_name": Case("slerp", [{}], {"t": BY_NAME}),
    "arithmetic": Case("task_arithmetic", weighted(1.0, 0.5, 0.25)),
    "arithmetic_lambda": Case("task_arithmetic", weighted(0.7, -0.4, 0.9), {"lambda": 0.6}),
    "arithmetic_normalized": Case("task_arithmetic", weighted(0.7, 0.2, 0.4), {"normalize": True}),
    "arithmetic_by_layer": Case(
        "task_arithmetic", weighted([1.0, 0.0], 0.5, BY_NAME), {"lambda": [1.0, 0.5]}),
    "ties_0": Case("ties", weighted(1.0, 1.0, 1.0, density=0.0)),
    "ties_0.2": Case("ties", weighted(1.0, 1.0, 1.0, density=0.2)),
    "ties_0.5": Case("ties", weighted(0.7, 0.2, 0.4, density=0.5)),
    "ties_1": Case("ties", weighted(0.7, 0.2, 0.4, density=1)),
    "ties_sum": Case("ties", weighted(0.7, 0.2, 0.4, density=0.5), {"normalize": False}),
    "ties_lambda": Case("ties", weighted(0.7, -0.2, 0.4, density=0.3), {"lambda": 0.6, "normalize": False}),
    "ties_rescaled": Case("ties", weighted(0.7, 0.2, 0.4, density=0.3), {"rescale": True}),
    "ties_by_layer": Case("ties", [{"weight": 1.0, "density": [0.9, 0.1]}, {"weight": 0.5, "density": 0.3},
                                   {"weight": BY_NAME, "density": BY_NAME}], {"int8_mask": True}),
    "dare_linear_0": Case("dare_linear", weighted(0.7, 0.2, 0.4, density=0.0)),
    "dare_linear_1": Case("dare_linear", weighted(0.7, 0.2, 0.4, density=1.0)),
    "dare_ties_1": Case("dare_ties", weighted(0.7, 0.2, 0.4, density=1.0), {"normalize": True}),
}
UNCHANGED = ("ties_0", "slerp_0", "dare_linear_0")
"""Cases whose result is the base."""
FURTHER = {
    "slerp_0.3": 4, "slerp_by_layer": 4, "slerp_by_name": 4,  # norms and inner product: float32, ours float64
    # products and sums are fused here, and rounded one by one there
    "arithmetic_lambda": 2, "arithmetic_by_layer": 3, "arithmetic_normalized": 2, "dare_linear_1": 2,
    "ties_lambda": 2,
    "ties_rescaled": 8,  # L1 norms: float32, ours float64
}
"""Units of float32 that results may be apart, with the reason."""
EIGHTHS = {
    "mean": Case("linear", weighted(1.0, 1.0, 1.0)),
    "weighted": Case("linear", weighted(0.75, 0.125, 0.375)),
    "negative": Case("linear", weighted(1.5, -0.625, 0.375)),
    "linear_by_layer": Case("linear", weighted([0.125, 0.5], [0.875, 0.125, 0.0], 0.625)),
    "slerp": Case("slerp", [{}], {"t": 0.375}),
    "slerp_by_layer": Case("slerp", [{}], {"t": [0.0, 0.375, 0.625, 1.0]}),
    "arithmetic_lambda": Case("task_arithmetic", weighted(0.75, -0.375, 0.875), {"lambda": 0.625}),
    "arithmetic_normalized": Case("task_arithmetic", weighted(0.75, 0.125, 0.375), {"normalize": True}),
    "ties_lambda": Case("ties", weighted(0.75, -0.125, 0.375, density=0.25), {"lambda": 0.625}),
    "ties_rescaled": Case("ties", weighted(0.75, 0.125, 0.375, density=0.25), {"rescale": True}),
}
"""Settings that float32 holds exactly, so that only sums and products are rounded."""
ON_EVERY_SHAPE = ("linear_by_layer", "slerp_by_name", "arithmetic_by_layer", "ties_by_layer", "ties_0.2")


@pytest.fixture(scope="session")
def family(tmp_path_factory) -> Callable[[str, str], dict[str, pathlib.Path]]:
    """Folders of a shape and dtype, made once."""
    return functools.cache(lambda shape, dtype: peer.make_family(
        tmp_path_factory.mktemp(f"{shape}_{dtype}"), shape, dtype))


@pytest.fixture
def stable(monkeypatch) -> None:
    """mergekit with a stable sort: of equal magnitudes the first ones come first, as here."""
    monkeypatch.setattr(torch, "argsort", functools.partial(torch.argsort, stable=True))


def both(case: Case, folders: Mapping[str, pathlib.Path], tmp_path: pathlib.Path,
         **config: Any) -> tuple[peer.Tensors, peer.Tensors]:
    """Our result and mergekit's, by one file."""
    path = file_of(case, folders, tmp_path, **config)
    return peer.run_ours(path, tmp_path / "ours"), peer.run_mergekit(path, tmp_path / "theirs", seed=1)


def file_of(case: Case, folders: Mapping[str, pathlib.Path], tmp_path: pathlib.Path,
            **config: Any) -> pathlib.Path:
    """The file of a case, with more keys."""
    if case.method == "slerp":
        config["base_model"] = str(folders["base"])
    config |= {"merge_method": case.method, "parameters": dict(case.parameters)}
    return peer.write_yaml(tmp_path / "merge.yaml", folders, config, case.experts, case.base)


def in_float32(case: Case, dtype: str) -> dict[str, str]:
    """Keys with which mergekit computes in float32, as it always does without task vectors."""
    return {"dtype": "float32", "out_dtype": dtype} if case.base else {}


def inputs(folders: Mapping[str, pathlib.Path]) -> dict[str, peer.Tensors]:
    """All tensors of a family."""
    return {name: peer.read(folder) for name, folder in folders.items()}


def largest_term(tensors: Mapping[str, peer.Tensors], leaf: str) -> torch.Tensor:
    """The largest magnitude among the inputs, element by element."""
    return torch.stack([each[leaf].abs().double() for each in tensors.values()]).amax(0)


def assert_agree(ours: peer.Tensors, theirs: peer.Tensors, tensors: Mapping[str, peer.Tensors],
                 left_out: Callable[[str], np.ndarray], allowed: float = 1.0) -> None:
    """Some units at most, apart from elements that may be left out with a reason; those must be few."""
    assert sorted(ours) == sorted(theirs) == sorted(tensors["base"])
    excused = 0
    for leaf, tensor in ours.items():
        units = peer.units_apart(tensor, theirs[leaf], largest_term(tensors, leaf))
        beyond, without = units > allowed, left_out(leaf)
        wrong = np.argwhere(beyond & ~without)
        assert not len(wrong), f"{leaf}: {units[~without].max()} units apart, first at {wrong[0].tolist()}"
        excused += int(np.count_nonzero(beyond))
    assert excused < 0.01 * sum(tensor.numel() for tensor in ours.values())


def undecided(case: Case, tensors: Mapping[str, peer.Tensors], leaf: str) -> np.ndarray:
    """Where changes of some experts cancel, so that the vote on their sign may be one of rounding errors.

    Which experts are left after sparsifying is not asked: every set of them whose sum cancels counts.
    Weights that differ by leaf are taken to be decided.
    """
    base = tensors["base"][leaf].double().numpy()
    weights = [each.get("weight") for each in case.experts]
    found = np.zeros(base.shape, bool)
    if "ties" not in case.method or not all(isinstance(weight, float) for weight in weights):
        return found
    terms = [weight * (tensors[f"expert{number}"][leaf].double().numpy() - base)
             for number, weight in enumerate(weights)]
    for count in range(2, len(terms) + 1):
        for chosen in itertools.combinations(terms, count):
            size = sum(np.abs(term) for term in chosen)
            found |= (np.abs(sum(chosen)) <= DECIDED * size) & (size > 0)
    return found


def at_a_threshold(case: Case, tensors: Mapping[str, peer.Tensors], leaf: str) -> np.ndarray:
    """Where an expert's change has just the smallest magnitude that TIES keeps."""
    base = tensors["base"][leaf].float().numpy()
    found = np.zeros(base.shape, bool)
    for number, each in enumerate(case.experts):
        change = np.abs(tensors[f"expert{number}"][leaf].float().numpy() - base)
        kept = max(1, int(each["density"] * change.size))
        found |= change == np.sort(change, axis=None)[-kept]
    return found


@pytest.mark.parametrize("dtype", peer.DTYPES)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_llama_shaped_checkpoints_merge_as_in_mergekit(name, dtype, family, tmp_path, stable):
    case, folders = DETERMINISTIC[name], family("llama", dtype)
    tensors = inputs(folders)
    ours, theirs = both(case, folders, tmp_path, **in_float32(case, dtype))
    assert_agree(ours, theirs, tensors, lambda leaf: undecided(case, tensors, leaf),
                 FURTHER.get(name, 1.0) if dtype == "float32" else 1.0)
    assert {tensor.dtype for tensor in ours.values()} == {peer.DTYPES[dtype]}
    changed = any(not torch.equal(ours[leaf], tensors["base"][leaf]) for leaf in ours)
    assert changed == (name not in UNCHANGED)


@pytest.mark.parametrize("dtype", peer.DTYPES)
@pytest.mark.parametrize("shape", ["llama_tied", "t5_untied", "t5_tied"])
@pytest.mark.parametrize("name", ON_EVERY_SHAPE)
def test_other_shapes_merge_as_in_mergekit(name, shape, dtype, family, tmp_path, stable):
    case, folders = DETERMINISTIC[name], family(shape, dtype)
    tensors = inputs(folders)
    ours, theirs = both(case, folders, tmp_path, **in_float32(case, dtype))
    assert_agree(ours, theirs, tensors, lambda leaf: undecided(case, tensors, leaf),
                 FURTHER.get(name, 1.0) if dtype == "float32" else 1.0)
    assert ("lm_head.weight" in ours) == (shape == "t5_untied")


@pytest.mark.parametrize("name", EIGHTHS)
def test_in_float32_ours_are_no_further_from_the_exact_result(name, family, tmp_path, stable):
    """Exact is mergekit's own result in float64."""
    case, folders = EIGHTHS[name], family("llama", "float32")
    results = both(case, folders, tmp_path)
    (tmp_path / "exact").mkdir()
    path = file_of(case, folders, tmp_path / "exact", dtype="float64")
    exact = peer.run_mergekit(path, tmp_path / "exact" / "theirs")
    ours, theirs = (math.fsum(float((result[leaf].double() - exact[leaf]).abs().sum()) for leaf in exact)
                    for result in results)
    assert 0 < ours <= 1.02 * theirs


@pytest.mark.parametrize("name", ["ties_0.2", "ties_0.5"])
def test_of_equal_magnitudes_mergekit_keeps_others_but_as_many(name, family, tmp_path):
    """torch's sort is not stable: of equal magnitudes at the threshold any may come first.

    With a stable one in its place the results agree (the tests above). Without it they differ in elements
    at a threshold alone; changes in bfloat16 take few values, so there are some.
    """
    case, folders = DETERMINISTIC[name], family("llama", "bfloat16")
    tensors = inputs(folders)
    ours, theirs = both(case, folders, tmp_path, **in_float32(case, "bfloat16"))
    assert_agree(ours, theirs, tensors, lambda leaf: (
        at_a_threshold(case, tensors, leaf) | undecided(case, tensors, leaf)))


@pytest.mark.parametrize("name", ["arithmetic", "arithmetic_lambda", "ties_1"])
def test_in_bfloat16_mergekit_rounds_task_vectors_and_we_do_not(name, family, tmp_path):
    """Without ``dtype: float32`` its changes, weights and sums are of bfloat16; ours are what they were."""
    case, folders = DETERMINISTIC[name], family("llama", "bfloat16")
    ours, theirs = both(case, folders, tmp_path)
    (tmp_path / "wide").mkdir()
    path = file_of(case, folders, tmp_path / "wide", dtype="float32", out_dtype="bfloat16")
    wide = peer.run_ours(path, tmp_path / "wide" / "ours")
    assert all(torch.equal(ours[leaf], wide[leaf]) for leaf in wide)
    assert any(not torch.equal(theirs[leaf], wide[leaf]) for leaf in wide)


def change_of(result: peer.Tensors, base: peer.Tensors) -> np.ndarray:
    """All changes of a merge in one vector."""
    return np.concatenate([(result[leaf].double() - base[leaf].double()).numpy().ravel()
                           for leaf in sorted(base)])


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_random_masks_of_one_expert_have_the_statistics_of_mergekit(
        method, density, rescale, family, tmp_path):
    """The share that is kept, and its factor: with `rescale` each leaf has the L1 norm of before."""
    case = Case(method, weighted(1.0, density=density), {"rescale": rescale})
    folders = family("llama", "float32")
    tensors = inputs(folders)
    whole = change_of(tensors["expert0"], tensors["base"])
    error = 5 * math.sqrt(density * (1 - density) / whole.size)
    factor_error = 5 * math.sqrt((1 / density - 1) * np.sum(whole**2)) / np.sum(np.abs(whole))
    for result in both(case, folders, tmp_path):
        change = change_of(result, tensors["base"])
        kept = change != 0
        assert abs(np.mean(kept) - density) < error
        factor = np.abs(change).sum() / np.abs(whole[kept]).sum()
        assert abs(factor * density - 1) < factor_error if rescale else abs(factor - 1) < 1e-4
        for leaf in result if rescale else ():
            sums = [float((each[leaf].double() - tensors["base"][leaf].double()).abs().sum())
                    for each in (result, tensors["expert0"])]
            assert sums[0] == pytest.approx(sums[1], rel=1e-4) or sums[0] == 0, leaf


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_random_masks_of_several_experts_have_the_statistics_of_mergekit(method, family, tmp_path):
    """Masks are drawn for each expert apart: an element is left alone only if all of them drop it."""
    density, number = 0.3, peer.NUM_EXPERTS
    case = Case(method, weighted(*[1.0] * number, density=density))
    folders = family("llama", "float32")
    base = peer.read(folders["base"])
    ours, theirs = (change_of(result, base) for result in both(case, folders, tmp_path))
    changed = 1 - (1 - density) ** number
    for change in (ours, theirs):
        assert abs(np.mean(change != 0) - changed) < 5 * math.sqrt(changed * (1 - changed) / change.size)
    for moment in (1, 2):
        means = [np.mean(np.abs(change) ** moment) for change in (ours, theirs)]
        assert means[0] == pytest.approx(means[1], rel=0.02)
    agreeing = np.corrcoef(ours != 0, theirs != 0)[0, 1]
    assert abs(agreeing) < 5 / math.sqrt(ours.size), "two programs draw other masks"


def spoil(folders: Mapping[str, pathlib.Path], target: pathlib.Path,
          change: Callable[[peer.Tensors], peer.Tensors]) -> dict[str, pathlib.Path]:
    """The same family with another second expert, in one file."""
    target.mkdir()
    safetensors.torch.save_file(change(peer.read(folders["expert1"])), target / "model.safetensors")
    (target / "config.json").write_text((folders["expert1"] / "config.json").read_text())
    return {**folders, "expert1": target}


def with_nan(tensors: peer.Tensors) -> peer.Tensors:
    """One value of one leaf that is none."""
    tensors["model.norm.weight"][3] = math.nan
    return tensors


@pytest.mark.parametrize(("change", "message"), [
    (with_nan, "model.norm.weight"),
    (lambda tensors: {**tensors, "model.extra.weight": torch.ones(3)}, "model.extra.weight"),
    (lambda tensors: {name: each for name, each in tensors.items() if name != "lm_head.weight"}, "lm_head"),
    (lambda tensors: {name: each.half() for name, each in tensors.items()}, "float16"),
], ids=["nan", "tensor_that_others_lack", "head_that_is_lacking", "other_dtype"])
def test_what_mergekit_takes_in_silence_is_an_error_here(change, message, family, tmp_path):
    folders = spoil(family("llama", "float32"), tmp_path / "spoilt", change)
    path = file_of(DETERMINISTIC["mean"], folders, tmp_path)
    assert peer.run_mergekit(path, tmp_path / "theirs")
    with pytest.raises(InputError, match=message):
        peer.run_ours(path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
