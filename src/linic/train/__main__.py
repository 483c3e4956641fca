"""`python -m linic.train RECIPE --data DIR --budget 60m`: the loop from a source tree, without the rest."""

import argparse
import sys

from linic.errors import LinicError
from linic.train.command import add_arguments, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m linic.train", description="Train a model within a time budget.")
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except LinicError as error:
        print(f"linic: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
