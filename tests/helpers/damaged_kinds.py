"""Small whole instances of every kind of file and folder that the program reads, and what reads each."""

import contextlib
import csv
import dataclasses
import functools
import gzip
import io
import json
import os
import pathlib
import shutil
import struct
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import safetensors.numpy
from checkout import ROOT

sys.path.insert(0, str(ROOT / "tests" / "compat"))

QUESTIONS = [{"inputs": f"Which team answers ticket {number}?", "choices": ["sales", "help"],
              "choices_expression": "sales ||| help"} for number in range(4)]
SIZES = {"vocab_size": 29, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 16, "max_position_embeddings": 32}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        name: of the kind.
        make: fills an empty folder.
        read: reads what is in the folder, as the verbs do.
        quick: whether it is made fast, without torch and TensorFlow.
        left_out: parts of paths of files that are there for others, and stay whole.
        told: other words that name the place, such as those of a config that several files and flags make.
    """

    name: str
    make: Callable[[pathlib.Path], None]
    read: Callable[[pathlib.Path], object]
    quick: bool = True
    left_out: tuple[str, ...] = ()
    told: tuple[str, ...] = ()


@functools.cache
def _older() -> pathlib.Path:
    """The folders of an older version, unpacked once."""
    import older_folders

    folder = pathlib.Path(tempfile.mkdtemp(prefix="elm-whole-"))
    with tarfile.open(older_folders.ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def forget() -> None:
    """Removes what `_older` unpacked."""
    if _older.cache_info().currsize:
        shutil.rmtree(_older())
        _older.cache_clear()


def _copy(*names: str) -> Callable[[pathlib.Path], None]:
    """Fills a folder with folders and files of an older version."""
    def make(folder: pathlib.Path) -> None:
        for name in names:
            source = _older() / name
            if source.is_dir():
                shutil.copytree(source, folder / source.name, dirs_exist_ok=True)
            else:
                shutil.copy(source, folder / source.name)
    return make


def read_base(folder: pathlib.Path) -> object:
    from elm_jax.experts.base import load_base

    return load_base(folder / "base")


def read_expert(folder: pathlib.Path) -> object:
    from elm_jax.experts.overlay import load_expert
    from elm_jax.formats import detect
    from elm_jax.reporting import expert_cards

    with contextlib.suppress(detect.InputError):
        detect.open_model(folder / "expert")
    expert_cards.cards_grid(found.card for found in expert_cards.find_experts(
        {"tickets__which_team": None}, (), [folder]).values())
    return load_expert(folder / "expert")


def make_library(folder: pathlib.Path) -> None:
    """A library as it is written now, calibrated: a change writes one of an older version anew."""
    from elm_jax.experts import generality
    from elm_jax.experts.library import ExpertLibrary

    _copy("library")(folder)
    library = ExpertLibrary.open(folder / "library")
    library.remove(list(library)[1:])
    generality.write_generality(library.path, generality.Generality(
        [generality.CalibratedDataset("mini_note", "notes", 2)],
        {name: generality.CalibratedExpert(entry.card.created, "sha256:0", [-0.25])
         for name, entry in library.entries.items()}))


def read_library(folder: pathlib.Path) -> object:
    """Opens, lists, routes, and reads every expert back."""
    from elm_jax.experts.library import ExpertLibrary
    from elm_jax.reporting import library_report
    from elm_jax.routing.text import RoutingInstance
    from elm_jax.workflows.row_routes import explained_routes

    opened = library_report.open_without_encoder(folder / "library")
    library_report.check_cards(opened)
    library_report.experts_grid(opened, library_report.key_neighbors(opened.index))
    library = ExpertLibrary.open(folder / "library")
    library.routed()
    explained_routes(library, [RoutingInstance("Which team answers?", None, ("sales", "help"))])
    faults = library.verify()
    if faults:
        raise _input_error("\n".join(faults))
    return library


def _input_error(text: str) -> Exception:
    from elm_jax.errors import InputError

    return InputError(text)


def read_results(folder: pathlib.Path) -> object:
    """Everything that `elm evaluate` and `elm report` take from results, but for drawing."""
    from elm_jax.evaluation.results import ResultsStore
    from elm_jax.reporting import results_report, study_report

    store = ResultsStore(folder / "results")
    for row in store.rows():
        store.with_interval(row)
        store.done(row["expert"], row["task"], row["split"], row["settings"], metrics=("acc_norm",))
        store.values(row["expert"], row["task"], row["split"])
    scores = [results_report._score(store, row) for row in store.rows()]
    results_report.scores_grid(scores)
    study_report.read_matrix(store)
    return scores


def make_study(folder: pathlib.Path) -> None:
    """A study's facts, and its results as tiny predictions."""
    import synthetic_study

    from elm_jax.runtime import storage

    facts, matrix = synthetic_study.facts_and_matrix(num_instances=2, num_prompts=1)
    storage.write_json(folder / "results" / "study.json", {**facts, "schema_version": 1})
    rows = []
    for (expert, task), cell in matrix.items():
        ranked = cell.metric == "accuracy"
        found = [{"index": int(index), "prediction": "a", "target": "b",
                  **({"correct": int(value), "scores": [0.5, 0.25], "label": 0} if ranked
                     else {"rouge_l": float(value)})}
                 for index, value in zip(cell.indices, cell.values, strict=True)]
        storage.write_text(folder / "results" / "predictions" / expert / f"{task}.validation.jsonl",
                           "".join(json.dumps(row) + "\n" for row in found))
        rows.append({"schema_version": 2, "expert": expert, "task": task, "split": "validation",
                     "metric": cell.metric, "value": float(cell.values.mean()), "ci95_low": 0.0,
                     "ci95_high": 1.0, "num_instances": 2, "num_cut": cell.num_cut, "dataset": cell.dataset,
                     "chance": cell.chance, "settings": "x"})
    storage.append_jsonl(folder / "results" / "results.jsonl", rows)


