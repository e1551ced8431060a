"""Plain flags and gin give one config; a flag that sets nothing is refused; help lists what gin reads."""

import shlex

import pytest
from checkout import ROOT

from elm_jax.cli import flags, gin_config, gin_files, main, run_config
from elm_jax.errors import InputError
from elm_jax.workflows.choices import TRAIN_KINDS

PLACES = "--task t --base b --output 'runs/a b'"
GIN_PLACES = ["TASK = 't'", "INITIAL_CHECKPOINT_PATH = 'b'", "MODEL_DIR = 'runs/a b'"]
FILES = [path.relative_to(ROOT).as_posix() for folder in ("experts", "runs", "scale", "studies")
         for path in sorted((ROOT / "gin" / folder).glob("[a-z]*.gin"))]


def arguments_of(line, *bindings):
    arguments = flags.make_parser().parse_args(shlex.split(line))
    arguments.gin_bindings = list(bindings)
    return arguments


def built(name):
    return gin_config.build(name), gin_config.operative()


@pytest.mark.parametrize(("line", "file", "bindings", "name"), [
    *((f"train --kind {kind} {PLACES}", f"experts/{kind}.gin", GIN_PLACES,
       "train_stack" if kind == "prompt_stack" else "train") for kind in TRAIN_KINDS),
    (f"train --kind lora {PLACES} --steps 7 --learning_rate 1e-3 --batch_size 4 --lora_rank 2 "
     "--lora_alpha 3.5 --module my_tasks --module more --seed 3 --source_length 64 --prepared arrays",
     "experts/lora.gin",
     [*GIN_PLACES, "TRAIN_STEPS=7", "EPOCHS=None", "LEARNING_RATE=1e-3", "BATCH_SIZE=4", "LORA_RANK=2",
      "LORA_ALPHA=3.5", "TASK_MODULES=('my_tasks', 'more')", "RANDOM_SEED=3", "PREPARED_DIR='arrays'",
      "TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 128}"], "train"),
    (f"train --gin_file gin/experts/dataset.gin {PLACES} --epochs 2", "experts/dataset.gin",
     [*GIN_PLACES, "EPOCHS=2"], "train"),
    ("pretrain --passages a.txt --passages m:f --output o --vocab_size 4096 --steps 9 --target_length 8",
     "runs/pretrain.gin", ["PASSAGES=('a.txt', 'm:f')", "MODEL_DIR='o'", "VOCAB_SIZE=4096", "TRAIN_STEPS=9",
                           "pretrain.vocab_pieces = 3904",
                           "TASK_FEATURE_LENGTHS={'inputs': 128, 'targets': 8}"],
     "pretrain"),
    ("study --gin_file gin/studies/demo.gin --output o", "studies/demo.gin", ["WORKDIR='o'"], "study"),
])
def test_flags_and_gin_give_one_config(line, file, bindings, name):
    arguments = arguments_of(line)
    getattr(run_config, f"read_{arguments.verb}")(arguments)
    plain = built(name)
    gin_config.parse([file], bindings)
    assert plain == built(name)


def test_the_vocabulary_of_the_file_is_that_of_its_size():
    run_config.read_pretrain(arguments_of("pretrain --passages a --output o --vocab_size 8192"))
    plain = gin_config.build("pretrain")
    gin_config.parse(["runs/pretrain.gin"], ["PASSAGES = ('a',)", "MODEL_DIR = 'o'"])
    assert plain == gin_config.build("pretrain")
    run_config.read_pretrain(arguments_of("pretrain --passages a --output o --vocab_size 600",
                                          "pretrain.vocab_pieces = 300"))
    assert gin_config.build("pretrain").vocab_pieces == 300


@pytest.mark.parametrize(("file", "kind"), [("models/llama_tiny.gin", "lora"), ("models/tiny.gin", "prompt")])
def test_files_that_bind_no_run_come_after_those_of_the_network_s_kind(file, kind):
    arguments = arguments_of(f"train --gin_file {file} --gin_file sharding/fsdp.gin --task t --output o")
    assert run_config.read_train(arguments)
    assert arguments.gin_file == [str(ROOT / "gin" / "experts" / f"{kind}.gin"), file, "sharding/fsdp.gin"]
    assert gin_config.macros()["SHARDING_RULES"]
    arguments = arguments_of("pretrain --gin_file models/llama_tiny.gin --output o --passages p")
    run_config.read_pretrain(arguments)
    assert type(gin_config.build("pretrain").network).__name__ == "DecoderConfig"


def test_tasks_add_up_and_a_small_network_gets_a_small_vocabulary():
    run_config.read_train(arguments_of("train --kind prompt --task a --task b,c --base b --output o"))
    assert gin_config.build("train").task == "a,b,c"
    run_config.read_pretrain(arguments_of("pretrain --gin_file models/llama_tiny.gin --passages a "
                                          "--output o"))
    assert gin_config.build("pretrain").vocab_pieces == 4096 - 192


def test_rows_of_a_farm_s_table_have_the_flags_or_their_own_file():
    arguments = arguments_of("farm init --dir d --table t --kind lora --base b --steps 3")
    rows = [{"task": "t"}, {"task": "u", "gin_file": "experts/dataset.gin"}]
    kinds = []
    for one in run_config.read_farm(arguments, rows):
        gin_config.parse(one.gin_file, [*one.gin_bindings, *GIN_PLACES])
        found = gin_config.build("train")
        kinds.append((found.kind, found.lora_rank, found.train_steps))
    assert kinds == [("prompt", 8, 3), ("dataset", None, 3)]


