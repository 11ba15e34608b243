"""Machines that make no sense are refused by name, in Python and from a file."""

import json

import pytest

from mpillm.errors import ConfigError
from mpillm.machine import PRESETS, Machine


@pytest.mark.parametrize("change, text", [
    ({"levels": []}, "needs levels"), ({"matmul": []}, "needs levels"), ({"memory_bytes": 0}, "must be positive"),
    ({"levels": [{"name": "node", "size": 0, "alpha_s": 0, "beta_s_per_byte": 0}]}, r"sizes of levels \[0\]"),
    ({"levels": [{"name": name, "size": size, "alpha_s": 0, "beta_s_per_byte": 0}
                 for name, size in (("node", 8), ("network", 4))]}, r"\[8, 4\].*ascend"),
    ({"matmul": [[256, 1e12], [64, 1e11]]}, r"\[256, 64\].*ascend"),
    ({"matmul": [[64, 1e11], [64, 1e12]]}, "ascend"), ({"matmul": [[0, 1e11]]}, "positive"),
    ({"speeds": [1.0], "num_ranks": 2}, "each of its 2 ranks"), ({"fans": 3}, "fans"),
])
def test_what_makes_no_sense_is_refused(tmp_path, change, text):
    PRESETS["cpu-node"].save(tmp_path / "good.json")
    good = json.loads((tmp_path / "good.json").read_text())
    (tmp_path / "bad.json").write_text(json.dumps({**good, **change}))
    assert Machine.load(tmp_path / "good.json") == PRESETS["cpu-node"]
    with pytest.raises(ConfigError, match=text):
        Machine.load(tmp_path / "bad.json")
