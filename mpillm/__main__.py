"""The command line: ``python -m mpillm COMMAND``, also installed as ``mpillm``."""

import sys

from mpillm.guard.stop import hold


def main():
    """Run the command line; exit codes are those of :mod:`mpillm.errors`."""
    words = sys.argv[1:]
    named = next((word for word in words if not word.startswith("-")), None)
    if named in ("train", "score") or named == "generate" and any(word.startswith("--prompts") for word in words):
        hold()  # before anything that takes time is imported: a request to stop may come at once
    from mpillm.cli.commands import run

    run(words)


if __name__ == "__main__":
    main()
