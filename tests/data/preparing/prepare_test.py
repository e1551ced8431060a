"""Arrays made without TensorFlow are those that the tasks' SeqIO forms give, to the token."""

import collections
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import small_decoder

seqio = pytest.importorskip("seqio")

from elm_jax.data.arrays.prepared import PreparedSplit  # noqa: E402
from elm_jax.data.preparing import seqio_tasks  # noqa: E402
from elm_jax.data.preparing.prepare import prepare, tokenised_rows  # noqa: E402
from elm_jax.data.prompts.templates import PromptTemplate  # noqa: E402
from elm_jax.data.registry import registry  # noqa: E402
from elm_jax.data.sources import row_files  # noqa: E402
from elm_jax.errors import InputError  # noqa: E402
from elm_jax.evaluation.metrics import TEXT_METRICS  # noqa: E402
from elm_jax.vocabularies import tokenizer_json, vocabulary  # noqa: E402
from elm_jax.vocabularies.vocabulary import Vocabulary  # noqa: E402

REAL = ["common_gen__random_task_template_prompt", "quail__no_prompt_id", "bbh_date_understanding__bbh",
        "haiku__as_asked", *(pytest.param(name, marks=pytest.mark.slow) for name in (
            "ag_news__classify", "cosmos_qa__context_answer_to_question", "anli_r1__can_we_infer",
            "bigbench_known_unknowns__bigbench", "bbh_word_sorting__bbh", "wiki_qa__is_this_true_"))]
"""Ranked and written ones; with drawn words, dropped rows, adapters and settings of a file."""
needs_data = pytest.mark.skipif(not os.environ.get("ELM_DATA_DIR"), reason="ELM_DATA_DIR is not set")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("vocabulary") / "v.model")
    if row_files.data_dir() is None:
        vocabulary.train_vocabulary(["a red house near the river " * 3] * 9, path, 16, seed=0)
    else:
        texts = [row["text"] for row in row_files.read_rows("ag_news", None, "validation")]
        vocabulary.train_vocabulary(texts, path, 800, seed=0)
    return path


def assert_same(first: PreparedSplit, second: PreparedSplit) -> None:
    assert (first.name, first.split, first.info) == (second.name, second.split, second.info)
    for key, array in first.arrays.items():
        np.testing.assert_array_equal(array, second.arrays[key], err_msg=key)


@pytest.fixture
def few_rows(tmp_path, monkeypatch):
    """A data folder with the first rows of each data set: SeqIO takes its time."""
    def copy(name: str) -> str:
        task = registry.get_task(name)
        split = task.evaluation_split
        path = row_files.find_file(*task.row_source, split)
        below = path.relative_to(row_files.data_dir())
        target = tmp_path / str(below).removesuffix(".gz")
        target.parent.mkdir(parents=True)
        rows = itertools.islice(row_files.read_lines(path), 60)
        target.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for other in ("bigbench/tasks.json", f"{task.dataset}/templates.yaml",
                      f"{task.dataset}/{task.config}/templates.yaml"):
            if (row_files.data_dir() / other).exists():
                (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / other).write_text((row_files.data_dir() / other).read_text())
        monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
        return split
    return copy


@needs_data
def test_a_decoder_s_targets_are_as_seqio_gives_them(few_rows, tmp_path):
    """A space stands between prompt and target, which are one text."""
    registry.import_tasks(["elm_jax.tasks"])
    split = few_rows("ag_news__classify")
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer_json.with_ids(small_decoder.tokenizer(), pad_id=2, eos_id=2))
    made = prepare("ag_news__classify", split, Vocabulary.load(path))
    assert_same(made, seqio_tasks.prepare("ag_news__classify", split, str(path)))
    vocabulary = Vocabulary.load(path)
    assert made.targets(0).tolist() == [*vocabulary.encode(" " + made.text(0)["targets"]), 2]
    assert made.choices(0)[1].tolist() == [*vocabulary.encode(" " + made.text(0)["choices"][1]), 2]


@needs_data
@pytest.mark.parametrize("name", REAL)
def test_real_tasks_are_as_seqio_gives_them(name, model, few_rows):
    registry.import_tasks(["elm_jax.tasks"])
    split = few_rows(name)
    made = prepare(name, split, Vocabulary.load(model))
    assert_same(made, seqio_tasks.prepare(name, split, model))
    assert_same(prepare(name, split, Vocabulary.load(model), max_rows=20, seed=3),
                seqio_tasks.prepare(name, split, model, max_rows=20, seed=3))
    # And SeqIO itself, not through our reading of it.
    seqio_tasks.register(TEXT_METRICS)
    with seqio_tasks.use_vocabulary(model):
        task = seqio.get_mixture_or_task(name)
        examples = list(task.get_dataset(None, split=split, shuffle=False).as_numpy_iterator())
    assert 0 < len(examples) == len(made) <= 60
    for row, example in enumerate(examples):
        assert example["inputs"].tolist() == made.inputs(row).tolist()
        assert example["targets"].tolist() == made.targets(row).tolist()
        assert example["choices"].tolist() == [token for choice in made.choices(row) for token in choice]


def test_rows_that_are_left_out_are_counted_by_reason(model):
    template = PromptTemplate("Left out", "{% if n %}{{n}} ||| {% if n % 3 %}x{% endif %}{% endif %}", None)
    name = registry.add_prompted_task("prepare toys", None, template, kind="generation", role="train",
                                      rows=lambda split: [{"n": number} for number in range(10)])
    made = prepare(name, "train", Vocabulary.load(model))
    assert [made.text(row)["index"] for row in range(len(made))] == [1, 2, 4, 5, 7, 8]
    assert made.info["dropped"] == {"skipped by the template": 1, "target is empty": 3}
    assert made.info["num_source"] == 10 and made.info["num_dropped"] == 4
    assert_same(made, seqio_tasks.prepare(name, "train", model))
    counted = collections.Counter()
    assert len(list(tokenised_rows(registry.get_task(name), "train", Vocabulary.load(model), counted))) == 6
    assert counted == made.info["dropped"]


def test_a_task_without_a_row_left_is_an_error(model):
    template = PromptTemplate("Nothing", "{{n}} |||", None)
    name = registry.add_prompted_task("prepare toys", None, template, kind="generation", role="train",
                                      rows=lambda split: [{"n": 1}])
    with pytest.raises(InputError, match=r"(?s)no row left after rendering.*1 dropped \(1 target is empty\)"):
        prepare(name, "train", Vocabulary.load(model))


def test_tensorflow_is_not_imported(model):
    program = f"""
import sys
from elm_jax.data import registry
from elm_jax.data.preparing.prepare import prepare
from elm_jax.vocabularies.vocabulary import Vocabulary
registry.import_tasks(["elm_jax.tasks.embedded"])
print(len(prepare("mini_topic__about_what", "validation", Vocabulary.load({model!r}))))
assert not {{"tensorflow", "seqio", "tensorflow_datasets"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 50
