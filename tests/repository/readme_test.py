"""README's blocks, run as they stand there, in README's order, in one folder of a new user.

Three things stand in for what is outside of this machine or takes minutes: `pip` installs nothing (all is
there), `hf download` copies a small T5 made here, and the folder `demo/` is a study of the demo's form with
hardly any steps.
"""

import collections
import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import hf_folders
import pytest
from checkout import HELPERS, ROOT
from elm_jax.tasks.embedded import TICKETS, passages
from real_vocabularies import DATA
from smollm2 import needs_file

from elm_jax.cli import flags
from elm_jax.data.registry import registry
from elm_jax.data.sources.row_files import OwnFile
from elm_jax.evaluation.intervals import wilson
from elm_jax.experts.overlay import load_expert

README = (ROOT / "README.md").read_text()
FENCED = re.compile(r"^(?:<!-- ([^\n]*) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS_DATA = "needs a data folder"
MARKS = [
    "not run: both are in .ci/run", NEEDS_DATA,
    "not run: it takes an hour; the small study's results are below",
    "not run: needs the compiler of TPUs; .ci/run compiles such sizes",
]
"""What README says in a comment above a block that is not run, or where there are data only; in its order."""


class Block(NamedTuple):
    """A fenced block: its language, its text, the comment in the line above, its line in README."""

    language: str
    text: str
    mark: str
    line: int


def blocks(readme: str) -> Iterator[Block]:
    for found in FENCED.finditer(readme):
        line = readme.count("\n", 0, found.start(3)) + 1
        yield Block(found[2], found[3], found[1] or "", line)


def faults(readme: str) -> list[str]:
    """Blocks that no test runs, without a reason that is known here."""
    found = list(blocks(readme))
    runnable = [block for block in found if block.language in ("bash", "python")]
    wrong = [f"line {block.line}: {block.language}" for block in found
             if block.language not in ("", "bash", "python")]
    marks = [block.mark for block in runnable if block.mark]
    fences = len(re.findall(r"^```", readme, re.MULTILINE))
    return wrong + [f"marks: {marks}"] * (marks != MARKS) + ["a fence is open"] * (fences != 2 * len(found))


def test_every_block_is_run_or_says_why_not():
    assert faults(README) == []
    last = README.rindex("```bash")
    more = README[:last] + "<!-- not run: slow -->\n```bash\nelm methods\n```\n\n" + README[last:]
    assert faults(more) and faults(README.replace("```bash", "```sh", 1))
    assert faults(README.replace(f"<!-- {MARKS[-1]} -->\n", ""))


def command_lines(script: str) -> Iterator[list[str]]:
    """The words of each `elm` command of a script, without heredocs and redirections."""
    script = re.sub(r"<<'EOF'\n.*?^EOF$", "", script, flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
    for line in script.split("\n"):
        words = shlex.split(line.replace("$'", "'"), comments=True)
        while words and (words[0] == "do" or "=" in words[0].split("$")[0]):
            words = words[1:]
        if words and words[0] == "elm":
            yield words[1:]


def test_every_command_of_the_readme_and_of_docs_is_one():
    """The parser takes the command lines, also of what is not run; a wrong one it does not."""
    parser = flags.make_parser()
    texts = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
    lines = [words for text in texts for block in blocks(text) if block.language == "bash"
             for words in command_lines(block.text) if "..." not in words]
    assert len(lines) > 50
    for words in lines:
        try:
            parser.parse_known_args(words)
        except SystemExit:
            pytest.fail(f"elm {shlex.join(words)}")
    with pytest.raises(SystemExit), contextlib.redirect_stderr(None):
        parser.parse_known_args(["evaluate", "--expert", "runs/tickets/expert"])


def test_the_task_of_five_lines(tmp_path, monkeypatch):
    """README's module and its other form give the rows of the file that comes along."""
    module = re.search(r"cat > my_task.py <<'EOF'\n(.*?)^EOF$", README, re.DOTALL | re.MULTILINE)[1]
    other = next(block.text for block in blocks(README) if '"in a word"' in block.text)
    shutil.copy(TICKETS, tmp_path / "tickets.jsonl")
    monkeypatch.chdir(tmp_path)
    for text in (module, other):
        exec(compile(text.replace('("tickets",', '("readme",'), "README.md", "exec"), {})
    task = registry.get_task("readme__which_team")
    held_out = [row for _, row in task.render_rows("validation")]
    assert (task.num_rows("train"), len(held_out), task.kind) == (168, 72, "rank")
    assert {row.targets for row in held_out} == set(held_out[0].choices)
    said = next(iter(registry.get_task("readme__in_a_word").render_rows("train")))[1]
    assert said.inputs.endswith(" Team?") and said.targets in held_out[0].choices


ACTIVATE = 'export PATH="{bin}:$PATH"\n'
PYTHON = """#!/bin/sh
case " $* " in *" pip install "*) exit 0;; esac
exec {python} -P "$@"
"""
ELM = '#!/bin/sh\nexec {python} -P -m elm_jax.cli "$@"\n'
HF = '#!/bin/sh\nmkdir -p "$4" && cp {checkpoint}/* "$4"\n'


def make_tools(folder: pathlib.Path, checkpoint: pathlib.Path) -> None:
    """The programs that README's virtual environment has."""
    folder.mkdir(parents=True)
    names = {"python": sys.executable, "bin": folder, "checkpoint": checkpoint}
    for name, text in {"activate": ACTIVATE, "python": PYTHON, "elm": ELM, "hf": HF,
                       "pip": "#!/bin/sh\n"}.items():
        (folder / name).write_text(text.format(**names))
        (folder / name).chmod(0o755)


def make_checkout(folder: pathlib.Path) -> None:
    """The files of this checkout, as a clone has them, but for tests."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def whole_script() -> str:
    """All blocks that are run, as one shell script; a block of Python is a process of it."""
    parts = ["set -euo pipefail"]
    for block in blocks(README):
        runs = not block.mark or (block.mark == NEEDS_DATA and (DATA / "index.json").exists())
        if runs and block.language:
            parts.append(f"echo '== README.md, line {block.line}' >&2")
            parts.append(block.text if block.language == "bash" else f"python - <<'END'\n{block.text}END")
    return "\n".join(parts)


@needs_file
@pytest.mark.slow
def test_every_block_as_written(tmp_path):
    texts = [line for passage in list(passages())[:400] for line in passage.split("\n") if line]
    hf_folders.publish(hf_folders.build("t5_1_1"), "t5_1_1", tmp_path / "checkpoint")
    hf_folders.add_vocabulary(tmp_path / "checkpoint",
                              hf_folders.make_vocabulary(tmp_path / "v.model", texts))
    work = tmp_path / "work"
    make_checkout(work)
    make_tools(work / ".venv" / "bin", tmp_path / "checkpoint")
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "ELM_VENV": str(work / ".venv")}
    environment.pop("ELM_DATA_DIR", None)
    if (DATA / "index.json").exists():
        (work / "data").symlink_to(DATA.resolve())

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(words, cwd=work, env={**environment, **more}, capture_output=True, text=True,
                              timeout=3000)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        return done

    run(str(work / ".venv/bin/elm"), "study", "--gin_file", str(HELPERS / "tiny_study.gin"),
        "--gin.WORKDIR='demo'", PYTHONPATH=os.pathsep.join((str(HELPERS), environment.get("PYTHONPATH", ""))))
    done = run("bash", "-c", whole_script())
    assert done.stdout.count("largest difference of the logits") == 2
    _check_the_walk(work, done.stdout)
    assert {row["expert"] for row in _rows(work / "results" / "t5.jsonl")} == {
        "tickets__which_team", load_expert(work / "merged" / "t5").card.id}
    assert (work / "export" / "adapters.safetensors").exists() and (work / "runs" / "tickets_again").is_dir()


def _rows(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _check_the_walk(work: pathlib.Path, printed: str) -> None:
    """The expert is better than the majority answer, and what README shows is what was printed."""
    base, expert = _rows(work / "results" / "results.jsonl")
    assert expert["num_instances"] == base["num_instances"] == 72
    held_out = OwnFile(work / "tickets.jsonl", "validation", 0.3).read()
    teams = collections.Counter(row["team"] for row in held_out)
    assert wilson(expert["value"], 72)[0] > max(teams.values()) / 72 > 0
    walk = README.split("## An expert of your own")[1].split("\n## ")[0]
    shown = [block.text for block in blocks(walk) if not block.language and "─" not in block.text]
    assert len(shown) == 3 and all(text in printed for text in shown)
