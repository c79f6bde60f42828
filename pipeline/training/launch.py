"""What the commands of all trainings share: their flags, and the way from them to a run."""

import argparse
from typing import Any

from pipeline.console import a_path
from pipeline.data.sets import BLOCK_HELP, MIX_HELP
from pipeline.training import loop, processes, wishes
from pipeline.training.engines.zero import make_engine
from pipeline.training.wishes import Wishes


def parser_of(module: str, text: str | None, *, presets: str, data: str) -> argparse.ArgumentParser:
    """The flags that all trainings have.

    Args:
        module: the command.
        text: of --help, kept as it is.
        presets: those that it takes.
        data: what it learns from, and the command that makes it.
    """
    parser = argparse.ArgumentParser(
        prog=module, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", required=True, help=f"{presets} or FILE.py:FUNCTION")
    parser.add_argument("--data", required=True, nargs="+", help=data)
    parser.add_argument("--mix", nargs="+", type=int, metavar="W", help=MIX_HELP)
    parser.add_argument("--block-order", action="store_true", help=BLOCK_HELP)
    parser.add_argument("--out", required=True, type=a_path)
    parser.add_argument("--deepspeed_config", help="JSON of ds_configs/; without: plain PyTorch")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
    wishes.add_arguments(parser)
    return parser


def launch(stage: loop.Stage[Any], args: argparse.Namespace, wished: Wishes) -> None:
    """Train ``stage`` in this process, alone or a rank of the deepspeed launcher, and end it.

    Args:
        stage: what is learned.
        args: of ``parser_of``.
        wished: of ``wishes.of``, which complains before a stage has been made.
    """
    with processes.others():
        engine = make_engine(stage.build, stage.run, args.deepspeed_config)
        processes.leave(loop.train(stage, engine, args.out, wished))
