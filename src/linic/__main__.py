"""`python -m linic`: the command line."""
import sys

from linic.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
