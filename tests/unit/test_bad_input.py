"""Bad input through the command line as it is started: one message, the right exit code, nothing else.

The kinds of bad input to a training are in tests/mpi/test_bad_input.py.
"""

from concurrent.futures import ThreadPoolExecutor

import click
import pytest
import tomli_w
from helpers import run_mpi
from tiny import MODEL, write_token_file

from mpillm.cli import commands, data
from mpillm.errors import ConfigError

pytestmark = pytest.mark.launches

TRAIN = {"steps": 2, "seq_len": 12, "global_batch": 9, "microbatch": 2, "eval_every": 0, "run_dir": "run"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    write_token_file(path / "tokens.h5")
    write_token_file(path / "damaged.h5", largest=400)
    model = {key: value for key, value in MODEL.items() if key != "vocab_size"}
    config = {"model": model, "data": {"path": "tokens.h5"}, "train": TRAIN}
    (path / "config.toml").write_text(tomli_w.dumps(config))
    return path


def train(folder, ranks, overrides):
    words = [word for key, value in overrides.items() for word in (f"--{key}", value)]
    return run_mpi(ranks, ["-m", "mpillm", "train", "config.toml", *words], cwd=folder)


def check(job, code, words):
    """One line of error that has all the words, no traceback, the exit code."""
    errors = [line for line in job.stderr.splitlines() if line.startswith("mpillm: error:")]
    assert len(errors) == 1 and "Traceback" not in job.stderr, job.stderr
    assert all(word in errors[0] for word in words), errors[0]
    assert job.returncode == code, job.returncode


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(("overrides", "code", "words"), [
    ({"train.stepz": "3"}, 2, ["train.stepz", "did you mean steps"]),
    ({"data.path": "nowhere.h5"}, 74, ["nowhere.h5", "no such file", "mpillm data"]),
])
def test_one_message_and_the_exit_code(folder, overrides, code, words, ranks):
    check(train(folder, ranks, {"layout.data": str(ranks), **overrides}), code, words)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_tokens_beyond_what_the_file_states(folder, ranks):
    """Seen in a step, by the rank that reads them: it reports and ends the job."""
    job = train(folder, ranks, {"data.path": "damaged.h5", "layout.data": str(ranks),
                                "train.run_dir": f"damaged-{ranks}"})
    assert job.returncode and "damaged.h5: token" in job.stderr and "vocab_size 257" in job.stderr, job.stderr


def test_lonely_processes_are_refused(folder):
    """Each with its own code; one speaks for all."""
    with ThreadPoolExecutor() as pool:
        jobs = list(pool.map(lambda rank: run_mpi(0, ["-m", "mpillm", "train", "config.toml"], cwd=folder,
                                                  env={"PMI_SIZE": "3", "PMI_RANK": str(rank)}), range(3)))
    check(jobs[0], 1, ["3 processes", "world of 1 rank", "--mpi=pmi2"])
    assert [job.returncode for job in jobs] == [1, 1, 1] and not any(job.stderr.strip() for job in jobs[1:]), jobs
    assert not (folder / "run").exists()


def test_tokens_are_made_by_one_process(folder):
    check(run_mpi(2, ["-m", "mpillm", "data", "config.toml", "-o", "new.h5"], cwd=folder), 2,
          ["one process", "started 2"])
    assert not (folder / "new.h5").exists()


@pytest.mark.parametrize("more", [[], ["--validation"]])
def test_tokens_do_not_replace_their_text(tmp_path, more):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    words = [str(tmp_path / "a.txt"), *more, str(tmp_path / "b.txt"), "-o", str(tmp_path / "link.txt")]
    with pytest.raises(ConfigError, match=r"-o .*link\.txt: is one of the texts"):
        data.command.main(words, standalone_mode=False)


def test_usage_errors_are_reported_once(folder):
    for words in (["train"], ["train", "config.toml", "--steps"], ["fly"]):
        job = run_mpi(0, ["-m", "mpillm", *words], cwd=folder)
        check(job, 2, [])


@pytest.mark.parametrize(("words", "said"), [
    (["trian", "config.toml"], "Did you mean train?"), (["fly"], "There are: doctor, data,"),
    (["train", "config.toml", "--resme", "never"], "--resme: unknown option, did you mean --resume?"),
    (["train", "config.toml", "--probe-tpo=2"], "--probe-tpo=2: unknown option, did you mean --probe-top?"),
    (["doctor", "--jsno"], "--json"), (["train", "config.toml", "--train.stepz", "2"], "did you mean steps"),
    (["train", "config.toml", "--trian.steps", "2"], "did you mean train"),
    (["train", "config.toml", "--steps", "2"], "--steps: unknown option; a key"),
])
def test_what_is_misspelt_is_told_what_was_meant(folder, monkeypatch, words, said):
    monkeypatch.chdir(folder)
    with pytest.raises((click.UsageError, ConfigError)) as caught:
        commands.cli.main(words, standalone_mode=False)
    message = caught.value.format_message() if isinstance(caught.value, click.UsageError) else str(caught.value)
    assert said in message


def test_an_exception_on_one_rank_ends_the_job(folder):
    """With one report that names the rank, though the others wait in a collective."""
    job = run_mpi(3, ["-c", "import mpillm\nfrom mpillm.comm import comm_world\n"
                      "def main():\n"
                      "    comm = comm_world()\n"
                      "    if comm.rank == 1:\n        raise RuntimeError('planted')\n"
                      "    comm.Barrier()\n"
                      "mpillm.launch(main)"], cwd=folder, timeout=30)
    assert job.returncode and job.stderr.count("RuntimeError: planted") == 1 and "[rank 1/3" in job.stderr, job.stderr
