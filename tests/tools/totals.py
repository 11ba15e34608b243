"""Sum up the JUnit files ``MPI-RANKS.xml`` of the test command; fail if 4 ranks were too few for a test.

    python tests/tools/totals.py DIR
"""

import re
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

LARGEST = 4
# What the comm fixture and pytest-mpi's min_size say.
WANT_OF_RANKS = re.compile(r"needs \d+ ranks|requires \d+ MPI processes")


def outcome(case):
    """Return how one test case ended, and the reason if it was skipped."""
    for name in ("failure", "error"):
        if case.find(name) is not None:
            return "failed", ""
    skipped = case.find("skipped")
    return ("passed", "") if skipped is None else ("skipped", skipped.get("message", ""))


def main(directory):
    """Print one line of totals a run; return 1 if a test of the largest runs wanted more ranks."""
    total, starved = Counter(), []
    for path in sorted(Path(directory).glob("*.xml")):
        mpi, ranks = path.stem.split("-")
        cases = [(case, *outcome(case)) for case in ElementTree.parse(path).iter("testcase")]
        counts = Counter(ended for _, ended, _ in cases)
        total += counts
        where = f"{ranks} ranks, {mpi}" if int(ranks) else f"plain, {mpi}"
        print(f"{where:20} {describe(counts)}")
        if int(ranks) == LARGEST:
            starved += [f"{case.get('classname')}.{case.get('name')}: {reason}"
                        for case, _, reason in cases if WANT_OF_RANKS.search(reason)]
    for line in starved:
        print(f"skipped at {LARGEST} ranks for want of ranks: {line}")
    print(f"together {describe(total)}")
    return 1 if starved else 0


def describe(counts):
    """Return the counts as words."""
    return ", ".join(f"{counts[name]} {name}" for name in ("passed", "skipped", "failed"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
