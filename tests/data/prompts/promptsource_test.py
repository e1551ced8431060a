"""Every template that the data folder serves renders byte for byte as promptsource renders it."""

import json

import golden_renders
import pytest
from checkout import ROOT

from elm_jax.data.prompts import templates
from elm_jax.data.registry import registry
from elm_jax.data.sources import row_files

DATA = row_files.data_dir() or ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not (DATA / "index.json").exists(), reason="no data folder: set ELM_DATA_DIR")


@pytest.fixture
def served(monkeypatch) -> list:
    monkeypatch.setenv("ELM_DATA_DIR", str(DATA))
    registry.import_tasks(["elm_jax.tasks"])
    return list(golden_renders.served())


def compare_with_golden(served: list, count: int, column: int) -> int:
    """Renders `count` rows of every template; returns how many renders were compared."""
    golden, compared = json.loads(golden_renders.FILE.read_text()), 0
    for name, path, dataset, config, names in served:
        rows = golden_renders.rows_of(dataset, config)
        found = templates.read_templates(path)
        for own in names:
            render = golden_renders.ours(found[own])
            rendered = [render(row, seed) for seed, row in enumerate(rows[:count])]
            wanted = golden.pop(f"{name}: {own}")
            assert (wanted[0], wanted[column]) == (len(rows), golden_renders.digest(rendered)), (
                f"{name}: {own} renders otherwise than promptsource did; see {golden_renders.__file__} for "
                "how the hashes are made again")
            compared += len(rendered)
    assert golden == {}
    return compared


@needs_data
def test_some_rows_of_every_template_render_as_promptsource_rendered_them(served):
    assert compare_with_golden(served, golden_renders.FEW, 1) >= 2_700


@pytest.mark.slow
@needs_data
def test_all_rows_render_as_promptsource_rendered_them(served):
    compared = compare_with_golden(served, golden_renders.ROWS, 2)
    print(f"{compared} renders are as promptsource's were")
    assert compared >= 270 * golden_renders.ROWS


@pytest.mark.slow
@needs_data
def test_every_template_renders_as_promptsource_does(served, capsys):
    module = golden_renders.load_promptsource()
    if module is None:
        pytest.skip("promptsource is not installed: " + golden_renders.__doc__.strip().splitlines()[-1])
    compared = num_templates = drawn = 0
    for name, path, dataset, config, names in served:
        rows = golden_renders.rows_of(dataset, config)
        assert len(rows) == golden_renders.ROWS, name
        found = templates.read_templates(path)
        for own in names:
            ours, theirs = golden_renders.ours(found[own]), golden_renders.theirs(module, path, own)
            for seed, row in enumerate(rows):
                assert ours(row, seed) == theirs(row, seed), (name, own, seed)
            compared, num_templates = compared + len(rows), num_templates + 1
            drawn += "choice" in found[own].jinja.replace("answer_choices", "").replace("choices", "")
    with capsys.disabled():
        print(f"\n{num_templates} templates ({drawn} that draw at random), {compared} renders: "
              "all as promptsource's")
    assert num_templates >= 270