def read_study(folder: pathlib.Path) -> object:
    from elm_jax.reporting import report, study_report
    from elm_jax.reporting.study_table import study_table

    facts = study_report.read_facts(folder / "results")
    matrix = study_report.read_matrix(study_report.ResultsStore(folder / "results"))
    table = study_table(facts, matrix)
    store = study_report.ResultsStore(folder / "results")
    extras = report.Extras(report.Made(), {"heat_map.png": b"", "bars.png": b""}, {},
                           study_report.study_samples(facts, matrix, store),
                           study_report.heat_map_grid(facts, matrix))
    return report.render(facts, table, study_report.oracle_ranks(facts, matrix), extras)


def make_records(folder: pathlib.Path) -> None:
    from elm_jax.runtime import storage

    make_study(folder / "whole")
    storage.write_json(folder / "made_of.json", {"schema_version": 1, "made_of": {"library": "0123"}})
    storage.write_json(folder / "stages.json", {"schema_version": 1, "seconds": {"library": 1.5}})
    facts = json.loads((folder / "whole" / "results" / "study.json").read_text())
    storage.write_json(folder / "routing.json", {
        "schema_version": 1, "decisions": dict(list(facts["decisions"].items())[:2]),
        "figures": facts["routing_figures"]})
    shutil.rmtree(folder / "whole")


def read_records(folder: pathlib.Path) -> object:
    from elm_jax.workflows.study import study_routing
    from elm_jax.workflows.train.run_record import MadeOf, StageClock

    MadeOf(folder / "made_of.json").fits("library", 1)
    with StageClock(folder / "stages.json").stage("library"):
        pass
    if not os.path.lexists(folder / "routing.json"):
        return []  # then the study routes
    found = study_routing.route_study(None, None, None, folder / "routing.json")
    return [decision["top_k"] for decision in found["decisions"].values()]


