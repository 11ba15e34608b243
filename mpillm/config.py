"""The configuration of a run: frozen dataclasses, read from TOML, overridden from the command line, checked.

``Config.load`` is the only way in for files; every error names the key, its value and what is allowed.
Keys left out of ``[layout]`` (or ``"auto"``) are filled by :meth:`Config.resolve` for a rank count.
"""

import sys
from dataclasses import field, fields, is_dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, Union

import tomli_w
from pydantic import StrictBool

from mpillm.auto import default_microbatch, resolve
from mpillm.errors import ConfigError, DataError
from mpillm.model.description import Model, in_keys_of_today
from mpillm.model.parameters import first_match, is_frozen, parameters
from mpillm.plain import Count, Fraction, Positive, PositiveReal, Real, Seed, checked, config_section

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

AXES = ("data", "pipeline", "tensor")

Auto = Literal["auto"]
Recompute = Literal["none", "selective", "full"]

@config_section
class Data:
    """Where the tokens, or samples, are."""

    path: str = "tokens.h5"
    mask_documents: StrictBool = False
    mask_token: Union[Count, None] = None


@config_section
class Train:
    """What is optimised, for how long, in which arithmetic, and what is kept."""

    run_dir: str = "run"
    steps: Positive = 200
    seq_len: Positive = 256
    global_batch: Positive = 16
    microbatch: Positive | None = None
    optimizer: Literal["adamw", "adam", "sgd", "rmsprop", "adagrad"] = "adamw"
    lr: PositiveReal = 3e-4
    min_lr: Real = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: PositiveReal = 1e-8
    momentum: Fraction = 0.9
    lr_schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: Count = 0
    decay_steps: Count = 0
    weight_decay: Real = 0.1
    grad_clip: Real = 1.0
    dtype: Literal["float64", "float32", "bfloat16"] = "float32"
    numerics: Literal["fast", "exact"] = "fast"
    exact_blocks: Positive = 8
    seed: Seed = 0
    log_every: Positive = 1
    eval_every: Count = 100
    eval_batches: Count = 20
    checkpoint_every: Count = 100
    checkpoint_keep: Positive = 3
    checkpoint_background: StrictBool = False
    init_from: str = ""
    freeze: tuple[str, ...] = ()
    lr_factors: dict[str, PositiveReal] = field(default_factory=dict, hash=False)
    trace: StrictBool = False
    checked: StrictBool = False
    hang_limit_s: Real = 300.0
    skip_limit: Positive = 3
    digests: StrictBool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self):
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} must not exceed lr {self.lr}")
        if self.lr_schedule == "wsd" and not 0 < self.decay_steps <= self.steps - self.warmup_steps:
            raise ValueError(f"decay_steps {self.decay_steps} with lr_schedule wsd: needs 1 to steps - warmup_steps = "
                             f"{self.steps - self.warmup_steps} of them")
        if self.decay_steps and self.lr_schedule != "wsd":
            raise ValueError(f"decay_steps {self.decay_steps} is for lr_schedule wsd, not {self.lr_schedule}: leave it out")
        if self.exact_blocks & (self.exact_blocks - 1):
            raise ValueError(f"exact_blocks {self.exact_blocks} must be a power of two (1, 2, 4, 8, ...)")
        if self.numerics == "exact" and self.microbatch is None:
            raise ValueError(
                "numerics exact needs microbatch: left out, it would depend on the layout, and the bits with it; "
                f"set it, for example to {default_microbatch(self.global_batch, 1)}"
            )


@config_section
class Layout:
    """How the work is split over ranks; ``"auto"`` keys are filled for the rank count at hand."""

    data: Union[Auto, Positive] = "auto"
    pipeline: Union[Auto, Positive] = "auto"
    tensor: Union[Auto, Positive] = "auto"
    chunks: Union[Auto, Positive] = "auto"
    order: Union[Auto, tuple[Literal["data", "pipeline", "tensor"], ...]] = "auto"
    stage_cuts: Union[Auto, tuple[Positive, ...]] = "auto"
    schedule: str = "auto"
    zero: Union[Auto, Literal[0, 1]] = "auto"
    sequence_parallel: Union[Auto, StrictBool] = "auto"
    recompute: Union[Auto, Recompute, tuple[Recompute, ...]] = "auto"
    shares: Union[Auto, tuple[Positive, ...]] = "auto"
    bucket_cuts: Union[Auto, tuple[Count, ...]] = "auto"

    def __post_init__(self):
        if self.order != "auto" and sorted(self.order) != sorted(AXES):
            raise ValueError(f"order {list(self.order)} must name each of {list(AXES)} once")

    def sizes(self):
        """Return the degree of each axis by name."""
        return {axis: getattr(self, axis) for axis in AXES}


