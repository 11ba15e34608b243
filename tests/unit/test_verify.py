"""The command: its exit code and what it says, with and without tokens, and with a fault planted."""

from pathlib import Path

import pytest
import tomli_w
from helpers import run_mpi
from tiny import MODEL, TRAIN, tiny, write_token_file

from mpillm.errors import ConfigError
from mpillm.verify.compare import all_layouts

pytestmark = [pytest.mark.launches, pytest.mark.slow]

LEARNS_TOO_FAST = """
from mpillm import __main__
from mpillm.train.engine import Engine
train_step = Engine.train_step
Engine.train_step = lambda self, samples, lr, **more: train_step(self, samples, 1.001 * lr, **more)
__main__.main()
"""


@pytest.fixture
def folder(tmp_path):
    """A configuration that leaves the vocabulary to the data, as the quickstart's does."""
    model = {key: value for key, value in MODEL.items() if key != "vocab_size"} | {"num_layers": 2}
    train = TRAIN | {"warmup_steps": 0}  # from the first step on the learning rate is not zero
    (tmp_path / "config.toml").write_text(tomli_w.dumps({"model": model, "train": train}))
    return tmp_path


def verify(folder, ranks, program=("-m", "mpillm"), *more):
    return run_mpi(ranks, [*program, "verify", "config.toml", "--steps", "1", *more], cwd=folder)


def test_without_a_file_of_tokens(folder):
    job = verify(folder, 2)
    assert job.returncode == 0 and "1 layouts of 2 ranks, 1 steps: 0 differ" in job.stdout, job.stdout + job.stderr


def test_the_vocabulary_is_that_of_the_data(folder):
    write_token_file(folder / "tokens.h5", vocab_size=300)
    job = verify(folder, 0, ("-m", "mpillm"), "--all-layouts")
    assert job.returncode == 0 and "3 layouts of 1 ranks, 1 steps: 0 differ" in job.stdout, job.stdout + job.stderr


def test_a_planted_fault(folder):
    job = verify(folder, 2, ("-c", LEARNS_TOO_FAST))
    assert job.returncode == 17, job.stderr
    assert "DIFFERS data=2" in job.stdout and "step 1: weight of head.weight" in job.stdout, job.stdout


def test_data_pipeline_and_tensor_all_above_one():
    """Against the serial reference, and the bits of one rank."""
    job = run_mpi(8, [Path(__file__).parents[1] / "eight.py"], timeout=180)
    assert job.returncode == 0 and job.stdout.count("agrees ") == 3, job.stdout + job.stderr


def test_no_layout_at_all():
    with pytest.raises(ConfigError, match="seq_len=4096 exceeds"):
        list(all_layouts(tiny({"train.seq_len": 4096}), 2))