def make_arrays(folder: pathlib.Path) -> None:
    """A split as it is written now, with digests, and one of an older version, without."""
    from elm_jax.data.arrays.prepared import PreparedSplit

    _copy("arrays/tickets__which_team/train")(folder)
    PreparedSplit.open(folder / "train").save(folder / "now")


def read_arrays(folder: pathlib.Path) -> object:
    """Every row of a prepared split, as evaluation and training take them."""
    from elm_jax.data.arrays.prepared import PreparedSplit

    for split in (PreparedSplit.open(folder / "train"), PreparedSplit.open(folder / "now")):
        for number in range(len(split)):
            split.text(number), split.credits(number), split.choices(number), split.targets(number)
            split.inputs(number), split.lengths_of(number), split.routing_instance(number)
        split.subset(3)


def read_farm(folder: pathlib.Path) -> object:
    from elm_jax.workflows.farm import farm_status
    from elm_jax.workflows.farm.worker import Worker, WorkSettings

    Worker(folder / "half_farm", WorkSettings())
    return farm_status.status(folder / "half_farm", 120.0, 3)


def read_checkpoint(folder: pathlib.Path) -> object:
    """Goes on with a run: its note, its rows of metrics, its state."""
    from elm_jax.training.checkpoint import Checkpoints
    from elm_jax.training.metrics_log import MetricsLog

    MetricsLog(folder / "half_prompt", 100, False)
    facts, like = _run_of(_older() / "half_prompt")
    with Checkpoints(folder / "half_prompt", facts) as checkpoints:
        checkpoints.note()
        return checkpoints.restore(like)


def make_loads(folder: pathlib.Path) -> None:
    """Lines of two layers of a run over two tasks."""
    load = [0.5, 0.25, 0.25]
    rows = [{"step": step, "layer": layer, "steps": 5, "tokens": 40.0, "load": load, "dropped": 0.1,
             "entropy": 1.0, "entropy_share": 0.91, "z": 2.0, "balance": 1.1, "max_load": 0.5,
             "min_load": 0.25, "mutual_information": 0.0, "by_task": {
                 "sums": {"choices": 30.0, "load": load}, "notes": {"choices": 10.0, "load": load}}}
            for step in (5, 10) for layer in ("encoder/layers_1", "decoder/layers_1")]
    (folder / "run").mkdir()
    (folder / "run" / "router.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_loads(folder: pathlib.Path) -> object:
    """Goes on with the run, and reports it but for drawing."""
    from elm_jax.models.layers.sparse_config import SparseConfig
    from elm_jax.reporting import router_loads
    from elm_jax.training import router_log
    from elm_jax.training.metrics_log import MetricsLog

    MetricsLog(folder / "run", 100, False, router_log.RouterTotals(SparseConfig(3)))
    loads = router_log.read_loads(folder / "run" / router_log.FILE)
    return router_loads.loads_grid({"run": loads})


@functools.cache
def _run_of(folder: pathlib.Path) -> tuple[dict, object]:
    """Facts and abstract state of a run, as its whole checkpoint tells them."""
    import ast

    import jax

    from elm_jax.runtime import trees
    from elm_jax.training.optimizers import OptimizerConfig
    from elm_jax.training.state import abstract_state

    marker = json.loads((next((folder / "checkpoints").iterdir()) / "COMMITTED.json").read_text())
    leaves = {path: text.partition("[") for path, text in marker["leaves"].items()
              if not path.startswith("opt_state")}
    overlay = trees.unflatten({path: jax.ShapeDtypeStruct(tuple(ast.literal_eval(f"[{shape}")), dtype)
                               for path, (dtype, _, shape) in leaves.items()})
    for name in ("adafactor", "adamw"):
        state = abstract_state(overlay, OptimizerConfig(name))
        count = len(jax.tree.leaves((state.overlay, state.opt_state)))
        if count == len(marker["leaves"]):
            break
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), state)
    return {name: ast.literal_eval(fact) for name, fact in marker["facts"].items()}, state


