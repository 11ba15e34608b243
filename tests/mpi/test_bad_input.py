"""Bad input through the command line: every rank raises the same error, before anything is written.

What launch() makes of it, one line and the exit code, is in tests/unit/test_bad_input.py.
"""

import h5py
import pytest
import tomli_w
from helpers import assert_all
from tiny import MODEL

from mpillm.cli.commands import cli
from mpillm.errors import INPUT_OUTPUT, USAGE, MpillmError

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

TRAIN = {"steps": 2, "seq_len": 12, "global_batch": 9, "microbatch": 2, "eval_every": 0, "run_dir": "run"}
# What is wrong: overrides, exit code, words of the message.
CASES = {
    "unknown key": ({"train.stepz": "3"}, USAGE, ["train.stepz", "did you mean steps"]),
    "wrong type": ({"train.lr": "fast"}, USAGE, ["train.lr", "fast", "number"]),
    "product": ({"layout.data": "1", "layout.pipeline": "5", "layout.tensor": "1"}, USAGE,
                ["pipeline=5", "needs 5 ranks"]),
    "stages": ({"model.num_layers": "2", "layout.chunks": "3"}, USAGE, ["3 stages", "2 layers"]),
    "missing": ({"data.path": "nowhere.h5"}, INPUT_OUTPUT, ["nowhere.h5", "no such file", "mpillm data"]),
    "empty": ({"data.path": "empty.h5"}, INPUT_OUTPUT, ["empty.h5", "HDF5"]),
    "foreign": ({"data.path": "foreign.h5"}, INPUT_OUTPUT, ["foreign.h5", "not a token file"]),
    "vocabulary": ({"model.vocab_size": "100"}, USAGE, ["model.vocab_size = 100", "257"]),
    "short": ({"train.seq_len": "700"}, INPUT_OUTPUT, ["600 tokens", "701"]),
    "unwritable": ({"train.run_dir": "config.toml/run"}, INPUT_OUTPUT,
                   ["train.run_dir", "config.toml/run", "choose another"]),
}


@pytest.fixture
def folder(comm, data_path, monkeypatch):
    """The folder that all ranks work in: a configuration, a token file and such as are none."""
    monkeypatch.chdir(data_path)
    if comm.rank == 0:
        (data_path / "empty.h5").write_bytes(b"")
        with h5py.File("foreign.h5", "w") as file:
            file["other"] = [1, 2, 3]
        model = {key: value for key, value in MODEL.items() if key != "vocab_size"}
        config = {"model": model, "data": {"path": "tokens.h5"}, "train": TRAIN, "layout": {"data": comm.size}}
        (data_path / "config.toml").write_text(tomli_w.dumps(config))
    comm.Barrier()
    return data_path


def train(overrides, *more):
    """Run ``mpillm train`` in this process."""
    words = [word for key, value in overrides.items() for word in (f"--{key}", value)]
    return cli.main(["train", "config.toml", *words, *more], standalone_mode=False)


def check_refusal(comm, folder, code, words, overrides, *more):
    """Every rank raises the same error with all the words and the exit code; no run directory is made."""
    try:
        train(overrides, *more)
        found = None, "it ran"
    except MpillmError as error:
        found = error.exit_code, str(error)
    every = comm.allgather(found)
    ok = found[0] == code and set(every) == {found} and all(word in found[1] for word in words)
    assert_all(ok and not (folder / "run").exists(), every, comm)


@pytest.mark.parametrize("case", CASES)
def test_every_rank_raises_the_same(comm, folder, case):
    overrides, code, words = CASES[case]
    check_refusal(comm, folder, code, words, overrides)


def test_more_ranks_than_parts(comm, folder):
    if comm.size > 2:
        check_refusal(comm, folder, USAGE, [f"layout.tensor={comm.size}", "num_heads=2", "tensor <= 2"], {
            "model.num_heads": "2", "model.head_dim": "8", "layout.data": "1", "layout.tensor": str(comm.size)})
    if comm.size > 1:
        few = comm.size - 1
        check_refusal(comm, folder, USAGE, [f"pipeline={comm.size}", f"{few} layers", f"at most {few} pipeline ranks"], {
            "model.num_layers": str(few), "layout.data": "1", "layout.pipeline": str(comm.size)})


def test_a_run_that_is_there_already(comm, folder):
    assert_all(train({"train.run_dir": "used"}) == 0, "the first run failed", comm)
    check_refusal(comm, folder, INPUT_OUTPUT, ["another model", "ffn_size = 54", "55"],
                  {"train.run_dir": "used", "model.ffn_size": "55"})
    check_refusal(comm, folder, USAGE, ["--resume never", "used"], {"train.run_dir": "used"}, "--resume", "never")
