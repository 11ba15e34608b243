"""Results in parts: what a kill at any byte leaves, what is refused, what becomes of them."""

import errno
import os
import random

import pytest

from mpillm.errors import ConfigError, DataError
from mpillm.files import to_json
from mpillm.inference.parts import Part, Parts, records

JOB = {"input": "5f" * 32, "temperature": 1.0}


def result(number):
    return {"id": number, "text": "é\n" * (number % 5)}


def line(number):
    return to_json(result(number)).encode() + b"\n"


def write(parts, numbers, replicas=1):
    """Begin a launch and write results, each to the next replica's part."""
    paths = parts.begin(replicas)
    written = [Part(path) for path in paths]
    for i, number in enumerate(numbers):
        written[i % replicas].add(number, result(number))
    for part in written:
        part.close()
    return paths


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def held(parts, lines):
    return [number for number in range(1, lines + 1) if parts.done(lines)[0][number, 2]]


def test_results_of_several_launches_become_one_file_in_order(tmp_path):
    parts = Parts(tmp_path / "out", JOB)
    write(parts, [8, 2, 9], replicas=2)
    write(parts, [1, 4], replicas=3)
    assert held(parts, 9) == [1, 2, 4, 8, 9]
    parts.merge([1, 2, 4, 6, 8, 9], {6: {"id": 6, "line": 6, "error": "why"}})
    assert (tmp_path / "out").read_bytes() == b"".join([
        line(1), line(2), line(4), b'{"id": 6, "line": 6, "error": "why"}\n', line(8), line(9)])
    assert names(tmp_path) == ["out", "out.job"]


def test_a_part_that_ends_at_any_byte_has_the_results_before(tmp_path):
    parts = Parts(tmp_path / "out", JOB)
    path, = write(parts, [3, 1, 2])
    whole, ends = path.read_bytes(), [start + length + 1 for _, start, length in records(path)]
    for stop in range(len(whole) + 1):
        path.write_bytes(whole[:stop])
        assert [number for number, *_ in records(path)] == [0, 3, 1, 2][:sum(end <= stop for end in ends)]
        Parts(tmp_path / "out", JOB).begin(1)[0].unlink()  # whatever is left of the other is no reason to refuse
    path.write_bytes(whole[:-5])
    write(parts, [2])
    parts.merge([1, 2, 3], {})
    assert (tmp_path / "out").read_bytes() == line(1) + line(2) + line(3)


def test_damaged_results_do_not_count(tmp_path):
    parts, draw = Parts(tmp_path / "out", JOB), random.Random(0)
    path, = write(parts, range(1, 6))
    whole = path.read_bytes()
    where = {number: range(start, start + length) for number, start, length in records(path)}
    for _ in range(200):
        place = draw.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1:])
        lost = [number for number, places in where.items() if place in places]
        assert not {*lost} & {number for number, *_ in records(path)}


def test_results_of_another_job_are_refused(tmp_path):
    write(Parts(tmp_path / "out", JOB), [1])
    for job, said in [({**JOB, "temperature": 0.5}, "temperature = 1.0 there, 0.5 now"),
                      ({**JOB, "seed": 3}, "seed = None there, 3 now"),
                      ({**JOB, "input": "1"}, "input = 5f5f5f5f5f5f... there")]:
        with pytest.raises(ConfigError, match=said):
            Parts(tmp_path / "out", job).begin(1)
    assert len(list((tmp_path / "out.parts").iterdir())) == 1


def test_a_file_that_is_there_is_not_replaced(tmp_path):
    (tmp_path / "out").write_text("mine")
    for said in (None, "no JSON", "[]"):
        if said is not None:
            (tmp_path / "out.job").write_text(said)
        with pytest.raises(ConfigError, match="is there already"):
            Parts(tmp_path / "out", JOB).begin(1)
    assert (tmp_path / "out").read_text() == "mine" and names(tmp_path) == ["out", "out.job"]


def test_a_job_that_is_done_is_not_done_again(tmp_path):
    parts = Parts(tmp_path / "out", JOB)
    write(parts, [1])
    parts.merge([1], {})
    assert parts.begin(2) == [] and names(tmp_path) == ["out", "out.job"]
    with pytest.raises(ConfigError, match="temperature = 1.0 there, 2.0 now"):
        Parts(tmp_path / "out", {**JOB, "temperature": 2.0}).begin(1)
    (tmp_path / "out").unlink()
    assert len(Parts(tmp_path / "out", {}).begin(1)) == 1


def test_a_kill_around_the_rename_leaves_a_job_that_can_be_ended(tmp_path, monkeypatch):
    parts = Parts(tmp_path / "out", JOB)
    write(parts, [1, 2])
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            parts.merge([1, 2], {})
    assert (tmp_path / "out").exists()
    write(parts, [])  # the same command again
    parts.merge([1, 2], {})
    assert (tmp_path / "out").read_bytes() == line(1) + line(2) and names(tmp_path) == ["out", "out.job"]


def test_parts_that_were_being_removed_do_not_count(tmp_path):
    write(Parts(tmp_path / "out", JOB), [1, 2])
    (tmp_path / "out.parts").rename(tmp_path / "out.parts.old")
    parts = Parts(tmp_path / "out", {})
    write(parts, [1])
    assert held(parts, 2) == [1] and not (tmp_path / "out.parts.old").exists()


def test_no_file_where_results_are_missing(tmp_path):
    parts = Parts(tmp_path / "out", JOB)
    write(parts, [1, 3])
    with pytest.raises(DataError, match="lacks the results of 2 lines, the first is line 2"):
        parts.merge([1, 2, 3, 4], {})
    assert not (tmp_path / "out").exists() and held(parts, 4) == [1, 3]


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(DataError, match="make its folder first"):
        Parts(tmp_path / "none" / "out", JOB).begin(1)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        Parts(tmp_path / "file" / "out", JOB).begin(1)


def test_a_result_is_written_whole_or_the_error_is_raised(tmp_path, monkeypatch):
    path, = Parts(tmp_path / "out", JOB).begin(1)
    part, write_some, left = Part(path), os.write, [30]

    def write(file, data):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write_some(file, data[:min(7, left[0])])
        left[0] -= count
        return count

    monkeypatch.setattr("os.write", write)
    with pytest.raises(OSError, match="No space"):
        part.add(1, {"text": "x" * 100})
    left[0] = 1000
    assert [number for number, *_ in records(path)] == [0]