@config_section
class Inference:
    """How requests are worked on; 0 bytes of keys and values are a share of the memory that is free."""

    cache_bytes: Count = 0
    pass_tokens: Positive = 512
    batch: Positive = 64
    share_prefixes: StrictBool = True


@config_section
class Config:
    """Everything a run is told. Build it with :meth:`load` or by keyword; change it with :meth:`with_values`."""

    model: Model
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    layout: Layout = field(default_factory=Layout)
    inference: Inference = field(default_factory=Inference)

    def __post_init__(self):
        if self.train.freeze or self.train.lr_factors:
            _check_patterns(self.train, list(parameters(self.model)))

    @classmethod
    def load(cls, path, overrides=None):
        """Read a TOML file, apply ``{"section.key": "value"}`` overrides, and check everything."""
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"configuration {path}: cannot be read ({error.strerror or error})") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"configuration {path}: not valid TOML: {error}") from error
        return cls.from_dict(values, overrides, source=path)

    @classmethod
    def from_dict(cls, values, overrides=None, source="configuration"):
        """Build from nested dicts, as TOML gives them, plus dotted overrides."""
        values = {name: dict(part) if isinstance(part, dict) else part for name, part in values.items()}
        for key, text in (overrides or {}).items():
            section, _, name = key.partition(".")
            if not name or not isinstance(values.setdefault(section, {}), dict):
                raise ConfigError(f"--{key}: an override names a section and a key, as in --train.steps 50")
            values[section][name] = _parse_override(text, is_text=(section, name) in _TEXTS)
        model = values.get("model")
        if isinstance(model, dict):
            values["model"] = in_keys_of_today(model, source)
        return checked(cls, values, source)

    def to_dict(self):
        """Return nested dicts of plain values; what is unset is left out."""
        return _plain(self)

    def to_toml(self):
        """Return the configuration as TOML text that :meth:`load` reads back equal."""
        return tomli_w.dumps(self.to_dict())

    def with_values(self, overrides):
        """Return a copy with dotted overrides applied and checked."""
        return type(self).from_dict(self.to_dict(), overrides)

    def resolve(self, ranks, num_nodes=1):
        """Fill every ``"auto"`` key of the layout for ``ranks`` ranks and check that the layout can run.

        Local and identical on all ranks. What is filled resolves to itself. Cuts of several stages stay ``"auto"`` until
        ``model.vocab_size`` is known.

        Parameters
        ----------
        ranks, num_nodes : int
            Over nodes gradients are reduced beside backward, a bucket a layer; inside a node a stage has one.

        Raises
        ------
        ConfigError
            When the degrees cannot multiply to ``ranks``, or every choice crosses a limit of the model.
        ScheduleError
            When a schedule from a file cannot run.
        """
        return resolve(self, ranks, num_nodes)

    def microbatch_bounds(self):
        """Return for each data rank its list of global sample ranges ``(start, stop)`` within a batch, one a
        microbatch, in the global order of microbatches. Of a resolved configuration."""
        shares, size = self.layout.shares, self.train.microbatch
        starts = [sum(shares[:rank]) for rank in range(len(shares))]
        return [
            [(s, min(s + size, start + share)) for s in range(start, start + share, size)]
            for start, share in zip(starts, shares)
        ]


def _check_patterns(train, names):
    """Refuse patterns of ``[train]`` that stand for nothing, and a model of which nothing is left to train."""
    for key in ("freeze", "lr_factors"):
        used = {first_match(name, getattr(train, key)) for name in names}
        for pattern in getattr(train, key):
            if not any(fnmatchcase(name, pattern) for name in names):
                near = get_close_matches(pattern, names, n=1, cutoff=0.0)[0]
                raise ValueError(f"train.{key}: no parameter has a name like {pattern!r}; the nearest is {near}")
            if key == "lr_factors" and pattern not in used:
                raise ValueError(f"train.{key}: what {pattern!r} names has its factor from a pattern before it, and the first "
                                 "counts: put the narrower one first")
    if all(is_frozen(name, train.freeze) for name in names):
        raise ValueError(f"train.freeze = {list(train.freeze)}: names all parameters of the model: nothing is left to train")


def _plain(value):
    if is_dataclass(value):
        parts = {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
        return {name: part for name, part in parts.items() if part is not None}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


# Keys whose value is any text: a folder may be called 20240501.
_TEXTS = {(section.name, key.name) for section in fields(Config) for key in fields(section.type) if key.type is str}


def _parse_override(text, is_text):
    """Read a command-line value as TOML would, else as a bare string, which that of a key for text always is."""
    if not isinstance(text, str):
        return text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if is_text and not isinstance(value, str) else value
