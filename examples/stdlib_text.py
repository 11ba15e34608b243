"""Real text that every machine has: the Python standard library, and what general compressors make of it.

    python stdlib_text.py DIR              writes the lists DIR/train.txt and DIR/validation.txt
    python stdlib_text.py DIR METRICS      prints bits per byte of a run's metrics.jsonl beside gzip and xz
    python stdlib_text.py DIR METRICS "xz -9, joined"      and leaves with 3 if the run is not below that

Held out are the files whose path below the library, in SHA-256, is a multiple of 20. The compressors are
given the held-out files one by one, and joined into one.
"""

import gzip
import hashlib
import json
import lzma
import sys
import sysconfig
from pathlib import Path

LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages"}
COMPRESSORS = {
    "gzip -9": lambda data: gzip.compress(data, 9),
    "xz -9": lambda data: lzma.compress(data, preset=9),
}


def split_files():
    """Return the lists of files to train on and to hold out."""
    root = Path(sysconfig.get_path("stdlib"))
    train, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not LEFT_OUT & set(name.parts):
            digest = hashlib.sha256(name.as_posix().encode()).hexdigest()
            (train if int(digest, 16) % 20 else held_out).append(path)
    return train, held_out


def compressed(paths):
    """Return bits per byte by the name of the compressor and how the files are given to it."""
    texts = [path.read_bytes() for path in paths]
    joined = b"".join(texts)
    result = {}
    for name, compress in COMPRESSORS.items():
        result[f"{name}, per file"] = 8 * sum(len(compress(text)) for text in texts) / len(joined)
        result[f"{name}, joined"] = 8 * len(compress(joined)) / len(joined)
    return result


def evaluations(metrics_path):
    """Return ``(minutes trained, bits per byte)`` at every evaluation of a run."""
    minutes, found = 0.0, []
    for line in Path(metrics_path).read_text(encoding="utf-8").splitlines():
        step = json.loads(line)
        minutes += step["step_s"] / 60
        if "bits_per_byte" in step:
            found.append((minutes, step["bits_per_byte"]))
    return found


def main(folder, metrics_path=None, target=None):
    """Write the lists, or compare a run with the compressors; return the exit code."""
    folder = Path(folder)
    train, held_out = split_files()
    if metrics_path is None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, paths in (("train", train), ("validation", held_out)):
            (folder / f"{name}.txt").write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
            size = sum(path.stat().st_size for path in paths)
            print(f"{name:10} {len(paths):4} files {size:12,} bytes   listed in {folder / name}.txt")
        return 0
    limits, found = compressed(held_out), evaluations(metrics_path)
    print("bits per byte of the held-out files")
    for name, bits in limits.items():
        print(f"  {name:30} {bits:.3f}")
    for minutes, bits in found:
        print(f"  {f'mpillm after {minutes:.1f} min':30} {bits:.3f}")
    if target is None or (found and found[-1][1] < limits[target]):
        return 0
    print(f"the last is not below {target}")
    return 3


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
