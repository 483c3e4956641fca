"""`linic train RECIPE --data ... --budget ...`: the arguments and the work are the room's own."""
import argparse

from linic.app.cli import common
from linic.train import command


def arguments(parser: argparse.ArgumentParser) -> None:
    command.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    with common.about(str(args.recipe)):
        return command.run(args)
