"""Training jobs to compare: layouts of mpillm, each beside a peer that does the same work."""

import json
import math
import shutil
import statistics
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mpillm.bench import transformers_peer
from mpillm.bench.launch import mpiexec, run_job
from mpillm.config import AXES, Config
from mpillm.data.sources import with_sizes
from mpillm.data.tokenizers import token_dtype
from mpillm.errors import ConfigError, NumbersError
from mpillm.files import to_json
from mpillm.hdf5 import writing
from mpillm.model.description import Model

PEER_MODES = {"single": "single", "data": "ddp", "tensor": "tp", "pipeline": "pp"}
# What a configuration may say of an axis is left out of layouts that do not split it.
_KEYS_OF_AXIS = {"data": ("shares", "bucket_cuts"), "pipeline": ("chunks", "stage_cuts", "schedule")}
_RANDOM_SAMPLES = 256
# By how much two programs of equal weights may differ in the first step. PyTorch's norm of millions of float32 numbers is that
# far from the true one where few are large.
_TOLERANCES = {"loss": 1e-5, "grad_norm": 1e-3}


@dataclass(frozen=True)
class Case:
    """A layout to measure: ``kind`` is ``"single"`` or the one axis that is split; ``config`` is resolved for it."""

    kind: str
    ranks: int
    config: Config

    @property
    def layout(self):
        """The layout as one word."""
        return "single" if self.kind == "single" else f"{self.kind}={self.ranks}"

    @property
    def tokens(self):
        """The tokens of a step."""
        return self.config.train.global_batch * self.config.train.seq_len


class Outcome(NamedTuple):
    """What a job found: the median time of its steps but the first, its peak memory if that was sampled, and ``loss`` and
    ``grad_norm`` of the first step, unless the program has weights of its own."""

    step_s: float
    peak_bytes: int | None = None
    first: dict | None = None