def test_a_t5_gets_adapters_and_lengths_that_are_given_stay(world):
    line = f"train --task t --base {world.base.path} --output o"
    assert run_config.read_train(arguments_of(line))
    assert gin_config.build("train").adapter().kind == "bottleneck"
    for more, bindings in (("--source_length 8 --target_length 8", ()), ("", ("train.task_recipe = True",)),
                           ("", ("TASK_FEATURE_LENGTHS = {'inputs': 8, 'targets': 8}",))):
        assert not run_config.read_train(arguments_of(f"{line} {more}", *bindings))


@pytest.mark.parametrize(("line", "bindings", "words"), [
    ("train", (), ("no --task, no --base, no --output", "cure: elm train --task")),
    ("train --kind prompt --base b", (), ("no MODEL_DIR, no TASK", "add --output ... --task ...")),
    (f"train --kind prompt {PLACES} --lora_rank 4", (),
     ("--lora_rank sets LORA_RANK, which the gin file does not have", "experts/prompt.gin", "--kind lora")),
    (f"train --kind lora {PLACES} --steps 4 --epochs 2", (), ("given twice", "--steps 4 and --epochs 2")),
    (f"train --kind lora {PLACES} --steps 4", ("EPOCHS = 2",), ("--gin.EPOCHS = 2 and --steps 4",)),
    (f"train --kind lora {PLACES}", ("TASK='u'",), ("--gin.TASK='u' and --task t",)),
    (f"train --kind lora {PLACES} --source_length 4", ("TASK_FEATURE_LENGTHS={}",), ("--source_length 4",)),
    (f"train --kind lora --gin_file experts/prompt.gin {PLACES}", (), ("chosen twice",)),
    (f"train --kind lora {PLACES} --batch_size 0", (), ("batch_size", "above 0")),
    ("train --task t --base nowhere --output o", (), ("nowhere",)),
    ("pretrain --output o", (), ("no PASSAGES", "--passages ...")),
    ("study --output o", (), ("studies/p3_small.gin",)),
    ("study --gin_file studies/demo.gin --output o --base b", (), ("--base sets INITIAL_CHECKPOINT_PATH",)),
])
def test_what_is_missing_or_has_no_effect_is_one_error(line, bindings, words):
    arguments = arguments_of(line, *bindings)
    with pytest.raises(InputError) as found:
        getattr(run_config, f"read_{arguments.verb}")(arguments)
        gin_config.build(arguments.verb)
    assert all(word in str(found.value) for word in words), str(found.value)


@pytest.mark.parametrize("flag", ["--steps x", "--learning_rate nan", "--epochs inf", "--kind lroa",
                                  "--output ", "--task "])
def test_a_value_that_is_no_number_or_no_text_is_refused_by_its_flag(flag, capsys):
    with pytest.raises(SystemExit) as ended:
        flags.make_parser().parse_args(["train", *flag.split(" ")])
    assert ended.value.code == 2 and flag.split()[0].strip("-") in capsys.readouterr().err


@pytest.mark.parametrize("file", FILES)
def test_the_macros_of_the_help_are_those_that_gin_reads(file):
    listed = gin_files.macros_of([file, *(["runs/_network.gin"] if "pretrain" in file else [])])
    told = {name: line.value for name, line in listed.items() if not gin_files.REQUIRED.fullmatch(line.value)}
    if "pretrain" in file:
        del told["VOCAB_SIZE"]  # the network's file is read before the run's
    gin_config.parse([file], [f"told_{name} = {value}" for name, value in told.items()])
    read = gin_config.macros()
    assert {name for name in read if not name.startswith("told_")} == listed.keys()
    assert all(read[name] == read[f"told_{name}"] for name in told)


@pytest.mark.parametrize(("words", "shown"), [
    ("train", ["--lora_rank", "gin/experts/lora.gin", "2e-4"]),
    ("train --gin_file=gin/experts/lora.gin", ["LORA_RANK", "'all'", "or some of ('query'", "required"]),
    ("train --kind dataset", ["LEARNING_RATE", "1e-4"]),
    ("pretrain", ["VOCAB_SIZE", "8192"]), ("study", ["gin/studies/demo.gin"]),
    ("study --gin_file gin/studies/roe_xl.gin", ["WORKDIR"]),
    ("train --gin_file experts/promt.gin", ["nearest:\n  experts/prompt.gin"])])
def test_help_lists_macros_in_80_columns(words, shown, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for order in ([*words.split(), "--help"], [words.split()[0], "--help", *words.split()[1:]]):
        with pytest.raises(SystemExit) as ended:
            main.main(order)
        out = capsys.readouterr().out
        assert ended.value.code == 0 and all(word in out for word in shown)
        assert max(map(len, out.splitlines())) <= 80 and out.index(shown[0]) < out.index("example:\n")


def test_help_writes_out_what_a_terminal_would_obey(tmp_path, capsys):
    (tmp_path / "own.gin").write_text("TASK = 't'  # \x1b[31m\n")
    with pytest.raises(SystemExit):
        main.main(["train", "--help", "--gin_file", str(tmp_path / "own.gin")])
    assert "\\x1b[31m" in (out := capsys.readouterr().out) and "\x1b" not in out


def test_each_kind_is_a_file_of_experts():
    assert {path.stem for path in (ROOT / "gin" / "experts").glob("[a-z]*.gin")} == set(TRAIN_KINDS)
