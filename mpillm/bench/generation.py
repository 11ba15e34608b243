"""Generation to compare: the engine on one rank and on several, beside other engines that do the same work."""

import importlib.util
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mpillm.bench.launch import mpiexec, run_job
from mpillm.bench.training import median_interval
from mpillm.errors import ConfigError, NumbersError
from mpillm.files import to_json

PEERS = {"ctranslate2": ("ctranslate2", "transformers"), "llama.cpp": ("llama_cpp", "gguf"), "transformers": ("transformers",)}
BATCHES, PROMPT, NEW = (1, 8, 32), 32, 64  # rows at a time; their tokens
_LONG_PROMPT = 512
_LEAST_EQUAL = 0.9  # of first tokens: float32 leaves near ties


@dataclass(frozen=True)
class Workload:
    """Prompts, how many tokens each gets, and which of them count: those of the prompts, or the new ones.

    ``mixes`` says that lengths differ: then every engine may take as many rows at a time as are best for it.
    """

    name: str
    prompts: list
    new: list
    counts_prompts: bool = False
    mixes: bool = False

    @property
    def tokens(self):
        """How many tokens count."""
        return sum(map(len, self.prompts)) if self.counts_prompts else sum(self.new)


@dataclass(frozen=True)
class Program:
    """An engine, the ranks it runs on, and the job that measures it."""

    impl: str
    ranks: int
    command: tuple

    @property
    def label(self):
        """The program as one word."""
        return self.impl if self.ranks == 1 else f"{self.impl} data={self.ranks}"


def make_workloads(vocab_size, max_seq_len, count, names=None):
    """Return the workloads, or those of some names between commas: equal rows in three numbers, a long prompt, and ``count``
    prompts of heavy-tailed lengths. Local.

    Raises
    ------
    ConfigError
        If the model is too short for them, or a name is unknown.
    """
    generator = np.random.default_rng(0)
    longest = 2 * _LONG_PROMPT
    if max_seq_len < longest:
        raise ConfigError(f"bench generate: model.max_seq_len = {max_seq_len}: its prompts and answers take {longest}: name "
                          "another model")

    def lengths(median, most):
        return np.clip(np.exp(generator.normal(np.log(median), 0.9, count)), 2, most).astype(int).tolist()

    def prompts(sizes):
        return [generator.integers(3, vocab_size, size).tolist() for size in sizes]

    made = [*(Workload(f"batch-{rows}", prompts([PROMPT] * rows), [NEW] * rows) for rows in BATCHES),
            Workload("prefill", prompts([_LONG_PROMPT]), [1], counts_prompts=True),
            Workload("mixed", prompts(lengths(32, 400)), lengths(20, 200), mixes=True)]
    wanted = names.split(",") if names else [workload.name for workload in made]
    unknown = set(wanted) - {workload.name for workload in made}
    if unknown:
        raise ConfigError(f"--workloads {names}: {min(unknown)} is none of {', '.join(each.name for each in made)}")
    return [workload for workload in made if workload.name in wanted]


def make_programs(folder, names, ranks, workloads, cores):
    """Return the programs; the work is written into ``folder``, which holds ``model`` in the forms that peers read. Local."""
    path = folder / "work.json"
    path.write_text(to_json({"folder": str(folder), "threads": cores, "workloads": list(map(asdict, workloads))}),
                    encoding="utf-8")
    job = (sys.executable, "-m", "mpillm.bench.generators")
    own = [Program("mpillm", count, (*((mpiexec(), "-n", str(count)) if count > 1 else ()), *job, "mpillm", str(path)))
           for count in dict.fromkeys((1, ranks))]
    return own + [Program(name, 1, (*job, name, str(path))) for name in names]


def installed():
    """Return the peers whose packages are here. Local."""
    return [name for name, packages in PEERS.items() if all(map(importlib.util.find_spec, packages))]


def measure(programs, pairs, report):
    """Run every program ``pairs`` times, in rounds whose order turns.

    Local.

    Parameters
    ----------
    programs : list of Program
        The first gives the tokens that the others must give, too.
    pairs : int
    report : callable
        ``report(program, round, found)`` after each job.

    Returns
    -------
    dict of Program to list of dict
        One a round: what :func:`mpillm.bench.generators.run` found of each workload, by its name.

    Raises
    ------
    NumbersError
        If a program gives other tokens.
    """
    found = {program: [] for program in programs}
    for number in range(1, pairs + 1):
        for program in programs[::-1] if number % 2 else programs:
            found[program].append(json.loads(run_job(program.command).output.splitlines()[-1]))
            report(program, number, found[program][-1])
        check_same_tokens({program.label: found[program][-1] for program in programs})
    return found


def check_same_tokens(found):
    """Refuse to compare programs whose first tokens differ from those of the first program. Local."""
    wanted = next(iter(found.values()))
    for label, outcome in found.items():
        for name, result in outcome.items():
            equal = statistics.mean(map(int.__eq__, result["first"], wanted[name]["first"]))
            if equal < _LEAST_EQUAL:
                raise NumbersError(f"{label}, {name}: only {equal:.0%} of the first tokens are those of mpillm: programs that "
                                   "do not compute the same are not compared")


def make_rows(workloads, found):
    """Return the rows of the report, each program of each workload, with how much faster mpillm is on one rank. Local."""
    rows = []
    for workload in workloads:
        speeds = {program: [workload.tokens / outcome[workload.name]["seconds"] for outcome in outcomes]
                  for program, outcomes in found.items()}
        own, *others = speeds
        for program, values in speeds.items():
            row = {"workload": workload.name, "impl": program.impl, "ranks": program.ranks, "pairs": len(values),
                   "tokens_per_s": statistics.median(values), "jobs_tokens_per_s": values,
                   "batch": found[program][0][workload.name]["batch"]}
            if program is not own:
                ratios = [mine / theirs for mine, theirs in zip(speeds[own], values)]
                row["speed_of_mpillm"] = dict(zip(("median", "low", "high", "coverage"), median_interval(ratios)))
            if program.ranks > 1:
                ends_s = [outcome[workload.name]["ends_s"] for outcome in found[program]]
                row["makespan_over_mean"] = statistics.median(max(each) / statistics.mean(each) for each in ends_s)
            rows.append(row)
    return rows


def prepare(path, folder, names):
    """Write the model at ``path`` into ``folder`` in the forms that peers read; return what mpillm says of it, and the peers.
    Local."""
    from mpillm import hf
    from mpillm.bench.generators import CTranslate2, LlamaCpp
    from mpillm.data.settings import MODEL_CONFIG, TOKENIZER
    from mpillm.inference.opening import open_model

    source, config, _ = open_model(path, {}, 1)
    (folder / "own").symlink_to(Path(path).absolute())
    if (Path(path) / MODEL_CONFIG).is_file():
        (folder / "hf").symlink_to(Path(path).absolute())
    elif names:
        hf.to_hf(path, folder / "hf")
    if not (folder / "hf" / TOKENIZER).is_file():  # without which the converter takes no model
        names = [name for name in names if name != "ctranslate2"]
    for name, peer in (("ctranslate2", CTranslate2), ("llama.cpp", LlamaCpp)):
        if name in names:
            peer.convert(folder, source, config.model)
    return config.model, names
