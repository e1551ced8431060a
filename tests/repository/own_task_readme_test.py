"""README's task of one's own, run as it stands there; only the base is a tiny one."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from checkout import ROOT

from elm_jax.experts.overlay import load_expert

LAST = """import elm_jax as elm
from elm_jax.data import registry
name = {call}
print(next(iter(registry.get_task(name).render_rows("train")))[1].inputs)
"""


def section() -> str:
    """The section's text."""
    return (ROOT / "README.md").read_text().split("## A task of your own, in five lines")[1].split("\n## ")[0]


@pytest.mark.slow
def test_the_five_lines(world, tmp_path):
    shell, = re.findall(r"```bash\n(.*?)```", section(), re.DOTALL)
    python, = re.findall(r"```python\n(.*?)```", section(), re.DOTALL)
    shutil.copytree(world.base.path, tmp_path / "runs" / "base" / "base")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "elm").write_text(f'#!/bin/sh\nexec {sys.executable} -m elm_jax.cli "$@"\n')
    (tmp_path / "bin" / "elm").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "XLA_FLAGS": "",
                   "JAX_PLATFORMS": "cpu", "ELM_DATA_DIR": ""}

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True,
                              timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run("bash", "-e", "-c", shell)
    card = load_expert(tmp_path / "runs" / "tickets" / "expert").card
    assert card.tasks == ("tickets__which_team",) and card.training["examples"] > 0
    row, = map(json.loads, (tmp_path / "results" / "results.jsonl").read_text().splitlines())
    assert row["task"] == "tickets__which_team" and row["metric"] == "accuracy" and row["num_instances"] == 1
    assert run(sys.executable, "-c", LAST.format(call=python.strip())).endswith(" Team?\n")
    shown = run("elm", "tasks", "show", "tickets__which_team", "--module", "my_task", "--base",
                "runs/base/base", "--rows", "1")
    assert "Which team answers this?" in shown and "input tokens: " in shown