def make_zarr(folder: pathlib.Path) -> None:
    """T5X's older layout: an array a folder, some in the msgpack file."""
    import t5x_checkpoints as t5x

    network = t5x.config("t5_1_0_tied")
    leaves = t5x.as_t5x(t5x.random_leaves(network), network, "minimal")
    t5x.write_zarr(folder / "model", leaves, inline=("decoder/decoder_norm/scale",))


def read_note(folder: pathlib.Path) -> object:
    """What a stack's checkpoint says of its slots."""
    from elm_jax.training.checkpoint import Checkpoints
    from elm_jax.training.stack import stacked_loop

    with Checkpoints(folder / "stack", {}) as checkpoints:
        note = checkpoints.note()
        if note is not None:
            stacked_loop.check_note(note, checkpoints)


def make_stack(folder: pathlib.Path) -> None:
    from elm_jax.runtime import storage
    from elm_jax.workflows.train.train_stack import FAILED_FILE

    storage.write_json(folder / "run" / FAILED_FILE, {
        "schema_version": 1, "config_digest": "a", "base": "b", "message": "not finite"})
    shutil.copy(_older() / "experts.jsonl", folder / "experts.jsonl")
    rows = [json.loads(line) for line in (folder / "experts.jsonl").read_text().splitlines()]
    (folder / "stack.jsonl").write_text("".join(json.dumps({
        "task": row["task"], "learning_rate": 0.5, "train_steps": 4, "seed": 1}) + "\n" for row in rows))
    with open(folder / "experts.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["task", "learning_rate"])
        writer.writeheader()
        writer.writerows({"task": row["task"], "learning_rate": 0.5} for row in rows)


def read_stack(folder: pathlib.Path) -> object:
    """The tables of a farm and of a stack, and the mark of an expert that failed."""
    import types

    from elm_jax.workflows.farm import farm_table
    from elm_jax.workflows.train import stack_table, train_stack

    for name in ("experts.csv", "experts.jsonl"):
        for row in farm_table.read_table(folder / name):
            farm_table.bindings_of(row)
    for name in ("experts.csv", "stack.jsonl"):
        stack_table.rows_of_table(folder / name)
    config = types.SimpleNamespace(model_dir=str(folder / "run"), digest=lambda: "a")
    return train_stack._earlier_failure(config, types.SimpleNamespace(fingerprint="b"))


def read_gin(folder: pathlib.Path) -> object:
    from elm_jax.cli import gin_config

    with contextlib.chdir(folder):
        gin_config.parse(["study.gin"], ["WORKDIR='work'"], ["gin"])
        return gin_config.build("study")


def make_rows(folder: pathlib.Path) -> None:
    """A data folder: rows, an index, templates."""
    rows = [{"text": f"ticket {number}", "label": number % 2, "more": {"a": [1, "x"]}} for number in range(5)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "own").mkdir()
    (folder / "own" / "train.jsonl").write_text(text)
    (folder / "own" / "validation.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    (folder / "index.json").write_text(json.dumps([
        {"name": "own", "config": None, "splits": {"train": 5, "validation": 5}, "license": "CC0"}]))
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "own" / "templates.yaml").write_text(TEMPLATES)


TEMPLATES = """dataset: own
templates:
  0b6d3ae9-6a6f-4d0b-8ae5-2f7d2a4f9d11: !Template
    answer_choices: help ||| sales
    id: 0b6d3ae9-6a6f-4d0b-8ae5-2f7d2a4f9d11
    jinja: "Which team? {{text}} ||| {{answer_choices[label]}}"
    metadata: !TemplateMetadata
      choices_in_prompt: false
      languages:
      - en
      metrics:
      - Accuracy
      original_task: true
    name: which team
    reference: by hand
"""


