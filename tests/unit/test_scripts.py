"""The scripts that measure for a night, as far as they need no launch."""

import pytest
from layouts import MODELS, candidates

from mpillm.config import Config
from mpillm.machine import PRESETS
from mpillm.plan import Plan
from mpillm.planner.pricing import Pricer, to_config


@pytest.mark.parametrize("name", MODELS)
def test_every_layout_that_is_to_be_measured_can_be_run(name):
    config, machine = Config.from_dict(MODELS[name]), PRESETS["cpu-node"]
    pricer = Pricer(config, machine, 4)
    prices = candidates(pricer, config, 4, machine)
    assert {(p.layout.data, p.layout.pipeline, p.layout.tensor) for p in prices} >= {(1, 2, 2), (2, 1, 2)}
    for price in prices:
        Plan(4, 0, layout=to_config(price, pricer)).applied_to(config).resolve(4)
    fewer = candidates(pricer, config, 4, machine, hopeless=1.1)
    assert 0 < len(fewer) < len(prices) and fewer[0] == prices[0]
