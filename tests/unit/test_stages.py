"""Where a pipeline is cut unless somebody says: by what the stages compute, embedding and head among it."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from mpillm.config import Config
from mpillm.planner.stages import default_cuts, step_costs

# The model that bench train measures, and one of few tokens a step whose vocabulary outweighs its layers.
BENCH = {"model": {"hidden_size": 512, "ffn_size": 1376, "num_layers": 8, "num_heads": 8, "vocab_size": 8192},
         "train": {"seq_len": 256, "global_batch": 8, "microbatch": 2}}
WORDY = {"model": {"hidden_size": 64, "ffn_size": 172, "num_layers": 16, "num_heads": 4, "vocab_size": 8192},
         "train": {"seq_len": 64, "global_batch": 8, "microbatch": 1}}


def resolved(settings, pipeline, **layout):
    given = {**settings, "layout": {"pipeline": pipeline, **layout}, "data": {"path": "no such file"}}
    return Config.from_dict(given).resolve(pipeline)


def stages(cuts, costs):
    return [sum(costs[start:stop]) for start, stop in pairwise((0, *cuts, len(costs)))]


def test_the_measured_model_has_five_layers_before_three_with_the_head():
    assert default_cuts(resolved(BENCH, 2)) == (5,)


def test_costs_are_in_the_proportions_measured_on_one_core():
    """Milliseconds a step of 2048 tokens: a layer 221; lookup and index_add 1.5, the update of its table 5.3 to 11."""
    costs = step_costs(resolved(BENCH, 2))
    assert costs[1:-1] == costs[1:2] * 6
    assert 0.03 < costs[0] / costs[1] - 1 < 0.06
    assert costs[-1] / costs[1] - 1 == pytest.approx(8192 * 512 / (512 * (4 * 512 + 3 * 1376) + 256 * 512), rel=0.01)


@pytest.mark.parametrize("pipeline", [2, 3, 4])
@pytest.mark.parametrize("settings", [BENCH, WORDY], ids=["bench", "wordy"])
def test_no_other_cuts_have_a_cheaper_costliest_stage(settings, pipeline):
    config = resolved(settings, pipeline)
    costs = step_costs(config)
    best = min(max(stages(cuts, costs)) for cuts in combinations(range(1, len(costs)), pipeline - 1))
    assert max(stages(default_cuts(config), costs)) == pytest.approx(best)


def test_a_heavy_embedding_leaves_layers_to_the_middle():
    first, *middle, last = np.diff([0, *default_cuts(resolved(WORDY, 4)), 16]).tolist()
    assert last < first < min(middle)


def test_cuts_that_were_given_are_kept():
    assert default_cuts(resolved(BENCH, 2, stage_cuts=[1])) == (1,)
    assert len(default_cuts(resolved(BENCH, 2, chunks=2, schedule="interleaved"))) == 3
