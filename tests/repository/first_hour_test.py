"""README's first hour with a real checkpoint, run as it stands there; only the checkpoint is a small one."""

import json
import os
import re
import subprocess
import sys

import hf_folders
import pytest
import transformers
from checkout import ROOT
from elm_jax.tasks.embedded.datasets import passages

from elm_jax.experts.overlay import load_expert

ELM = """#!/bin/sh
exec {python} -m elm_jax.cli "$@"
"""
HF = """#!/bin/sh
mkdir -p "$4" && cp {checkpoint}/* "$4"
"""


def commands() -> str:
    """The section's shell blocks, one after another."""
    text = (ROOT / "README.md").read_text()
    section = text.split("## A first hour with a real checkpoint")[1].split("\n## ")[0]
    return "\n".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL))


@pytest.mark.slow
def test_the_first_hour(tmp_path):
    texts = [line for passage in list(passages())[:400] for line in passage.split("\n") if line]
    hf_folders.publish(hf_folders.build("t5_1_1"), "t5_1_1", tmp_path / "checkpoint")
    hf_folders.add_vocabulary(tmp_path / "checkpoint",
                              hf_folders.make_vocabulary(tmp_path / "v.model", texts))
    tools = {"elm": ELM.format(python=sys.executable), "pip": "#!/bin/sh\n",
             "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
             "hf": HF.format(checkpoint=tmp_path / "checkpoint")}
    (tmp_path / "bin").mkdir()
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
                   "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(["bash", "-e", "-c", commands()], cwd=work, env=environment, capture_output=True,
                          text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("largest difference of the logits") == 2
    rows = [json.loads(line) for line in (work / "results" / "results.jsonl").read_text().splitlines()]
    assert {row["expert"] for row in rows} == {"tickets__which_team", load_expert(work / "merged").card.id}
    assert (work / "export" / "adapters.safetensors").exists()
    model = transformers.T5ForConditionalGeneration.from_pretrained(work / "export_whole")
    tokenizer = transformers.AutoTokenizer.from_pretrained(work / "export_whole")
    assert str(model.dtype) == "torch.bfloat16" and len(tokenizer) == 312
