"""A data set that TFDS has prepared gives the rows, and the prompts, that its JSON lines give."""

import json
import os
import pathlib

import golden_renders
import numpy as np
import pytest
from checkout import ROOT
from elm_jax.tasks import tfds_names

tfds = pytest.importorskip("tensorflow_datasets")

from elm_jax.data.prompts import templates  # noqa: E402
from elm_jax.data.registry import registry  # noqa: E402
from elm_jax.data.sources import row_files, tfds_rows  # noqa: E402
from elm_jax.errors import InputError  # noqa: E402

DATA = pathlib.Path(os.environ.get("ELM_DATA_DIR")
                    or ROOT.parent / "shared" / "data")
needs_data = pytest.mark.skipif(not (DATA / "index.json").exists(), reason="no data folder: set ELM_DATA_DIR")
TEXT = tfds.features.Text
SERVED = {  # one of each form: labels, lists, lists of objects, a config, a folder of the hub's
    ("cosmos_qa", None): {"id": TEXT(), "context": TEXT(), "question": TEXT(), "answer0": TEXT(),
                          "answer1": TEXT(), "answer2": TEXT(), "answer3": TEXT(),
                          "label": tfds.features.ClassLabel(num_classes=4)},
    ("dream", None): {"id": np.int64, "dialogue_id": TEXT(), "dialogue": tfds.features.Sequence(TEXT()),
                      "question": TEXT(), "choice": tfds.features.Sequence(TEXT()), "answer": TEXT()},
    ("commonsense_qa", None): {
        "id": TEXT(), "question": TEXT(), "question_concept": TEXT(),
        "choices": tfds.features.Sequence({"label": TEXT(), "text": TEXT()}), "answerKey": TEXT()},
    ("glue", "mrpc"): {"sentence1": TEXT(), "sentence2": TEXT(), "idx": np.int32,
                       "label": tfds.features.ClassLabel(num_classes=2)},
    ("cos_e", "v1.11"): {"id": TEXT(), "question": TEXT(), "choices": tfds.features.Sequence(TEXT()),
                         "answer": TEXT(), "abstractive_explanation": TEXT(),
                         "extractive_explanation": TEXT()},
}
FOLDERS = {("cos_e", "v1.11"): "cos_e/v1_11"}
"""As ``huggingface:cos_e/v1.11`` lies there."""


def build(folder: pathlib.Path, name: str, features: dict, splits: dict[str, list[dict]]) -> None:
    """Prepares rows as TFDS does, a hundred a file."""
    dataset, _, config = name.partition("/")
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=dataset, config_name=config or None, version=tfds.core.Version("1.0.0"),
        data_dir=str(folder / name / "1.0.0"), module_name="")
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    (folder / name / "1.0.0").mkdir(parents=True)
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=100)
    writer.initialize_splits(list(splits))
    writer.add_examples(splits)
    writer.close_all()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELM_DATA_DIR", str(DATA))
        for (dataset, config), features in SERVED.items():
            name = FOLDERS.get((dataset, config), "/".join(part for part in (dataset, config) if part))
            rows = {split: [{field: row[field] for field in features}
                            for row in row_files.read_rows(dataset, config, split)[:220]]
                    for split in ("train", "validation")}
            build(folder, name, features, rows)
    return folder


@pytest.fixture
def only_tfds(prepared, tmp_path, monkeypatch) -> pathlib.Path:
    """A data folder that has templates and no rows, beside what TFDS has."""
    monkeypatch.setenv("ELM_TFDS_DIR", str(prepared))
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    for dataset, config in SERVED:
        name = "/".join(part for part in (dataset, config) if part)
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "templates.yaml").write_text((DATA / name / "templates.yaml").read_text())
    return tmp_path


