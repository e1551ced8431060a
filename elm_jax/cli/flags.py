"""The flags of every verb. Imports nothing that is slow to import."""

import argparse
from collections.abc import Sequence

import elm_jax
from elm_jax.cli import merge_search_flags, run_flags, run_help, upcycle_flags
from elm_jax.cli.near_words import NearParser
from elm_jax.merging.methods.method_table import METHODS, PARAMETERS
from elm_jax.workflows.choices import (
    ALLOWED,
    CHOICE_SCORES,
    DTYPES,
    EXPERT_KINDS,
    FOLDER_KINDS,
    LAYOUTS,
    MORE_METRICS,
    NONE_PER,
    PERS,
    WRITTEN_FOLDERS,
    WRITTEN_KINDS,
)


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of all verbs; the help of each verb ends with a working example."""
    parser = NearParser(
        prog="elm", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Expert language models: train, route, merge and evaluate per-task T5 experts.",
        epilog="example:\n  elm demo --workdir demo        the whole story on embedded tasks, in minutes")
    parser.add_argument("--version", action="version", version=f"elm {elm_jax.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_runs(verbs)
    _add_farm(verbs)
    _add_library(verbs)
    _add_merge(verbs)
    _add_tools(verbs)
    _add_tasks(verbs)
    _add_base(verbs)
    _add_upcycle(verbs)
    return parser


def _verb(verbs: argparse._SubParsersAction, name: str, summary: str, example: str,
          run: str, aliases: Sequence[str] = ()) -> NearParser:
    """Adds a verb to the parser; `run` is ``module:function`` in `elm_jax.cli`, imported when it runs."""
    parser = verbs.add_parser(name, aliases=list(aliases), help=summary, description=summary,
                              epilog=f"example:\n  {example}",
                              formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(run=run, parser=parser)
    return parser


def _takes_gin(parser: NearParser, files: str) -> None:
    """Adds the flags of gin; `files` says what happens without a gin file."""
    group = parser.add_argument_group("gin", "what else a run can be told: `--gin_file FILE --help` lists it")
    group.add_argument("--gin_file", action="append", metavar="FILE",
                       help=f"gin file; may be given again, later files win ({files})")
    group.add_argument("--gin_search_paths", default="", metavar="DIR,DIR",
                       help="more folders in which gin files are looked up")
    group.add_argument("--gin.NAME", dest="_gin_help", metavar="VALUE",
                       help="binds a macro or a parameter; strings need their own quotes")
    parser.set_defaults(takes_gin=True)


def _add_hosts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes", "one a host; TPU pods, Slurm steps and Open MPI need none of these flags")
    group.add_argument("--coordinator_address", "--coordinator", metavar="HOST:PORT",
                       help="of the first process (default: $ELM_COORDINATOR)")
    group.add_argument("--num_processes", "--process_count", type=int, metavar="N",
                       help="how many there are; 1 for this one alone (default: $ELM_NUM_PROCESSES)")
    group.add_argument("--process_id", "--process_index", type=int, metavar="I",
                       help="number of this one, from 0 (default: $ELM_PROCESS_ID)")


def _prints_table(parser: argparse.ArgumentParser) -> None:
    """Adds the forms of a verb that prints a table; tab-separated where no terminal reads it."""
    forms = parser.add_mutually_exclusive_group()
    _takes_wide(forms)
    forms.add_argument("--json", action="store_true", help="one JSON object on standard output")


def _takes_wide(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--wide", action="store_true",
                        help="all columns, each row on one line, however wide the terminal is")


def _chooses_rows(parser: argparse.ArgumentParser, metavar: str, what: str) -> None:
    parser.add_argument("names", nargs="*", metavar=metavar,
                        help=f"only {what} whose name fits: a glob such as 'ag_*', or a part of the name")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--has_data", action="store_true", default=None, help=f"only {what} that have data")
    data.add_argument("--missing", dest="has_data", action="store_false", default=None,
                      help=f"only {what} that have none")


def _add_runs(verbs: argparse._SubParsersAction) -> None:
    demo = _verb(verbs, "demo", "The whole study on the embedded tasks, with report.",
                 "elm demo --workdir demo", "demo:demo")
    demo.add_argument("--workdir", required=True, metavar="DIR")
    train = _verb(
        verbs, "train", "Trains one expert, the multitask baseline, or a stack of experts.",
        "elm train --task ag_news__classify --base runs/base/base --output runs/ag\n"
        "  elm train --kind lora --task my_task --module my_tasks --base bases/smollm2 \\\n"
        "    --output runs/mine --steps 100 --learning_rate 1e-3", "train:train")
    run_flags.add_run_flags(train, run_flags.TRAIN, kind=True)
    _takes_gin(train, "default: that of --kind, also where FILE binds no run")
    train.more_help = run_help.of_train
    _add_hosts(train)
    _takes_plan(train)
    pretrain = _verb(
        verbs, "pretrain", "Trains a base from raw text: a T5, or the decoder of a file of gin/models/.",
        "elm pretrain --passages corpus.txt --output runs/base\n"
        "  elm pretrain --gin_file gin/models/llama_tiny.gin --vocab_size 8192 \\\n"
        "    --passages corpus.txt --output runs/decoder", "pretrain:pretrain")
    run_flags.add_run_flags(pretrain, run_flags.PRETRAIN)
    _takes_gin(pretrain, "default: gin/runs/pretrain.gin, also where FILE binds no run")
    pretrain.more_help = run_help.of_pretrain
    _add_hosts(pretrain)
    study = _verb(
        verbs, "study", "Trains, builds, routes, merges, evaluates and reports; resumable.",
        "ELM_DATA_DIR=data elm study --gin_file gin/studies/p3_small.gin --output p3",
        "study:study")
    run_flags.add_run_flags(study, run_flags.STUDY)
    _takes_gin(study, "one of gin/studies/, or your own")
    study.more_help = run_help.of_study
    _takes_plan(study)
    _add_hosts(study)


def _add_farm(verbs: argparse._SubParsersAction) -> None:
    farm = verbs.add_parser("farm", help="Experts trained by many workers: init, work, status, retry.")
    actions = farm.add_subparsers(dest="action", required=True, metavar="ACTION")
    init = _verb(actions, "init", "Makes a farm of a table of experts (JSON lines or CSV), or adds to one.",
                 "elm farm init --dir farm --table experts.csv --base runs/base/base", "farm:farm_init")
    init.add_argument("--table", metavar="FILE", help="columns: task, expert_id, gin_file, and gin macros or "
                      "parameters; without it the config is a study's, whose experts are farmed")
    init.add_argument("--runs", metavar="DIR", help="folder of their runs (default: runs/ in the farm)")
    run_flags.add_run_flags(init, run_flags.FARM, kind=True)
    _takes_gin(init, "default: that of --kind; with a study's, --table is left out")
    init.more_help = run_help.of_train
    work = _verb(actions, "work", "One worker: trains experts that nobody works on until none is left.",
                 "elm farm work --dir farm", "farm:farm_work")
    work.add_argument("--lease_seconds", type=float, default=120.0, metavar="S",
                      help="a worker that is silent for so long is taken for dead (default: 120)")
    work.add_argument("--wait", action=argparse.BooleanOptionalAction, default=True,
                      help="wait for what others train, in case they die (default: wait)")
    work.add_argument("--max_experts", type=int, metavar="N", help="train at most so many")
    work.add_argument("--poll_seconds", type=float, default=5.0, metavar="S")
    work.add_argument("--mesh_data", type=int, help="instead of what the configs say")
    work.add_argument("--mesh_model", type=int, help="instead of what the configs say")
    _add_hosts(work)
    status = _verb(actions, "status", "Where every expert stands; exit status 1 if one was given up.",
                   "elm farm status --dir farm", "farm:farm_status")
    status.add_argument("--lease_seconds", type=float, default=120.0, metavar="S")
    _prints_table(status)
    retry = _verb(actions, "retry", "Lets experts that were given up be tried again.",
                  "elm farm retry --dir farm ag_news__classify", "farm:farm_retry")
    retry.add_argument("experts", nargs="*", metavar="ID", help="default: all that were given up")
    for parser in (init, work, status, retry):
        parser.add_argument("--dir", required=True, metavar="FARM", help="folder that all workers share")
    for parser in (work, status, retry):
        parser.add_argument("--attempts", type=int, default=3, metavar="N",
                            help="tries of an expert before it is given up (default: 3)")


def _takes_plan(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a plan in place of a run")
    group.add_argument("--plan", action="store_true",
                       help="train nothing: compile the step for --topology and print what it needs")
    group.add_argument("--topology", metavar="CHIP:SHAPE",
                       help="slice to plan for: v5e:4x4, v4:2x2x4, v5p:2x2x2, h200:8")
    group.add_argument("--json", action="store_true", help="the plan as one JSON object")


def _add_modules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--module", action="append", metavar="NAME",
                        help="task registry to import, also from the current folder; may be given again "
                        "(default: elm_jax.tasks and elm_jax.tasks.embedded)")


def _add_data(parser: argparse.ArgumentParser) -> None:
    _add_modules(parser)
    parser.add_argument("--prepared", metavar="DIR", help="folder of prepared arrays (no TensorFlow needed)")


def _add_stacks(parser: argparse._ActionsContainer, experts: int) -> None:
    parser.add_argument("--stack_experts", type=int, default=experts, metavar="E",
                        help=f"score so many experts of one shape in one program (default: {experts})")
    parser.add_argument("--mesh_data", type=int, default=-1)
    parser.add_argument("--mesh_model", type=int, default=1)
    parser.add_argument("--mesh_experts", type=int, default=1,
                        help="over so many parts of the mesh a stack of experts is split (default: 1)")


def _add_library(verbs: argparse._SubParsersAction) -> None:
    library = verbs.add_parser(
        "library", help="The expert library: build, add, remove, list, calibrate, verify, report.")
    actions = library.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = _verb(actions, "build", "Builds a library of finished experts.",
                  "elm library build --library lib --base runs/base/base runs/*/expert",
                  "library:library_build")
    add = _verb(actions, "add", "Adds experts to a library.",
                "elm library add --library lib --base runs/base/base runs/new/expert",
                "library:library_add")
    remove = _verb(actions, "remove", "Removes experts by their ids.",
                   "elm library remove --library lib ag_news__classify", "library:library_remove")
    listing = _verb(actions, "list", "Lists the experts of a library.",
                    "elm library list --library lib", "library:library_list")
    verify = _verb(actions, "verify", "Reads every expert and key back and checks them.",
                   "elm library verify --library lib", "library:library_verify")
    calibrate = _add_calibrate(actions)
    _add_library_report(actions)
    for parser in (build, add, remove, listing, verify, calibrate):
        parser.add_argument("--library", required=True, metavar="DIR")
    for parser in (build, add):
        parser.add_argument("--base", required=True, metavar="DIR", help="base of the experts")
        parser.add_argument("--seed", type=int, default=0, help="of the draw of instances")
        parser.add_argument("experts", nargs="+", metavar="EXPERT_DIR")
        _add_data(parser)
    build.add_argument("--instances", type=int, default=100, metavar="S",
                       help="training instances of each expert, its keys (default: 100)")
    build.add_argument("--means", type=int, metavar="S", help="keep S means of them as keys, 1 to 10, and no "
                       "training text")
    build.add_argument("--text_format", default="choice_instance")
    build.add_argument("--encoder", default="auto", help="auto, minilm or tfidf")
    remove.add_argument("experts", nargs="+", metavar="ID")
    _prints_table(listing)
    listing.add_argument("experts", nargs="*", metavar="NAME",
                         help="only those whose id fits: a glob such as 'ag_*', or a part of the id")
    verify.add_argument("--json", action="store_true", help="one JSON object on standard output")


def _add_calibrate(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:
    calibrate = _verb(
        actions, "calibrate", "Says how general experts are, for routers with priors (elm route --router).",
        "elm library calibrate --library lib --base runs/base/base\n"
        "  elm library calibrate --library lib --results results/results.jsonl",
        "library:library_calibrate")
    source = calibrate.add_mutually_exclusive_group(required=True)
    source.add_argument("--results", metavar="FILE", help="scores of all experts on all tasks: results of "
                        "`elm evaluate`, their folder, or a study's")
    source.add_argument("--base", metavar="DIR", help="base of the experts: scores them on it, on tasks that "
                        "they were trained on, into LIBRARY/calibration; what is there is not scored again")
    calibrate.add_argument("--task", action="append", default=[], metavar="NAME",
                           help="task or mixture that counts; may be given again (default: all of the "
                           "results; with --base one task of each data set that experts were trained on)")
    scoring = calibrate.add_argument_group("scoring, with --base")
    scoring.add_argument("--rows", type=int, default=32, metavar="N",
                         help="a seeded random subset of at most N rows a task (default: 32)")
    scoring.add_argument("--tasks_per_dataset", type=int, default=1, metavar="N",
                         help="so many tasks of each data set (default: 1)")
    scoring.add_argument("--source_length", type=int, default=512)
    scoring.add_argument("--max_new_tokens", type=int, default=128)
    _add_stacks(scoring, 16)
    _add_data(calibrate)
    _prints_table(calibrate)
    return calibrate


def _add_library_report(actions: argparse._SubParsersAction) -> None:
    report = _verb(actions, "report", "Writes a page about a library: experts, scores, routing between them.",
                   "elm library report lib --results results/results.jsonl", "library:library_report_page")
    report.add_argument("library", metavar="LIBRARY", help="its folder")
    report.add_argument("--output", metavar="FILE",
                        help="the page, FILE.html; Markdown and a picture go beside it (default: report.html "
                             "in the library)")
    report.add_argument("--results", action="append", default=[], metavar="FILE",
                        help="results with the experts' scores; may be given again (default: those beside "
                             "the library)")
    report.add_argument("--verify", action="store_true",
                        help="read every expert's weights and compare them with their fingerprints")


def _add_merge(verbs: argparse._SubParsersAction) -> None:
    merge = _verb(verbs, "merge", "Merges experts, or whole checkpoints of any network in safetensors.",
                  "elm merge --method mean --weights 0.5,0.5 --output merged runs/a/expert runs/b/expert\n"
                  "  elm merge --config merge.yaml --output merged        mergekit's own schema\n"
                  "  elm merge --search gradient --base runs/base/base --task trec__trec1 --output merged "
                  "\\\n    runs/a/expert runs/b/expert                       weights found on 32 instances",
                  "merge:merge")
    merge.add_argument("models", nargs="*", metavar="DIR",
                       help="experts of one base; or checkpoints (safetensors, elm, T5X)")
    merge.add_argument("--output", metavar="DIR", help="appears when it is whole; a killed run goes on")
    merge.add_argument("--config", metavar="FILE", help="a merge in mergekit's YAML schema")
    merge.add_argument("--method", choices=sorted(METHODS), help="see `elm methods` (default: mean)")
    merge.add_argument("--weights", metavar="W,W,...",
                       help="one a folder; of a library also votes or similarity")
    merge.add_argument("--pattern", action="append", default=[], metavar="PART=W,W,...",
                       help="other weights for leaves with this in their name; may be given again")
    merge.add_argument("--base", metavar="DIR", help="for methods on differences from it")
    for each in PARAMETERS.values():
        merge.add_argument(f"--{each.name}", metavar="X", help=f"{each.help} ({each.range})"
                           + ("; one for all, or one a folder" if each.per_expert else ""))
    merge.add_argument("--dtype", choices=DTYPES, help="of the result (default: the inputs')")
    merge.add_argument("--to", dest="target", choices=sorted(WRITTEN_KINDS),
                       help="form of a whole model's result (default: the inputs')")
    merge.add_argument("--allow", action="append", default=[], choices=sorted(ALLOWED),
                       help="a difference that is no error; may be given again")
    merge.add_argument("--lora_rank", type=int, metavar="R", help="of merged LoRA updates (default: exact)")
    merge.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="of a file of weights")
    merge.add_argument("--workers", type=int, metavar="N", help="threads (default: one a core, at most 8)")
    merge.add_argument("--dry_run", "--dry-run", action="store_true",
                       help="print leaves, sizes, bytes and memory; write nothing")
    _prints_table(merge)
    merge.add_argument("--id", metavar="NAME", help="name of the merged expert")
    merge.add_argument("--library", metavar="DIR", help="merge the best experts of a library for --task")
    merge.add_argument("--task", metavar="NAME")
    merge.add_argument("--top_k", type=int, default=3, metavar="K")
    merge.add_argument("--queries", type=int, metavar="Q",
                       help="of --task (default: 32, or as many as there are)")
    _add_data(merge)
    merge_search_flags.add_search_flags(merge)
    listing = _verb(verbs, "methods", "Lists the merging methods: what they compute, need and take.",
                    "elm methods", "methods:list_methods")
    _prints_table(listing)


def _add_tools(verbs: argparse._SubParsersAction) -> None:
    route = _verb(verbs, "route", "Which expert of a library suits a task.",
                  "elm route --library lib --task super_glue_rte__can_we_infer --queries 32 --top_k 3",
                  "route:route")
    route.add_argument("--library", required=True, metavar="DIR")
    target = route.add_mutually_exclusive_group()
    target.add_argument("--task", metavar="NAME", help="registered task")
    target.add_argument("--examples", metavar="FILE", help='JSON lines with a field "inputs"')
    route.add_argument("--instruction", metavar="TEXT", help="what the task is, in place of queries")
    route.add_argument("--split", default="validation", help="of the task (default: validation)")
    route.add_argument("--queries", type=int, metavar="Q", help="instances of the task that are used; 0: "
                       "its template alone (default: 32, or as many as there are)")
    route.add_argument("--router", metavar="NAME", help="vote, centroid, prior, ...; all compares them "
                       "(default: labelled with --labelled; else prior+nearest if the library has priors; "
                       "else vote, or centroid at --queries 0)")
    route.add_argument("--per_row", action="store_true", help="a decision for each query by itself")
    route.add_argument("--labelled", metavar="FILE", help='JSON lines with "inputs", "choices", "targets": '
                       "on them the router `labelled` scores the likely experts")
    route.add_argument("--base", metavar="DIR", help="of the experts, to score them (default: the one that "
                       "their cards name)")
    route.add_argument("--dataset", metavar="NAME", help="that priors leave out, of a task that is not "
                       "registered")
    route.add_argument("--family", metavar="NAME", help="whose data sets they leave out")
    route.add_argument("--none_of_these", action="store_true", help="say whether any expert fits")
    route.add_argument("--top_k", type=int, default=3, metavar="K",
                       help="experts that are chosen (default: 3)")
    route.add_argument("--encoder_dir", metavar="DIR", help="folder of the encoder's weights")
    route.add_argument("--seed", type=int, default=0)
    _prints_table(route)
    _add_data(route)
    _add_generate(verbs)
    evaluate = _verb(
        verbs, "evaluate", "Scores a base and experts on tasks: accuracy by rank, ROUGE-L.",
        "elm evaluate --base runs/base/base --expert runs/ag/expert --task ag_news__classify "
        "--output results/results.jsonl", "evaluate:evaluate")
    evaluate.add_argument("--base", required=True, metavar="DIR")
    evaluate.add_argument("--expert", action="append", default=[], metavar="DIR",
                          help="expert; may be given again; none scores the base itself")
    evaluate.add_argument("--task", action="append", required=True, metavar="NAME",
                          help="task or mixture; may be given again")
    evaluate.add_argument("--output", required=True, metavar="FILE", help="results.jsonl")
    evaluate.add_argument("--split", help="of every task (default: validation, or the only one a task has)")
    evaluate.add_argument("--max_rows", type=int, metavar="N",
                          help="a seeded random subset of at most N rows a task (default: all rows)")
    evaluate.add_argument("--source_length", type=int, default=512)
    evaluate.add_argument("--few_shot", type=int, default=0, metavar="K",
                          help="put K rows of each task's train split (other rows of a task without) with "
                          "answers before every input, as far as --source_length allows (default: 0)")
    evaluate.add_argument("--max_new_tokens", type=int, default=128)
    evaluate.add_argument("--choice_score", choices=CHOICE_SCORES, default="sum",
                          help="a choice's score: the sum of its tokens' log-probabilities, or their mean "
                          "(default: sum)")
    evaluate.add_argument("--metric", action="append", default=[], choices=MORE_METRICS,
                          help="score by this too; may be given again (a task may name some of its own)")
    _add_stacks(evaluate, 1)
    evaluate.add_argument("--trunk_cache", metavar="DIR", help="keep the inputs' states below the experts' "
                          "lowest layer, and compute them once for all experts (see ADAPTER_LAYERS)")
    _takes_wide(evaluate)
    evaluate.add_argument("--trunk_cache_bytes", type=int, metavar="N",
                          help="most bytes of that folder (default: 16 GiB)")
    _add_mixed(evaluate)
    _add_data(evaluate)
    _add_hosts(evaluate)
    _add_convert(verbs)
    report = _verb(verbs, "report", "Writes a report of any results of `elm evaluate`, or a study's again.",
                   "elm report results/results.jsonl\n  elm report demo/results", "report:report")
    report.add_argument("results", metavar="RESULTS", help="folder of results, or a file of them")
    report.add_argument("--experts", action="append", default=[], metavar="DIR",
                        help="folder of an expert, of a run, or of several, to show their cards and learning "
                             "curves; may be given again (default: those near the results)")


def _add_generate(verbs: argparse._SubParsersAction) -> None:
    generate = _verb(
        verbs, "generate", "Asks a base or experts: prints what they say to your own text.",
        "elm generate --expert runs/ag/expert 'Which section of a newspaper is this in? ...'\n"
        "  elm generate --library lib --examples questions.jsonl --json\n"
        "  elm generate --base runs/base/base                  each line that you type is answered",
        "generate:generate")
    generate.add_argument("texts", nargs="*", metavar="TEXT", help="a text to answer; none of these, in a "
                          "terminal: what you type")
    generate.add_argument("--examples", metavar="FILE", help='JSON lines with a field "inputs"')
    generate.add_argument("--task", metavar="NAME", help="a task's first rows, as it renders them")
    generate.add_argument("--gate_task", metavar="NAME", help="the task that a sparse base's gates read, if "
                          "they do (default: that of --task)")
    generate.add_argument("--split", help="of the task (default: the one that it is scored on)")
    generate.add_argument("--rows", type=int, metavar="N", help="of the task (default: 3)")
    generate.add_argument("--base", metavar="DIR", help="default: the one that the experts' cards name")
    generate.add_argument("--expert", action="append", default=[], metavar="DIR",
                          help="expert; may be given again, each answers; none asks the base itself")
    generate.add_argument("--library", metavar="DIR", help="the expert to which it is routed answers")
    generate.add_argument("--router", metavar="NAME", help="of the library (default: as `elm route`'s)")
    _add_none_of_these(generate, "question")
    generate.add_argument("--encoder_dir", metavar="DIR", help="folder of the weights of its encoder")
    generate.add_argument("--max_new_tokens", type=int, default=128, metavar="N",
                          help="most tokens of an answer (default: 128)")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T",
                          help="draw tokens, from logits divided by T (default: 0, the likeliest token)")
    generate.add_argument("--top_k", type=int, metavar="K", help="draw from the K likeliest tokens")
    generate.add_argument("--top_p", type=float, metavar="P",
                          help="draw from the likeliest tokens that together have probability P")
    generate.add_argument("--seed", type=int, metavar="S", help="of the draws (default: 0)")
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT",
                          help="an answer ends before this text; may be given again")
    generate.add_argument("--chat", action=argparse.BooleanOptionalAction, default=None,
                          help="frame texts by the base's chat template (default: free texts to a base that "
                          "has one; to experts as their cards say)")
    generate.add_argument("--json", action="store_true", help="one JSON object on standard output")
    _add_modules(generate)


def _add_none_of_these(verb: argparse._ActionsContainer, one: str) -> None:
    verb.add_argument("--none_of_these", metavar="WHO", help=f"answers a {one} that no expert of the library "
                      "fits: base, an expert's id in the library, or an expert's folder")
    verb.add_argument("--none_per", choices=NONE_PER, help=f"whether none fits is told of each {one} by "
                      "itself, or of all of a task together (default: row)")


def _add_mixed(evaluate: argparse.ArgumentParser) -> None:
    group = evaluate.add_argument_group(
        "each row by its own expert", "elm evaluate --base B --mixed --library LIB --task T --output FILE")
    group.add_argument("--mixed", action="store_true",
                       help="score each row by one of many experts, which have adapters of one shape")
    group.add_argument("--library", metavar="DIR",
                       help="each row is routed by itself")
    group.add_argument("--router", metavar="NAME", help="of the library (default: as `elm route`'s)")
    _add_none_of_these(group, "row")
    group.add_argument("--assignment", metavar="FILE",
                       help='or as JSON lines say, {"index": row, "expert": id}: by one of the --expert '
                       'folders; with several tasks a line names its "task"')
    group.add_argument("--id", metavar="NAME",
                       help="of the results (default: mixed: and the library's or file's name)")


def _add_convert(verbs: argparse._SubParsersAction) -> None:
    convert = _verb(
        verbs, "convert", "Converts models and experts between this program, Hugging Face, T5X and PEFT.",
        "elm convert --from hf --to elm models/t5-v1_1-small bases/t5-v1_1-small --verify",
        "convert:convert")
    convert.add_argument("--from", dest="source_kind", required=True, choices=FOLDER_KINDS,
                         help="kind of SRC")
    convert.add_argument("--to", dest="target_kind", required=True, choices=WRITTEN_FOLDERS,
                         help="kind of DST")
    convert.add_argument("source", metavar="SRC", help="folder of a model or of an expert; or a hub name")
    convert.add_argument("target", metavar="DST", help="folder to write; does not exist, or is empty")
    convert.add_argument("--base", metavar="DIR", help="base of an expert (default: the one that it names); "
                         "with it, a T5X run comes in as an expert")
    convert.add_argument("--id", metavar="NAME", help="name of the expert (default: its own)")
    convert.add_argument("--kind", choices=EXPERT_KINDS,
                         help="of the expert that a T5X run trained (default: as its tasks tell)")
    convert.add_argument("--dtype", choices=DTYPES, help="cast to this type (default: as it lies on disk)")
    convert.add_argument("--max_shard_size", default="5GB", metavar="SIZE",
                         help="most bytes of one file of weights, for hf: 5GB, 500MB (default: 5GB)")
    convert.add_argument("--layout", default="orbax", choices=LAYOUTS,
                         help="of a T5X checkpoint to write; zarr is the older one (default: orbax)")
    convert.add_argument("--scanned", action=argparse.BooleanOptionalAction, default=None,
                         help="layers are stacked (scalable T5) in the T5X checkpoint to write, else in SRC "
                         "(default: as they lay in T5X)")
    convert.add_argument("--step", type=int, metavar="N", help="of a T5X checkpoint to write")
    convert.add_argument("--experts_per_token", type=int, metavar="K", help="of a T5X checkpoint with "
                         "experts (default: what config.gin beside it says, or 1)")
    convert.add_argument("--vocabulary", metavar="FILE", help="vocabulary for a source without one: a "
                         "SentencePiece model, tokenizer.json, or vocabulary.json of bytes")
    convert.add_argument("--verify", action="store_true",
                         help="compare the logits of SRC and DST; status 1 above 1e-4, or 2e-5 of the "
                         "largest logit (holds a whole model)")
    convert.add_argument("--json", action="store_true", help="the report on standard output")
    _add_modules(convert)


def _add_base(verbs: argparse._SubParsersAction) -> None:
    base = verbs.add_parser("base", help="Bases of models that Python packages ship: get, list.")
    actions = base.add_subparsers(dest="action", required=True, metavar="ACTION")
    get = _verb(actions, "get", "Makes a base of an installed package's model; downloads nothing.",
                "elm base get smollm2 bases/smollm2", "base:base_get")
    get.add_argument("name", metavar="NAME", help="as `elm base list` shows")
    get.add_argument("target", nargs="?", metavar="DIR",
                     help="folder to write; does not exist, or is empty (default: bases/NAME)")
    listing = _verb(actions, "list", "Lists these models, and how to install them.", "elm base list",
                    "base:base_list")
    get.add_argument("--json", action="store_true", help="one JSON object on standard output")
    _prints_table(listing)


def _add_embed(actions: argparse._SubParsersAction) -> None:
    embed = _verb(
        actions, "embed", "Gives tasks vectors that the gates of a sparse base read.",
        "elm tasks embed --base bases/moe --output bases/task_moe ag_news trec   a first table\n"
        "  elm tasks embed --base runs/multitask --output bases/with_rte --from text super_glue_rte",
        "tasks:embed")
    embed.add_argument("names", nargs="+", metavar="NAME", help="tasks or mixtures without a vector")
    embed.add_argument("--base", required=True, metavar="DIR", help="a sparse base, or a full expert of one")
    embed.add_argument("--output", required=True, metavar="DIR", help="folder of the new base")
    embed.add_argument("--from", dest="made_of", metavar="WAY", help="mean of the known vectors (default); "
                       "text: by likeness of templates; votes: of a --library; TASK=WEIGHT,...; of a first "
                       "table random (default) or text")
    embed.add_argument("--library", metavar="DIR", help="whose votes count, with --from votes")
    embed.add_argument("--encoder", help="of texts: auto, minilm or tfidf (default: auto)")
    embed.add_argument("--temperature", type=float, metavar="X",
                       help="of the softmax over likenesses of texts (default: 0.1)")
    embed.add_argument("--task_dim", type=int, metavar="N", help="width of a first table (default: 64)")
    embed.add_argument("--seed", type=int, metavar="N", help="of a first table (default: 0)")
    embed.add_argument("--per", choices=PERS, default="task",
                       help="a vector for each task, or one for all tasks of a data set (default: task)")
    embed.add_argument("--json", action="store_true", help="one JSON object on standard output")
    _add_modules(embed)


def _add_upcycle(verbs: argparse._SubParsersAction) -> None:
    upcycle = _verb(
        verbs, "upcycle", "Makes a sparse base of a dense one, or of its full experts.",
        "elm upcycle --base runs/base/base --output bases/sparse --num_experts 8\n"
        "  elm upcycle --base runs/base/base --output bases/mixed --experts runs/a/expert runs/b/expert",
        "upcycle:upcycle")
    upcycle_flags.add_upcycle_flags(upcycle)
    _add_modules(upcycle)


def _add_tasks(verbs: argparse._SubParsersAction) -> None:
    tasks = verbs.add_parser("tasks", help="Registered tasks: list, show, stats, cache, embed, check.")
    actions = tasks.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = _verb(actions, "list", "Lists tasks and mixtures.",
                    "elm tasks list --role train --category sentiment", "tasks:list_tasks")
    for fact, text in (("role", "train, unseen, generative, bigbench, bbh, ..."),
                       ("dataset", "as ag_news, super_glue_rte"), ("category", "as sentiment"),
                       ("kind", "rank or generation")):
        listing.add_argument(f"--{fact}", metavar=fact.upper(), help=f"only tasks of this {fact}: {text}")
    show = _verb(actions, "show", "Rows of a task as prompts, and what its lengths cut off.",
                 "elm tasks show ag_news__classify --rows 2 --base runs/base/base", "tasks:show")
    show.add_argument("name", metavar="NAME")
    show.add_argument("--split", help="default: validation, or the only one a task has")
    show.add_argument("--rows", type=int, default=3)
    show.add_argument("--base", metavar="DIR", help="count tokens in this base's vocabulary")
    stats = _verb(actions, "stats", "Instances, dropped rows, token lengths, and what the lengths cut off.",
                  "elm tasks stats --base runs/base/base ag_news__classify super_glue_rte",
                  "tasks:stats")
    cache = _verb(actions, "cache", "Renders and tokenises tasks once, into arrays.",
                  "elm tasks cache --base runs/base/base --prepared arrays --num_workers 8 trec",
                  "tasks:cache", aliases=["prepare"])
    _takes_wide(cache)
    cache.add_argument("--num_workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    for parser in (stats, cache):
        parser.add_argument("names", nargs="*", metavar="NAME",
                            help="tasks and mixtures; none: all that there are data for")
        parser.add_argument("--base", required=True, metavar="DIR", help="whose vocabulary is used")
        parser.add_argument("--split", action="append",
                            help="may be given again; default: all that a task has")
        parser.add_argument("--max_rows", type=int, help="a seeded random subset of at most N rows (for "
                            "scoring; training reads whole splits)")
        _add_data(parser)
    for parser in (show, stats):
        parser.add_argument("--source_length", type=int, metavar="S",
                            help="tokens of an input that are kept (default: of the task's recipe, else 512)")
        parser.add_argument("--target_length", type=int, metavar="T",
                            help="tokens of a target that are kept (default: of the task's recipe, else 128)")
    _add_embed(actions)
    check = _verb(actions, "check", "Which data sets are there and whole, and how to get the others.",
                  "ELM_DATA_DIR=data elm tasks check", "tasks:check")
    for parser in (listing, show, check):
        _add_modules(parser)
    _chooses_rows(listing, "NAME", "tasks")
    _chooses_rows(check, "DATASET", "data sets")
    for parser in (listing, stats, check):
        _prints_table(parser)
    show.add_argument("--json", action="store_true", help="one JSON object on standard output")