@dataclass(frozen=True)
class Program:
    """An implementation of a case: the job to start, and where it leaves its times."""

    impl: str
    case: Case
    command: tuple
    run_dir: Path | None = None

    def run(self, samples_memory=False):
        """Run the job; return its :class:`Outcome`.

        Local: the job is one of its own.

        Raises
        ------
        MpillmError
            If the job fails.
        """
        job = run_job(self.command, samples_memory)
        if self.run_dir is None:
            found = json.loads(job.output)
            return Outcome(found["step_s"], job.peak_bytes, found if "grad_norm" in found else None)
        lines = (self.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        shutil.rmtree(self.run_dir)
        first, *others = map(json.loads, lines)
        return Outcome(statistics.median(line["step_s"] for line in others), job.peak_bytes, first)


def make_cases(config, names, default_ranks):
    """Return the cases that ``names`` ask for: ``single``, an axis, or ``AXIS=RANKS``.

    Local.

    Raises
    ------
    ConfigError
        If a name is unknown or the model does not fit the layout.
    """
    cases = []
    for name in names:
        kind, _, number = name.partition("=")
        ranks = 1 if kind == "single" else int(number) if number.isdigit() else default_ranks
        is_known = name == "single" or (kind in AXES and (name == kind or number.isdigit()))
        if not is_known or (kind in AXES and ranks < 2):
            raise ConfigError(
                f"--layouts {name} (--ranks {default_ranks}): give single, or {', '.join(AXES)}, each alone or with "
                "its ranks as in data=2, of at least 2 ranks"
            )
        values = {f"layout.{axis}": ranks if axis == kind else 1 for axis in AXES}
        for axis, keys in _KEYS_OF_AXIS.items():
            if axis != kind:
                values |= {f"layout.{key}": "auto" for key in keys}
        cases.append(Case(kind, ranks, config.with_values(values).resolve(ranks)))
    return list(dict.fromkeys(cases))


def prepare(config, steps, folder):
    """Return ``config`` set for timing: ``steps`` bare steps, on random tokens in ``folder`` if its own are missing.

    Local.

    Raises
    ------
    ConfigError
        If the file of tokens is missing and the vocabulary is not said.
    """
    values = {"train.steps": steps, "train.eval_every": 0, "train.checkpoint_every": 0, "train.trace": False,
              "train.init_from": ""}
    if not Path(config.data.path).exists():
        if not config.model.has_words:
            raise ConfigError(f"data.path = {config.data.path}: no such file, and random tokens have no labels for head "
                              f"{config.model.head}: name a file")
        if config.model.vocab_size is None:
            raise ConfigError(
                f"data.path = {config.data.path}: no such file, and random tokens in its place need the vocabulary: "
                "set model.vocab_size"
            )
        values["data.path"] = str(folder / "tokens.h5")
        write_random_tokens(values["data.path"], config.model.vocab_size, _RANDOM_SAMPLES * config.train.seq_len + 1)
    else:
        config = with_sizes(config)
    return config.with_values(values)


def write_random_tokens(path, vocab_size, count):
    """Write a token file of one document of ``count`` random tokens in either split. Local."""
    generator = np.random.default_rng(0)
    with writing(path) as file:
        file.attrs["vocab_size"] = vocab_size
        for split in ("train", "validation"):
            group = file.create_group(split)
            group["tokens"] = generator.integers(vocab_size, size=count).astype(token_dtype(vocab_size))
            group["documents"] = np.zeros(1, np.uint64)
            group.attrs["bytes"] = count


def mpillm_program(case, folder):
    """Return mpillm's own program of a case; its configuration is written into ``folder``."""
    run_dir, path = folder / f"run-{case.layout}", folder / f"{case.layout}.toml"
    path.write_text(case.config.with_values({"train.run_dir": str(run_dir)}).to_toml(), encoding="utf-8")
    launcher = () if case.ranks == 1 else (mpiexec(), "-n", str(case.ranks))
    command = (*launcher, sys.executable, "-m", "mpillm", "train", str(path), "--resume", "never")
    return Program("mpillm", case, command, run_dir)


def peer_program(case, folder):
    """Return the peer of a case; the work is written into ``folder``.

    Raises
    ------
    ConfigError
        If the peer cannot do this work.
    """
    mode, path = PEER_MODES[case.kind], folder / f"{case.layout}.json"
    path.write_text(to_json(peer_work(case)), encoding="utf-8")
    return Program(mode, case, (sys.executable, "-m", "mpillm.bench.peer", mode, str(case.ranks), str(path)))


def peer_work(case):
    """Return the fields of :class:`mpillm.bench.peer.PeerWork` for a case, or say what the peer cannot do. Local."""
    model, train, ranks = case.config.model, case.config.train, case.ranks
    sizes = model.num_heads, model.num_kv_heads, model.ffn_size
    unable = {
        **_beyond_pytorch(case.config),
        **{f"model.{key}": True for key in beyond_llama(model)},
        "layout.shares": len(set(case.config.layout.shares)) > 1,
        f"train.global_batch = {train.global_batch} on {ranks} data ranks: they get equal parts":
            case.kind == "data" and train.global_batch % ranks,
        f"train.global_batch = {train.global_batch} in microbatches of {train.microbatch} for {ranks} stages: its "
        "microbatches are equal and at least as many":
            case.kind == "pipeline" and (train.global_batch % train.microbatch
                                         or train.global_batch // train.microbatch < ranks),
        f"model.num_heads, num_kv_heads, ffn_size = {', '.join(map(str, sizes))} on {ranks} tensor ranks: all are "
        "multiples of that":
            case.kind == "tensor" and any(size % ranks for size in sizes),
    }
    _refuse("--peers", f"the peer of {case.layout}", unable)
    return {
        "vocab": model.vocab_size, "hidden": model.hidden_size, "layers": model.num_layers, "heads": model.num_heads,
        "ffn": model.ffn_size, "kv_heads": model.num_kv_heads, "head_dim": model.head_dim,
        "rope_theta": model.rope_theta, "norm_eps": model.norm_eps, "seq": train.seq_len, "batch": train.global_batch,
        "micro": train.microbatch, "steps": train.steps, "lr": train.lr, "betas": train.betas, "eps": train.eps,
        "weight_decay": train.weight_decay, "grad_clip": train.grad_clip,
    }


def transformers_programs(case, folder):
    """Return the programs by the class of ``transformers`` that computes the model of ``case``, one for each attention.

    Parameters
    ----------
    case : Case
        Of one rank.
    folder : Path
        The configuration is written there.

    Raises
    ------
    ConfigError
        If there is no such class, it cannot do this work, or the package is missing.
    """
    transformers_peer.library()
    model = case.config.model
    transformers_peer.family_for(model)
    _refuse("--transformers", "this peer",
            {f"model.head = {model.head}: it has words and masked": not model.has_words, **_beyond_pytorch(case.config)})
    path = folder / "transformers.toml"
    path.write_text(case.config.to_toml(), encoding="utf-8")
    return tuple(Program(f"hf-{attention}", case, (sys.executable, "-m", transformers_peer.__name__, attention, str(path)))
                 for attention in transformers_peer.ATTENTIONS)


def _beyond_pytorch(config):
    """Return what no peer does, with whether a configuration asks for it."""
    train = config.train
    return {
        f"train.optimizer = {train.optimizer}: it has adamw": train.optimizer != "adamw",
        f"train.dtype = {train.dtype}: it has float32": train.dtype != "float32",
        f"train.device = {train.device}: it runs on cpu": train.device == "cuda",
        "data.mask_documents": config.data.mask_documents,
        "train.freeze": bool(train.freeze),
        "train.lr_factors": bool(train.lr_factors),
    }


def _refuse(option, who, unable):
    faults = [text for text, is_fault in unable.items() if is_fault]
    if faults:
        raise ConfigError(f"{option}: {who} cannot do {'; '.join(faults)}: leave out {option}")


def beyond_llama(model):
    """Return the keys of a model that are not those of a Llama, sizes aside. Local."""
    llama = Model(model.hidden_size, model.num_layers, model.num_heads, model.ffn_size)
    sizes = ("vocab_size", "num_kv_heads", "head_dim", "max_seq_len", "rope_theta", "norm_eps")
    return [field.name for field in fields(Model) if field.name not in sizes
            and getattr(model, field.name) != getattr(llama, field.name)]


def measure(programs, pairs, report):
    """Run every program ``pairs`` times for its time and before that once for its memory.

    Local. A round runs all; the order turns from round to round, so that a machine that slows down slows all alike.

    Parameters
    ----------
    programs : list of Program
    pairs : int
    report : callable
        ``report(program, round, step_s)`` after each job; round 0 is that of the memory.

    Returns
    -------
    times_s : dict of Program to list of float
        One a round, step times.
    peak_bytes : dict of Program to int or None

    Raises
    ------
    NumbersError
        If programs that start from the same weights differ in the first step.
    """
    times_s, peak_bytes = {program: [] for program in programs}, {}
    for number in range(pairs + 1):
        firsts = {}
        for program in programs[::-1] if number % 2 == 0 else programs:
            outcome = program.run(samples_memory=number == 0)
            report(program, number, outcome.step_s)
            firsts[f"{program.impl} ({program.case.layout})"] = outcome.first
            if number == 0:
                peak_bytes[program] = outcome.peak_bytes
            else:
                times_s[program].append(outcome.step_s)
        check_same_work(firsts)
    return times_s, peak_bytes


def check_same_work(firsts):
    """Hold what programs found in the first step against each other; ``None`` is of one that has weights of its own. Local.

    Raises
    ------
    NumbersError
        If two differ.
    """
    found = {name: first for name, first in firsts.items() if first is not None}
    for key, tolerance in _TOLERANCES.items():
        values = {name: first[key] for name, first in found.items()}
        if values and max(values.values()) - min(values.values()) > tolerance * abs(min(values.values())):
            raise NumbersError(f"{key} of the first step: {', '.join(f'{name} {value:.7g}' for name, value in values.items())}"
                               ": programs that do not compute the same are not compared")


def median_interval(values):
    """Return ``(median, low, high, coverage)``; the interval holds the true median with probability ``coverage``.

    Local. The narrowest pair of order statistics, as far from one end as from the other, that covers at least 95 %;
    with fewer than six values smallest and largest, which cover less. No shape of the distribution is assumed.
    Source: David and Nagaraja, Order Statistics (2003), 7.1.
    """
    ordered, n = sorted(values), len(values)
    coverages = [1 - 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n for k in range((n + 1) // 2)]
    k = max((k for k, coverage in enumerate(coverages) if coverage >= 0.95), default=0)
    return statistics.median(ordered), ordered[k], ordered[n - 1 - k], max(coverages[k], 0.0)


def make_rows(programs, beside, times_s, peak_bytes):
    """Return the rows of the report as dicts.

    Local. ``speed_over_peer``, ``speed_over_single`` (mpillm on one rank) and those over the programs ``beside`` are ratios of
    tokens per second, above 1 where the program of the row is the faster.

    Parameters
    ----------
    programs : list of tuple of Program
        For each case its program, with its peer behind it if it has one.
    beside : tuple of Program
        Of the same work in one process; each layout is compared with them.
    times_s, peak_bytes : dict
        Of :func:`measure`.
    """
    single = next((case[0] for case in programs if case[0].case.kind == "single"), None)
    rows = []
    for own, *peers in [*programs, *((None, program) for program in beside)]:
        for program in filter(None, (own, *peers)):
            step_s = statistics.median(times_s[program])
            row = {"impl": program.impl, "layout": program.case.layout, "ranks": program.case.ranks, "step_s": step_s,
                   "tokens_per_s": program.case.tokens / step_s, "peak_bytes": peak_bytes[program],
                   "pairs": len(times_s[program]), "jobs_step_s": times_s[program]}
            if program is own:
                others = {"peer": peers[0] if peers else None, "single": single if own is not single else None,
                          **{program.impl: program for program in beside}}
                row |= {f"speed_over_{name}": _speed(times_s[own], times_s[other])
                        for name, other in others.items() if other}
            rows.append(row)
    return rows


def _speed(own_s, other_s):
    """Compare round by round."""
    names = ("median", "low", "high", "coverage")
    return dict(zip(names, median_interval([other / own for own, other in zip(own_s, other_s)])))