@needs_data
def test_rows_and_prompts_are_those_of_the_json_lines(only_tfds, monkeypatch):
    module, golden = golden_renders.load_promptsource(), json.loads(golden_renders.FILE.read_text())
    compared = 0
    for dataset, config in SERVED:
        for split in ("train", "validation"):
            found = row_files.read_rows(dataset, config, split)
            with monkeypatch.context() as patch:
                patch.setenv("ELM_DATA_DIR", str(DATA))
                wanted = row_files.read_rows(dataset, config, split)[:220]
            assert found == wanted, (dataset, split)
        path = only_tfds / "/".join(part for part in (dataset, config) if part) / "templates.yaml"
        rows = row_files.read_rows(dataset, config, "validation")[:golden_renders.ROWS]
        name = templates.dataset_name(dataset, config)
        for own, template in templates.read_templates(path).items():
            render = golden_renders.ours(template)
            rendered = [render(row, seed) for seed, row in enumerate(rows)]
            assert golden[f"{name}: {own}"][2] == golden_renders.digest(rendered), own
            compared += len(rendered)
            if module is not None:  # and promptsource itself, on TFDS's rows
                theirs = golden_renders.theirs(module, path, own)
                assert all(theirs(row, seed) == rendered[seed] for seed, row in enumerate(rows[:5])), own
    assert compared == 200 * (13 + 5 + 5 + 7 + 11)


@needs_data
def test_a_task_is_served_by_tfds_alone(only_tfds):
    registry.import_tasks(["elm_jax.tasks"])
    task = registry.get_task("cos_e_v1_11__i_think")
    assert task.why_unavailable() is None and task.num_rows("validation") == 220
    assert len(list(task.render_rows("train"))) == 220
    assert task.places("train")(4).endswith("cos_e/v1_11/1.0.0, split train, row 5")
    assert task.source_digest("train") != task.source_digest("validation")
    assert registry.get_task("xsum__doc_tldr").why_unavailable() == "no data"


def test_json_lines_come_first_and_test_stands_for_validation(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ELM_TFDS_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("ELM_DATA_DIR", str(tmp_path))
    build(tmp_path / "tfds", "toys", {"n": np.int64}, {"train": [{"n": 1}], "test": [{"n": 2}]})
    caplog.set_level("INFO")
    assert row_files.read_rows("toys", None, "validation") == [{"n": 2}]
    messages = [record.getMessage() for record in caplog.records if "stands for it" in record.getMessage()]
    assert len(messages) == 1 and "toys/1.0.0 has no split validation" in messages[0]
    assert row_files.num_rows("toys", None, "validation") == 1
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "train.jsonl").write_text('{"n": 5}\n')
    assert row_files.read_rows("toys", None, "train") == [{"n": 5}]


def test_values_become_plain_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("ELM_TFDS_DIR", str(tmp_path))
    monkeypatch.delenv("ELM_DATA_DIR", raising=False)
    features = {"lists": tfds.features.Sequence(tfds.features.Sequence(TEXT())), "yes": np.bool_,
                "share": np.float32, "none": tfds.features.Sequence(np.int64), "text": TEXT(),
                "parts": {"a": TEXT(), "b": tfds.features.Sequence({"c": np.int32})}}
    row = {"lists": [["a", "b"], [], ["ü"]], "yes": True, "share": 0.5, "none": [], "text": "x\ny",
           "parts": {"a": "", "b": {"c": [1, 2]}}}
    build(tmp_path, "toys", features, {"train": [row] * 250})
    found = row_files.read_rows("toys", None, "train")
    assert found == [row] * 250 and type(found[0]["yes"]) is bool
    json.dumps(found)  # nothing but plain values


def test_missing_and_damaged_data_sets_are_clear_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("ELM_TFDS_DIR", str(tmp_path))
    monkeypatch.delenv("ELM_DATA_DIR", raising=False)
    with pytest.raises(InputError, match=r"(?s)no train rows of toys.*TFDS prepares it, below ELM_TFDS_DIR"):
        row_files.read_rows("toys", None, "train")
    build(tmp_path, "toys", {"n": np.int64}, {"train": [{"n": number} for number in range(50)]})
    file, = (tmp_path / "toys" / "1.0.0").glob("*tfrecord*")
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"(?s)TFDS data set cannot be read.*toys/1.0.0, split train"):
        row_files.read_rows("toys", None, "train")
    (tmp_path / "toys" / "1.0.0" / "dataset_info.json").write_text('{"splits": 3}')
    with pytest.raises(InputError, match=r"(?s)head of a TFDS data set is wrong.*dataset_info.json: splits"):
        row_files.read_rows("toys", None, "train")