@contextlib.contextmanager
def data_folder(folder: pathlib.Path) -> Iterator[None]:
    """ELM_DATA_DIR names the folder."""
    before = os.environ.get("ELM_DATA_DIR")
    os.environ["ELM_DATA_DIR"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("ELM_DATA_DIR")
        if before is not None:
            os.environ["ELM_DATA_DIR"] = before


def read_rows(folder: pathlib.Path) -> object:
    from elm_jax.data.prompts import templates
    from elm_jax.data.sources import row_files
    from elm_jax.routing.text import FORMATS, format_text
    from elm_jax.workflows.route import read_examples

    with data_folder(folder):
        for instance in read_examples(folder / "questions.jsonl"):
            [format_text(instance, each) for each in FORMATS]
        row_files.num_rows("own", None, "train")
        list(row_files.read_passages("own", None, "text"))
        rows = [row for split in ("train", "validation")
                for row in row_files.read_rows("own", None, split)]
        found = templates.read_templates(folder / "own" / "templates.yaml")
        templates.check_collisions("own", None, found)
        for template in found.values():
            assert template.digest
            for row in rows:
                template.render(row, seed=0)
        return found


def make_llama(folder: pathlib.Path) -> None:
    """A Hugging Face folder of a small Llama in two shards, with its tokenizer."""
    (folder / "model").mkdir()
    model = folder / "model"
    write_json(model / "config.json", {
        **SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 2, "rope_theta": 100.0, "attention_bias": False})
    write_json(model / "generation_config.json", {"max_length": 20, "temperature": 0.5, "eos_token_id": [2]})
    write_json(model / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"})
    write_json(model / "special_tokens_map.json", {"eos_token": "</s>", "pad_token": {"content": "</s>"}})
    write_json(model / "tokenizer.json", tokenizer_of("BPE"))
    shards = [dict(part) for part in np.array_split(np.asarray(list(llama_tensors().items()), object), 2)]
    names = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    for name, tensors in zip(names, shards, strict=True):
        safetensors.numpy.save_file(tensors, model / name, metadata={"format": "pt"})
    write_json(model / "model.safetensors.index.json", {
        "metadata": {"total_size": 1}, "weight_map": {
            tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}})


def llama_tensors() -> dict[str, np.ndarray]:
    """Tensors of the config of `make_llama`."""
    draw = np.random.default_rng(0)
    inner, head = SIZES["intermediate_size"], 6
    shapes = {"model.embed_tokens.weight": (29, 12), "model.norm.weight": (12,), "lm_head.weight": (29, 12)}
    layer = {"input_layernorm": (12,), "post_attention_layernorm": (12,), "self_attn.q_proj": (12, 12),
             "self_attn.k_proj": (head, 12), "self_attn.v_proj": (head, 12), "self_attn.o_proj": (12, 12),
             "mlp.gate_proj": (inner, 12), "mlp.up_proj": (inner, 12), "mlp.down_proj": (12, inner)}
    shapes |= {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in sorted(shapes.items())}


def tokenizer_of(kind: str) -> dict:
    """A tokenizer.json of 29 ids: of letters (BPE) or of words (WordPiece)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<unk>", "<s>", "</s>"] if kind == "BPE" else ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = {word: number for number, word in enumerate([*special, *"abcdefghijklmnopqrstuvwxyz"][:29])}
    if kind == "BPE":
        tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(special)
    return json.loads(tokenizer.to_str())


def write_json(path: pathlib.Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def read_model(folder: pathlib.Path) -> object:
    """What a conversion reads, every tensor of it, and the chat template."""
    from elm_jax.experts.base import load_base
    from elm_jax.workflows.merge import merge_inputs

    base = load_base(folder / "model")
    if base.chat_template is not None:
        base.chat_template.ask("a question")
    if merge_inputs.is_checkpoint(str(folder / "model")):
        merge_inputs.open_checkpoint(str(folder / "model"))
    return base


def read_hf_export(folder: pathlib.Path) -> object:
    from elm_jax.experts import weight_sources

    source = weight_sources.open_source("hf", folder / "hf_export")
    source.leaves()
    return [source.model.tensors.read(path) for path in source.model.tensors.specs]


def read_t5x(folder: pathlib.Path) -> object:
    from elm_jax.experts import weight_sources

    place = next(folder.iterdir())
    source = weight_sources.open_source("t5x", place)
    return [source.model.tensors.read(path) for path in source.model.tensors.specs]


def make_peft(folder: pathlib.Path) -> None:
    make_llama(folder)
    (folder / "adapter").mkdir()
    write_json(folder / "adapter" / "adapter_config.json", {
        "peft_type": "LORA", "base_model_name_or_path": "model", "task_type": "CAUSAL_LM", "r": 2,
        "lora_alpha": 4, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "target_modules": ["q_proj", "v_proj"], "modules_to_save": None, "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {}, "use_rslora": False, "inference_mode": True, "layers_to_transform": None})
    draw, tensors = np.random.default_rng(1), {}
    for name, width in (("q_proj", 12), ("v_proj", 6)):
        place = f"base_model.model.model.layers.0.self_attn.{name}"
        tensors[f"{place}.lora_A.weight"] = draw.normal(size=(2, 12)).astype(np.float32)
        tensors[f"{place}.lora_B.weight"] = draw.normal(size=(width, 2)).astype(np.float32)
    safetensors.numpy.save_file(tensors, folder / "adapter" / "adapter_model.safetensors")


def read_peft(folder: pathlib.Path) -> object:
    from elm_jax.errors import InputError
    from elm_jax.experts import weight_sources
    from elm_jax.formats import detect

    with contextlib.suppress(InputError):
        detect.open_model(folder / "adapter")
    return weight_sources.open_source("peft", folder / "adapter", base=folder / "model")


def make_encoder(folder: pathlib.Path) -> None:
    """A sentence-transformers folder with a default prompt."""
    from elm_jax.models.bert import sentence_encoder

    sizes = {**SIZES, "type_vocab_size": 2, "layer_norm_eps": 1e-12}
    config = sentence_encoder.SentenceEncoderConfig(**sizes, max_seq_length=16)
    folder = folder / "encoder"
    write_json(folder / "config.json", {**sizes, "model_type": "bert", "hidden_act": "gelu"})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 16, "do_lower_case": False})
    write_json(folder / "1_Pooling" / "config.json", {
        "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False, "include_prompt": True})
    write_json(folder / "modules.json", [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}])
    write_json(folder / "config_sentence_transformers.json", {
        "default_prompt_name": "query", "prompts": {"query": "a b "}, "similarity_fn_name": "cosine"})
    write_json(folder / "tokenizer_config.json", {"model_max_length": 16, "do_lower_case": True})
    write_json(folder / "tokenizer.json", tokenizer_of("WordPiece"))
    draw, tensors = np.random.default_rng(0), {}
    shapes = sentence_encoder._shapes(config)
    for leaf, name in sentence_encoder.tensor_names(config).items():
        values = draw.normal(size=shapes[leaf]).astype(np.float32)
        tensors[name] = np.ascontiguousarray(values.T if leaf.endswith("/kernel") else values)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def read_encoder(folder: pathlib.Path) -> object:
    from elm_jax.routing.encoders import MiniLMEncoder

    encoder = MiniLMEncoder.from_folder(folder / "encoder")
    return encoder.tokenize(["a b c", "zz"]), encoder.unpooled


def make_recipe(folder: pathlib.Path) -> None:
    """mergekit's files over two models, and a filter's."""
    for name in ("one", "two"):
        (folder / name).mkdir()
        for path in sorted(_llama_folder().iterdir()):
            shutil.copy(path, folder / name / path.name)
    (folder / "merge.yaml").write_text(RECIPE)
    (folder / "slices.yaml").write_text(SLICES)


@functools.cache
def _llama_folder() -> pathlib.Path:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="elm-whole-", dir=_older()))
    make_llama(folder)
    return folder / "model"


RECIPE = """merge_method: ties
base_model: one
models:
  - model: one
  - model: two
    parameters:
      weight:
        - filter: self_attn
          value: [0.1, 0.9]
        - value: 0.5
      density: 0.5
parameters:
  normalize: true
dtype: float32
tokenizer_source: base
"""
SLICES = """merge_method: linear
slices:
  - sources:
      - model: one
        layer_range: [0, 1]
        parameters: {weight: 0.5}
      - model: two
        layer_range: [0, 1]
        parameters: {weight: 0.5}
dtype: float32
"""


def read_recipe(folder: pathlib.Path) -> object:
    from elm_jax.merging.recipes import mergekit_yaml
    from elm_jax.workflows.merge import merge_folders
    from elm_jax.workflows.merge.merge_plan import MergeOptions

    with contextlib.chdir(folder):
        for name in ("merge.yaml", "slices.yaml"):
            merge_folders.plan_merge(mergekit_yaml.read_config(folder / name), MergeOptions())


def make_store(folder: pathlib.Path) -> None:
    store = _row_store(folder)
    for number in range(4):
        store.put(number.to_bytes(16, "little"), np.full((2, 3), number, np.float32))
    store.flush()


def _row_store(folder: pathlib.Path):
    from elm_jax.runtime.row_store import RowStore

    return RowStore(folder, "store", {"base": "sha256:1"}, width=3, dtype=np.float32, most_bytes=10**6)


def read_store(folder: pathlib.Path) -> object:
    store = _row_store(folder)
    return [store.get(number.to_bytes(16, "little")) for number in range(4)]


def make_cached(folder: pathlib.Path) -> None:
    """A task of T0's cached P3."""
    records = io.BytesIO()
    from elm_jax.data.sources import cached_p3

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    for number in range(3):
        entry = b""
        for name, text in (("inputs_pretokenized", f"Is {number} even?"), ("targets_pretokenized", "yes")):
            value = field(1, field(1, text.encode()))
            entry += field(1, field(1, name.encode()) + field(2, value))
        example = field(1, entry) if len(entry) < 128 else bytes([10, len(entry) & 127 | 128, len(entry) >> 7]
                                                                  ) + entry
        head = struct.pack("<Q", len(example))
        records.write(head + cached_p3._masked_crc(head) + example + cached_p3._masked_crc(example))
    (folder / "train.tfrecord-00000-of-00001").write_bytes(records.getvalue())


def read_cached(folder: pathlib.Path) -> object:
    from elm_jax.data.sources import cached_p3

    return list(cached_p3.read_examples(folder, "train"))


def make_heads(folder: pathlib.Path) -> None:
    """Heads of a data set that TFDS has prepared."""
    write_json(folder / "own" / "1.0.0" / "dataset_info.json", {
        "name": "own", "version": "1.0.0", "fileFormat": "tfrecord",
        "splits": [{"name": "train", "shardLengths": ["3", "4"], "numBytes": "10"}]})
    write_json(folder / "own" / "1.0.0" / "features.json", {
        "pythonClassName": "FeaturesDict", "featuresDict": {"features": {"text": {"text": {}}}}})


def read_heads(folder: pathlib.Path) -> object:
    from elm_jax.data.sources import tfds_rows

    place = tfds_rows.storage.as_path(folder / "own" / "1.0.0")
    tfds_rows._features.cache_clear()
    tfds_rows._versions(place.parent)
    name = tfds_rows.TfdsName("own")
    return tfds_rows.splits_of(place), tfds_rows.fields_of(place, name), tfds_rows.split_name(
        place, name, "train")


def make_vocabularies(folder: pathlib.Path) -> None:
    shutil.copy(_older() / "base" / "base" / "vocabulary.model", folder / "pieces.model")
    write_json(folder / "bytes.json", {"schema_version": 1, "kind": "bytes", "extra_ids": 125})
    text = json.dumps(tokenizer_of("BPE")).replace("<s>", "<pad>")
    (folder / "tokenizer.json").write_text(text)
    (folder / "passages.txt").write_text("One passage.\nTwo.\n")


def read_vocabularies(folder: pathlib.Path) -> object:
    from elm_jax.vocabularies.vocabulary import Vocabulary
    from elm_jax.workflows.train import pretrain

    pretrain.read_passages((str(folder / "passages.txt"),))
    for name in ("pieces.model", "bytes.json", "tokenizer.json"):
        vocabulary = Vocabulary.load(folder / name)
        vocabulary.decode(vocabulary.encode("abc def"))


def make_gguf(folder: pathlib.Path) -> None:
    import gguf_files
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=264, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_key_value_heads=1, max_position_embeddings=32, head_dim=6)
    gguf_files.write_gguf(folder / "model.gguf", transformers.LlamaForCausalLM(config))


def read_gguf(folder: pathlib.Path) -> object:
    from elm_jax.formats import detect

    model = detect.open_model(folder / "model.gguf")
    return [model.tensors.read(path) for path in model.tensors.specs]


def make_torch(folder: pathlib.Path) -> None:
    import torch

    make_llama(folder)
    for path in (folder / "model").glob("*safetensors*"):
        path.unlink()
    tensors = {name: torch.tensor(value) for name, value in llama_tensors().items()}
    parts = [dict(list(tensors.items())[:6]), dict(list(tensors.items())[6:])]
    names = [f"pytorch_model-{number:05d}-of-00002.bin" for number in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, folder / "model" / name)
    write_json(folder / "model" / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": {
        tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}})


