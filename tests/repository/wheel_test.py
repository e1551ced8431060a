"""The wheel, outside of any checkout: a whole study runs from what was built and nothing else."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from checkout import HELPERS, ROOT

STUDY = HELPERS.joinpath("tiny_study.gin")


def run(*arguments: str, cwd: pathlib.Path, path: pathlib.Path | None = None, **environment: str) -> str:
    variables = {name: value for name, value in os.environ.items()
                 if name not in ("PYTHONPATH", "ELM_DATA_DIR")}
    if path is not None:
        variables["PYTHONPATH"] = str(path)
    done = subprocess.run(arguments, cwd=cwd, env={**variables, **environment}, capture_output=True,
                          text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_study_runs_from_the_wheel_outside_of_the_checkout(tmp_path):
    source, installed, elsewhere = tmp_path / "source", tmp_path / "installed", tmp_path / "elsewhere"
    # Built from a copy: setuptools leaves folders beside what it builds.
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    elsewhere.mkdir()
    for file in (STUDY, STUDY.with_name("tiny_own.py")):
        shutil.copy(file, elsewhere)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source),
        cwd=tmp_path)
    wheel = next(tmp_path.glob("elm_jax-*.whl"))
    shutil.rmtree(source)
    run(*pip, "install", "--no-deps", "--no-index", "--target", str(installed), str(wheel), cwd=tmp_path)
    program = "import elm_jax, elm_jax.tasks as tasks; print(elm_jax.__file__, tasks.__file__)"
    where = run(sys.executable, "-c", program, cwd=elsewhere, path=installed).split()
    assert all(name.startswith(str(installed)) for name in where), where
    printed = run(sys.executable, str(installed / "bin" / "elm"), "study", "--gin_file", STUDY.name,
                  "--gin.WORKDIR='study'", cwd=elsewhere, path=installed, XLA_FLAGS="")
    assert "report: study/results/report.html" in printed and "RoE top-1" in printed
    assert (elsewhere / "study" / "results" / "heat_map.png").stat().st_size > 10_000
