"""What a user may ask of a run beside its preset: flags of all trainings."""

import argparse
from dataclasses import dataclass, field

from pipeline.console import InputError
from pipeline.training.checkpoint import Keeping
from pipeline.training.watching import profile, wandb_board


@dataclass(frozen=True)
class Wishes:
    """Nothing, unless it is asked for.

    Args:
        wandb: the project of Weights & Biases that is told of the run.
        profile: updates whose time is taken apart.
        keeping: what becomes of checkpoints.
    """

    wandb: str | None = None
    profile: int = 0
    keeping: Keeping = field(default_factory=Keeping)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``Wishes``."""
    Keeping.add_arguments(parser)
    parser.add_argument(
        "--wandb", metavar="PROJECT", help="tell Weights & Biases too (pip install wandb)"
    )
    parser.add_argument(
        "--profile", type=int, metavar="N", default=0,
        help="take the time of N updates apart, from the fifth on, into profile.json",
    )  # fmt: skip


def of(args: argparse.Namespace) -> Wishes:
    """What the command line asks for.

    Raises:
        InputError: what cannot be had.
    """
    if args.wandb is not None:
        if not args.wandb.strip():
            raise InputError("--wandb is empty; name a project")
        wandb_board.check_installed()
    if not 0 <= args.profile <= profile.MOST:
        raise InputError(f"--profile is {args.profile}; take 1 to {profile.MOST} updates")
    return Wishes(wandb=args.wandb, profile=args.profile, keeping=Keeping.of(args))