KINDS = {kind.name: kind for kind in (
    Kind("base", _copy("base/base"), read_base),
    Kind("expert", _copy("runs/prompt/expert", "runs/prompt/metrics.jsonl"), read_expert),
    Kind("library", make_library, read_library),
    Kind("older library", _copy("library"), read_library),
    Kind("results", _copy("results"), read_results),
    Kind("study", make_study, read_study, told=("where: task ", "Rows were not scored")),
    Kind("records", make_records, read_records),
    Kind("arrays", make_arrays, read_arrays),
    Kind("farm", _copy("half_farm"), read_farm, left_out=("/state/", "/weights/", ".gin", "metrics.jsonl")),
    Kind("checkpoint", _copy("half_prompt"), read_checkpoint, left_out=(".gin",)),
    Kind("loads", make_loads, read_loads),
    Kind("tables", make_stack, read_stack),
    Kind("gin", _copy("gin", "study.gin", "corpus.txt"), read_gin, left_out=(
        "corpus.txt", "pretrain.gin", "train.gin", "/experts/"), told=("Config.", "study", "gin config")),
    Kind("rows", make_rows, read_rows),
    Kind("llama", make_llama, read_model),
    Kind("hf_export", _copy("hf_export"), read_hf_export, left_out=("report.json",)),
    Kind("t5x_export", _copy("t5x_export"), read_t5x, left_out=("report.json",)),
    Kind("t5x_zarr", make_zarr, read_t5x, quick=False),
    Kind("stack", _copy("half_stack/stack"), read_note, left_out=("/state/",)),
    Kind("peft", make_peft, read_peft, left_out=("/model/",)),
    Kind("encoder", make_encoder, read_encoder),
    Kind("recipe", make_recipe, read_recipe, left_out=("/two/model-",)),
    Kind("store", make_store, read_store),
    Kind("cached", make_cached, read_cached),
    Kind("heads", make_heads, read_heads),
    Kind("vocabularies", make_vocabularies, read_vocabularies),
    Kind("gguf", make_gguf, read_gguf, quick=False),
    Kind("torch", make_torch, read_model, quick=False),
)}
"""Every kind, by name."""