def test_where_tfds_differs_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("ELM_TFDS_DIR", str(tmp_path))
    monkeypatch.delenv("ELM_DATA_DIR", raising=False)
    labels = {"label-coarse": tfds.features.ClassLabel(names=tfds_names._TFDS_COARSE),
              "label-fine": tfds.features.ClassLabel(names=tfds_names._TFDS_FINE)}
    build(tmp_path, "trec", {"text": TEXT(), **labels}, {"train": [
        {"text": "How?", "label-coarse": "DESC", "label-fine": "manner"},
        {"text": "Where?", "label-coarse": "LOC", "label-fine": "other"}]})
    build(tmp_path, "ag_news_subset", {"title": TEXT(), "description": TEXT(), "label": np.int64},
          {"train": [{"title": "T", "description": "D", "label": 2}]})
    build(tmp_path, "anli/r2", {"context": TEXT(), "hypothesis": TEXT(), "label": np.int64},
          {"validation": [{"context": "c", "hypothesis": "h", "label": 1}]})
    assert row_files.read_rows("trec", None, "train") == [
        {"text": "How?", "label_coarse": 0, "label_fine": 0, "coarse_label": 2, "fine_label": 26},
        {"text": "Where?", "label_coarse": 5, "label_fine": 14, "coarse_label": 4, "fine_label": 35}]
    assert row_files.read_rows("ag_news", None, "train") == [{"text": "T D", "label": 2}]
    assert row_files.read_rows("anli", "r2", "validation") == [{"premise": "c", "hypothesis": "h",
                                                                "label": 1}]


def test_versions_that_differ_are_made_like_the_hub_s(tmp_path, monkeypatch):
    monkeypatch.setenv("ELM_TFDS_DIR", str(tmp_path))
    monkeypatch.delenv("ELM_DATA_DIR", raising=False)
    build(tmp_path, "hellaswag", {"context": TEXT(), "label": np.int32}, {
        "validation": [{"context": "c", "label": 3}, {"context": "d", "label": -1}]})
    build(tmp_path, "winogrande", {"sentence": TEXT(), "label": tfds.features.ClassLabel(names=["1", "2"])},
          {"validation": [{"sentence": "s _", "label": "2"}]})
    build(tmp_path, "anli/plain_text", {"premise": TEXT(), "hypothesis": TEXT()}, {
        f"{split}_r{part}": [{"premise": f"{split} {part}", "hypothesis": "h"}]
        for split in ("train", "dev", "test") for part in (1, 3)})
    assert row_files.read_rows("hellaswag", None, "validation") == [
        {"ctx": "c", "label": "3"}, {"ctx": "d", "label": ""}]
    assert row_files.read_rows("winogrande", "winogrande_xl", "validation") == [
        {"sentence": "s _", "label": 1, "answer": "2"}]
    for part in ("r1", "r3"):
        found = [row_files.read_rows("anli", part, split)[0]["premise"] for split in ("train", "validation")]
        assert found == [f"train {part[1]}", f"dev {part[1]}"]
    assert row_files.find_split("anli", "r2", "validation") is None
    fields = tfds_rows.fields_of(*tfds_rows.find("winogrande", "winogrande_xl"))
    assert fields == {"sentence", "label", "answer"}
    (tmp_path / "broken" / "1.0.0").mkdir(parents=True)
    (tmp_path / "broken" / "1.0.0" / "features.json").write_text('{"featuresDict": 3}')
    with pytest.raises(InputError, match=r"(?s)features of a TFDS.* is wrong.*features.json: featuresDict"):
        tfds_rows.fields_of(tmp_path / "broken" / "1.0.0", tfds_rows.TfdsName("broken"))


BUILDERS = {  # what TFDS's own catalogue has, under the names that are mapped or under its own
    ("ag_news", None): "ag_news_subset", ("imdb", None): "imdb_reviews/plain_text", ("trec", None): "trec",
    ("anli", "r1"): "anli/r1", ("anli", "r2"): "anli/r2", ("anli", "r3"): "anli/r3",
    ("cnn_dailymail", "3.0.0"): "cnn_dailymail", ("cos_e", "v1.11"): "cos_e",
    ("hellaswag", None): "hellaswag", ("paws", "labeled_final"): "paws_wiki/labeled_final_tokenized",
    ("winogrande", "winogrande_xl"): "winogrande", ("story_cloze", "2016"): "story_cloze/2016",
    ("cosmos_qa", None): "cosmos_qa", ("glue", "mrpc"): "glue/mrpc", ("glue", "qqp"): "glue/qqp",
    ("qasc", None): "qasc", ("gigaword", None): "gigaword", ("multi_news", None): "multi_news",
    ("samsum", None): "samsum", ("xsum", None): "xsum", ("wiki_bio", None): "wiki_bio",
    ("super_glue", "cb"): "super_glue/cb", ("super_glue", "copa"): "super_glue/copa",
    ("super_glue", "rte"): "super_glue/rte", ("super_glue", "wic"): "super_glue/wic",
    ("super_glue", "wsc.fixed"): "super_glue/wsc.fixed", ("esnli", None): "esnli",
    ("asset", "simplification"): "asset/simplification",
    ("wiki_auto", "auto_full_with_split"): "wiki_auto/auto_full_with_split",
}
LACKING = {("hellaswag", None), ("story_cloze", "2016")}
"""Whose version in TFDS lacks what some templates read, or all."""


