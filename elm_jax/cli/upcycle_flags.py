"""The flags of `elm upcycle`."""

import argparse

from elm_jax.workflows.choices import GATES, PERS, RESTS


def add_upcycle_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what is made of what, the settings of the sparse layers, and the rows of the loss."""
    parser.add_argument("--base", required=True, metavar="DIR", help="dense base: a folder of any kind")
    parser.add_argument("--output", required=True, metavar="DIR",
                        help="folder to write; does not exist, or is empty")
    parser.add_argument("--experts", nargs="+", default=[], metavar="DIR",
                        help="full experts of that base (elm train --kind dataset): their feed-forwards "
                        "become the experts, in this order (default: copies of the base's)")
    parser.add_argument("--rest", choices=RESTS, help="with --experts, all other weights: the experts' mean "
                        "(default), or the base's")
    parser.add_argument("--noise", type=float, default=0.0, metavar="S", help="Gaussian noise on the copies, "
                        "S times a kernel's root mean square (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the routers and of the noise (default: 0)")
    _add_sparse(parser)
    _add_loss(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def _add_sparse(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sparse layers")
    group.add_argument("--num_experts", type=int, metavar="E", help="of a layer (default: of --experts)")
    group.add_argument("--experts_per_token", type=int, default=2, metavar="K", help="(default: 2)")
    group.add_argument("--normalize_gates", action=argparse.BooleanOptionalAction, default=False,
                       help="divide a token's K gates by their sum: the upcycled base then computes what the "
                       "dense one does (default: raw probabilities, and a jump of the loss)")
    group.add_argument("--capacity_factor", type=_factor, default=1.25, metavar="F",
                       help="places of an expert while training, as a multiple of an even share; none: no "
                       "token is dropped (default: 1.25)")
    group.add_argument("--step", type=int, default=2, metavar="N",
                       help="one of N layers is sparse (default: 2)")
    group.add_argument("--offset", type=_offset, default="t5x", metavar="t5x|hf|N",
                       help="the first sparse layer: the last of each N, the second, or its number from 0 "
                       "(default: t5x)")
    group.add_argument("--gate", choices=GATES, default=GATES[0], help="what the router reads: the token, "
                       "the task, or both, in which the task counts for nothing at first (default: token)")
    group.add_argument("--tasks", nargs="+", default=[], metavar="NAME",
                       help="with gates that read tasks: tasks or mixtures that get a vector")
    group.add_argument("--per", choices=PERS, help="a vector for each of --tasks (the default), "
                       "or one for all tasks of a data set")
    group.add_argument("--task_dim", type=int, metavar="N", help="width of a task's vector (default: 64)")
    group.add_argument("--dense_sublayer", action=argparse.BooleanOptionalAction, default=False,
                       help="a dense feed-forward behind each sparse one, which adds nothing at first "
                       "(default: no)")


def _add_loss(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "loss at step 0", "of the dense base, and of the sparse one with raw and with normalised gates; "
        "computed with --loss_on only")
    group.add_argument("--loss_on", metavar="TASK", help="a task, whose targets it is of, in nats a token")
    group.add_argument("--rows", type=int, metavar="N",
                       help="a seeded random subset of at most N rows (default: 64)")
    group.add_argument("--split", help="of the task (default: the one that it is scored on)")
    group.add_argument("--source_length", type=int, metavar="S", help="tokens of an input that are kept "
                       "(default: 512)")


def _factor(text: str) -> float | None:
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor none") from None


def _offset(text: str) -> int | str:
    return int(text) if text.isdigit() else text
