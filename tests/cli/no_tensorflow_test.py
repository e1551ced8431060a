"""Training on prepared arrays, routing, merging and scoring where TensorFlow and SeqIO cannot be imported."""

import subprocess
import sys

import tiny_study as tiny

PROGRAM = """
import sys
for name in ("tensorflow", "seqio", "tensorflow_datasets", "tensorflow_text"):
    sys.modules[name] = None  # importing it now fails
sys.path.insert(0, {tests!r})
import pathlib
import tiny_study as tiny
import elm_jax as elm
world, out = pathlib.Path({world!r}), pathlib.Path({out!r})
base = elm.load_base(world / "base" / "base")
prepared = str(world / "prepared")
expert = tiny.make_expert(base, out / "run", prepared_dir=prepared, random_seed=3, expert_id="third")
review = elm.load_expert(world / "review")
library = elm.ExpertLibrary.open(world / "library")
data = elm.TaskData(base.vocabulary, prepared_dir=prepared)
split = data.split(tiny.REVIEW, "validation")
decision = elm.route(library, [split.text(row)["inputs"] for row in range(8)])
merged = elm.merge([expert, review])
rows = elm.evaluate(base, merged, tasks=[tiny.REVIEW], data=data, mesh=tiny.one_device())
print(decision.ranking[0].expert, rows[0]["metric"], rows[0]["num_instances"])
from elm_jax.cli import main as cli
status = cli.main(["evaluate", "--base", base.path, "--task", tiny.REVIEW, "--prepared", prepared,
                   "--max_rows", "8", "--source_length", "64", "--mesh_data", "1",
                   "--output", str(out / "results.jsonl")])
print(status, (out / "results.jsonl").read_text().count('"num_instances": 8'))
print(len(elm.TaskData(base.vocabulary, tiny.MODULES).split(tiny.TOPIC, "validation")))
"""


def test_the_chain_runs_without_tensorflow(world, tmp_path):
    world.data.split(tiny.REVIEW, "validation")
    program = PROGRAM.format(tests=str(tiny.__file__).rsplit("/", 1)[0], world=str(world.folder),
                             out=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0] == f"{tiny.REVIEW} accuracy 150"
    assert lines[-2] == "0 1", "a whole prepared split serves --max_rows"
    assert lines[-1] == "150", "rows are rendered and tokenised, too"
