"""Machines that make no sense are refused by name, in Python and from a file."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mpillm.errors import ConfigError
from mpillm.machine import PRESETS, Level, Machine
from mpillm.planner.collective_costs import ring_s
from mpillm.planner.messages import play_collective
from mpillm.schedules.generators import make_collective


@pytest.mark.parametrize("change, text", [
    ({"levels": []}, "needs levels"), ({"matmul": []}, "needs levels"), ({"memory_bytes": 0}, "must be positive"),
    ({"levels": [{"name": "node", "size": 0, "alpha_s": 0, "beta_s_per_byte": 0}]}, r"sizes of levels \[0\]"),
    ({"levels": [{"name": name, "size": size, "alpha_s": 0, "beta_s_per_byte": 0}
                 for name, size in (("node", 8), ("network", 4))]}, r"\[8, 4\].*ascend"),
    ({"matmul": [[256, 1e12], [64, 1e11]]}, r"\[256, 64\].*ascend"),
    ({"matmul": [[64, 1e11], [64, 1e12]]}, "ascend"), ({"matmul": [[0, 1e11]]}, "positive"),
    ({"wave": [1]}, "three sizes or none"), ({"elementwise_bytes_per_s": -1.0}, "must not be negative"),
    ({"speeds": [1.0], "num_ranks": 2}, "each of its 2 ranks"), ({"fans": 3}, "fans"),
    ({"levels": [{"name": "node", "size": 8, "alpha_s": 0, "beta_s_per_byte": 0, "gamma_s_per_byte": -1}]},
     "at least zero"),
    ({"levels": [{"name": "node", "size": 8, "alpha_s": 0, "beta_s_per_byte": 0, "points": [[9, 2.0], [3, 3.0]]}]},
     "points .* of level node: .* must ascend"),
    ({"levels": [{"name": "node", "size": 8, "alpha_s": 0, "beta_s_per_byte": 0, "points": [[3, 2.0], [9, 1.0]]}]},
     "must not fall"),
])
def test_what_makes_no_sense_is_refused(tmp_path, change, text):
    PRESETS["cpu-node"].save(tmp_path / "good.json")
    good = json.loads((tmp_path / "good.json").read_text())
    (tmp_path / "bad.json").write_text(json.dumps({**good, **change}))
    assert Machine.load(tmp_path / "good.json") == PRESETS["cpu-node"]
    with pytest.raises(ConfigError, match=text):
        Machine.load(tmp_path / "bad.json")


# A message is slow to grow at first, then fast; adding what arrived costs half as much again as the end's rate.
MEASURED = Level("node", 64, 1e-6, 4e-9, 2e-9, ((16.0, 1e-6), (1024.0, 2e-6), (65536.0, 3e-4)))


@pytest.mark.parametrize("n_bytes, seconds", [
    (1, 1e-6), (16, 1e-6), (520, 1.5e-6), (1024, 2e-6), (33280, 1.51e-4), (65536, 3e-4), (165536, 7e-4)])
def test_messages_take_what_was_measured_and_what_lies_between(n_bytes, seconds):
    assert MEASURED.message_s(n_bytes) == pytest.approx(seconds)
    assert MEASURED.faster(2).message_s(n_bytes) == pytest.approx(1e-6 + (seconds - 1e-6) / 2)
    np.testing.assert_allclose(MEASURED.message_s(np.array([n_bytes, 1024])), [seconds, 2e-6])


@pytest.mark.parametrize("op, sums", [("allreduce", 1), ("reduce_scatter", 1), ("allgather", 0)])
@pytest.mark.parametrize("n_bytes", [4 * 520, 4 * 33280])
def test_a_played_ring_takes_its_formula_with_points_and_adding(op, sums, n_bytes):
    machine = replace(PRESETS["cpu-node"], levels=(MEASURED,))
    played = play_collective(make_collective(op, "ring", 4), machine, n_bytes)
    passes = 2 if op == "allreduce" else 1
    formula = 3 * (passes * MEASURED.message_s(n_bytes / 4) + sums * n_bytes / 4 * 2e-9)
    assert played.total_s == pytest.approx(formula) == pytest.approx(ring_s(MEASURED, 4, n_bytes, op))


def test_a_measured_level_comes_back_from_its_file(tmp_path):
    machine = replace(PRESETS["cpu-node"], levels=(MEASURED,))
    machine.save(tmp_path / "machine.json")
    assert Machine.load(tmp_path / "machine.json") == machine
