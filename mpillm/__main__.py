"""The command line: ``python -m mpillm COMMAND``, also installed as ``mpillm``."""

import sys

from mpillm.guard.stop import hold


def main():
    """Run the command line; exit codes are those of :mod:`mpillm.errors`."""
    if next((word for word in sys.argv[1:] if not word.startswith("-")), None) == "train":
        hold()  # before anything that takes time is imported: a request to stop may come at once
    from mpillm.cli.commands import run

    run(sys.argv[1:])


if __name__ == "__main__":
    main()