def synthetic(feature) -> object:
    """A value of a feature, as a plain one."""
    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: synthetic(part) for name, part in feature.items()}
    if isinstance(feature, tfds.features.Sequence):
        return [synthetic(feature.feature)]
    return "text" if isinstance(feature, tfds.features.Text) or feature.np_dtype is object else 1


def test_tfds_s_own_builders_have_what_the_templates_read(tmp_path, monkeypatch):
    """Their features are asked offline; one that lacks a field is no source for a template that reads it."""
    monkeypatch.setenv("ELM_TFDS_DIR", str(tmp_path))
    monkeypatch.delenv("ELM_DATA_DIR", raising=False)
    if templates.installed_folder() is None:
        pytest.skip("promptsource's templates are not installed")
    registry.import_tasks(["elm_jax.tasks"])
    tasks = [task for task in map(registry.get_task, registry.task_names())
             if task.row_source in BUILDERS and task.adapt is None]
    assert {task.row_source for task in tasks} == set(BUILDERS) and set(tfds_names.NAMES) <= set(BUILDERS)
    served = {}
    for source, own in BUILDERS.items():
        name = next(name for name in tfds_rows.candidates(*source) if name.name == own)
        features = tfds.builder(own, data_dir=str(tmp_path / "none"), try_gcs=False).info.features
        row = {name.fields.get(field, field): synthetic(feature) for field, feature in features.items()}
        served[source] = name.adapt(row) if name.adapt else row
        folder = tmp_path / own / "1.0.0"
        folder.mkdir(parents=True)
        (folder / "features.json").write_text(json.dumps(
            {"featuresDict": {"features": dict.fromkeys(features)}}))
        (folder / "dataset_info.json").write_text(json.dumps({"splits": [
            {"name": split, "shardLengths": ["1"]} for split in ("train", "validation")]}))
    refused = {task.name for task in tasks
               if not task.load_template().fields() <= set(served[task.row_source])}
    assert {task.row_source for task in tasks if task.name in refused} == LACKING
    for task in tasks:
        assert task.why_unavailable() == ("no data" if task.name in refused else None), task.name
        assert task.has_rows("validation") == (task.name not in refused), task.name
    assert {task.template for task in tasks if task.dataset == "hellaswag"} - {
        task.template for task in tasks if task.name in refused}, "some templates read the context whole"


def test_both_numberings_of_trec_serve_the_templates_of_their_version():
    folders = {"label_coarse": templates.installed_folder(), "coarse_label": DATA}
    for field, folder in folders.items():
        if folder is None or not (pathlib.Path(folder) / "trec").exists():
            pytest.skip(f"no templates with {field}")
        template = templates.find_template("trec", None, "trec1", [folder])
        row = tfds_names.trec_row({"text": "Where?", "label_coarse": 5, "label_fine": 14})
        assert template.render(row, seed=0).targets == "Location"
        template = templates.find_template("trec", None, "fine_grained_LOC", [folder])
        assert template.render(row, seed=0).targets == "other location"


def test_names_of_the_hub_in_tfds_s_spelling(tmp_path, monkeypatch):
    monkeypatch.setenv("ELM_TFDS_DIR", str(tmp_path))
    for version in ("1.0.0", "10.0.0", "9.9.9"):
        (tmp_path / "super_glue" / "wsc_fixed" / version).mkdir(parents=True)
        (tmp_path / "super_glue" / "wsc_fixed" / version / "dataset_info.json").write_text("{}")
    folder, name = tfds_rows.find("super_glue", "wsc.fixed")
    assert folder.name == "10.0.0" and name.name == "huggingface:super_glue/wsc.fixed"
    assert tfds_rows.find("super_glue", "rte") is None
