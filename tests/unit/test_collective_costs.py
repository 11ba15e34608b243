"""What collectives cost a plan: as they were measured where their tensors lie; what is said of the choice."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from mpillm import Config
from mpillm.cli.plan import command
from mpillm.errors import ConfigError
from mpillm.machine import Level, Machine, Measured
from mpillm.planner.collective_costs import FORMULAS, collective_s, ring_s, time_s
from mpillm.planner.search import price_layout

POINTS = ((1024.0, 1e-5), (4096.0, 4e-5), (65536.0, 1e-4))
OWN, WINDOW = (Measured("allreduce", in_window, 4, tuple((n, factor * time_s) for n, time_s in POINTS))
               for in_window, factor in ((False, 1), (True, 0.5)))
PLAIN = Level("node", 4, 1e-6, 1e-9)
LEVEL = replace(PLAIN, collectives=(OWN, WINDOW))


@pytest.mark.parametrize("n_bytes, seconds", [(1, 1e-5), (1024, 1e-5), (2560, 2.5e-5), (65536, 1e-4), (131072, 2e-4)])
def test_a_collective_takes_what_was_measured_and_what_lies_between(n_bytes, seconds):
    assert OWN.time_s(4, n_bytes) == pytest.approx(seconds)
    assert OWN.time_s(2, n_bytes / 2) == pytest.approx(seconds / 3)  # a ring of two has a third of the steps
    np.testing.assert_allclose(OWN.time_s(4, np.array([n_bytes, 1024])), [seconds, 1e-5])
    assert OWN.faster(2).time_s(4, n_bytes) == pytest.approx(1e-5 + (min(seconds, 1e-4) - 1e-5) / 2) or n_bytes > 65536


def test_where_tensors_lie_decides_what_they_take():
    for in_window, measured in ((False, OWN), (True, WINDOW)):
        assert collective_s("allreduce", LEVEL, 4, 5000, in_window) == measured.time_s(4, 5000)
        assert collective_s("allreduce", LEVEL, 1, 5000, in_window) == 0
    outside_alone = replace(LEVEL, collectives=(OWN,))
    assert collective_s("allreduce", outside_alone, 4, 5000, in_window=True) == OWN.time_s(4, 5000)
    messages = replace(PLAIN, points=((16.0, 1e-6), (65536.0, 3e-4)))  # as files of earlier probes have them
    for one in (messages, replace(messages, collectives=(OWN,))):
        assert collective_s("allgather", one, 4, 5000, in_window=True) == ring_s(messages, 4, 5000, "allgather")
    fastest = min(time_s("allgather", name, PLAIN, 4, 5000) for name in FORMULAS["allgather"])
    assert collective_s("allgather", PLAIN, 4, 5000) == fastest


@pytest.mark.parametrize("change", [{"ranks": 1}, {"points": []}, {"points": [[0, 1.0]]}, {"points": [[9, 1.0], [8, 2.0]]},
                                    {"points": [[8, 2.0], [9, 1.0]]}, {"points": [[8, -1.0]]}])
def test_measurements_that_make_no_sense_are_refused(tmp_path, change):
    machine = Machine("test", "made up", (LEVEL,), ((32, 1e9),), 1e9, 1e10)
    machine.save(tmp_path / "machine.json")
    assert Machine.load(tmp_path / "machine.json") == machine
    found = json.loads((tmp_path / "machine.json").read_text())
    found["levels"][0]["collectives"][1] |= change
    (tmp_path / "machine.json").write_text(json.dumps(found))
    with pytest.raises(ConfigError, match="measured allreduce among"):
        Machine.load(tmp_path / "machine.json")


SMALL = Config.from_dict({
    "model": {"vocab_size": 64, "hidden_size": 64, "ffn_size": 128, "num_layers": 6, "num_heads": 4, "max_seq_len": 32},
    "train": {"seq_len": 32, "global_batch": 8, "microbatch": 1}, "layout": {"pipeline": 1, "recompute": "none"},
})


def machine(**times_s):
    """Four ranks that share a node; every operation takes the same time for any size, ``op`` or ``op_window``."""
    collectives = tuple(Measured(name.removesuffix("_window"), name.endswith("_window"), 4, ((1.0, seconds), (1e12, seconds)))
                        for name, seconds in times_s.items())
    rows = [(op, "*", "*", None, "ring") for op in ("allreduce", "reduce_scatter", "allgather")]
    rows += [("reduce_scatter", "*", "*", 100_000, "mpi", "window"), ("reduce_scatter", "*", "*", None, "window", "window")]
    return Machine("test", "made up", (replace(PLAIN, collectives=collectives),), ((32, 1e9), (128, 2e9)), 1e9, 1e10, 1e-5,
                   table=tuple(rows))


def test_sums_of_tensor_ranks_take_what_their_own_operation_was_measured_to():
    config = SMALL.with_values({"layout.tensor": 4, "layout.data": 1, "layout.sequence_parallel": False})
    others = {"allreduce_window": 9.0, "reduce_scatter": 9.0, "allgather": 9.0}
    once, twice = (price_layout(config, machine(allreduce=time_s, **others), 4).predicted for time_s in (1e-3, 2e-3))
    forward, backward = (twice["stages"][key][0] - once["stages"][key][0] for key in ("forward_s", "input_s"))
    assert forward == pytest.approx((1 + 2 * 6 + 2) * 1e-3)  # of the embedding one, of a layer two, of the loss two
    assert backward == pytest.approx((2 * 6 + 1) * 1e-3)  # and the gradient of what the head takes
    (one,) = once["activations"]
    assert one == {"operation": "allreduce", "algorithm": "ring", "in_window": False, "n_bytes": 32 * 64 * 4}
    by_tokens = config.with_values({"layout.sequence_parallel": True})
    halves = {"allreduce": 1e-3, "reduce_scatter": 2e-3, "allgather": 4e-3}
    slower, faster = (price_layout(by_tokens, machine(**{op: times * time_s for op, time_s in halves.items()}), 4).predicted
                      for times in (2, 1))
    assert [one["operation"] for one in faster["activations"]] == ["reduce_scatter", "allgather"]
    forward, backward = (slower["stages"][key][0] - faster["stages"][key][0] for key in ("forward_s", "input_s"))
    assert forward == pytest.approx(2e-3 + 2 * 6 * 6e-3 + 2 * 1e-3 + 4e-3)
    assert backward == pytest.approx(4e-3 + 1.25 * 2 * 6 * 6e-3 + 2e-3)


@pytest.mark.parametrize("zero, reduced", [(1, {"reduce_scatter_window"}), (0, {"reduce_scatter_window", "allgather_window"})])
def test_gradients_are_reduced_where_they_lie_and_weights_gathered_outside(zero, reduced):
    config = SMALL.with_values({"layout.tensor": 1, "layout.data": 4, "layout.zero": zero})
    kinds = ("allreduce", "reduce_scatter", "allgather", "reduce_scatter_window", "allgather_window")

    def seconds(**slow):
        predicted = price_layout(config, machine(**dict.fromkeys(kinds, 1e-3) | slow), 4).predicted
        return np.array([predicted["gradients_s"], predicted["update_s"]])

    for kind in kinds:
        wanted = [float(kind in reduced), float(kind == "allgather" and zero == 1)]
        np.testing.assert_allclose(seconds(**{kind: 1.001}) - seconds(), wanted, atol=1e-9)
    small = price_layout(config, machine(reduce_scatter=1.0), 4).predicted["buckets"]
    assert [(one["algorithm"], one["in_window"]) for one in small] == [("ring", False)]  # nobody measured a window
    shared = price_layout(config, machine(reduce_scatter=1.0, reduce_scatter_window=1.0), 4).predicted["buckets"]
    assert [(one["algorithm"], one["in_window"]) for one in shared] == [("window", True)]


def test_the_command_says_by_what_and_where(tmp_path):
    machine(allreduce=1e-3, reduce_scatter=1e-3, reduce_scatter_window=1e-4, allgather=1e-3).save(tmp_path / "machine.json")
    (tmp_path / "small.toml").write_text(SMALL.to_toml())
    words = [str(tmp_path / "small.toml"), "--machine", str(tmp_path / "machine.json"), "--ranks", "4", "--explain",
             "--layout.data", "2", "--layout.tensor", "2"]
    found = CliRunner().invoke(command, words)
    assert found.exit_code == 0, found.exception
    for text in ("MB by window, in a window", "allreduce of 0.008192 MB by ring, in own memory",
                 "reduce_scatter in own memory: ring\n", "reduce_scatter in a window: mpi up to 100 kB, window\n",
                 "bcast          in own memory: mpi\n"):
        assert text in found.output, found.output
    assert "allreduce      in a window" not in found.output  # where it takes what it takes elsewhere
