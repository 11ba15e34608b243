"""The configuration of a run: frozen dataclasses, read from TOML, overridden from the command line, checked.

``Config.load`` is the only way in for files; every error names the key, its value and what is allowed.
Keys left out of ``[layout]`` (or ``"auto"``) are filled by :meth:`Config.resolve` for a rank count.
"""

import math
import sys
from dataclasses import field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Union

import tomli_w
from pydantic import Field, Strict, StrictBool
from pydantic.dataclasses import dataclass

from mpillm.errors import ConfigError, DataError
from mpillm.plain import KNOWN_KEYS, checked
from mpillm.schedules.blocks import bounds
from mpillm.schedules.check import check
from mpillm.schedules.pipeline import SCHEDULES, named_or_read

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

AXES = ("data", "pipeline", "tensor")

Positive = Annotated[int, Strict(), Field(gt=0)]
Count = Annotated[int, Strict(), Field(ge=0)]
Seed = Annotated[int, Strict(), Field(ge=0, lt=1 << 63)]
PositiveReal = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
Real = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Strict(), Field(ge=0, lt=1, allow_inf_nan=False)]
Auto = Literal["auto"]
Recompute = Literal["none", "selective", "full"]

_section = dataclass(frozen=True, config=KNOWN_KEYS)


@_section
class Model:
    """A Llama-shaped decoder: RMSNorm, rotary positions, SwiGLU, grouped-query attention.

    ``kind = "gpt"``, with a feed-forward of two matrices, is for the planner: it can be priced, not trained.
    """

    hidden_size: Positive
    num_layers: Positive
    num_heads: Positive
    ffn_size: Positive
    vocab_size: Positive | None = None
    num_kv_heads: Positive | None = None
    head_dim: Positive | None = None
    max_seq_len: Positive = 2048
    rope_theta: PositiveReal = 10000.0
    norm_eps: PositiveReal = 1e-5
    tie_embeddings: StrictBool = False
    kind: Literal["llama", "gpt"] = "llama"

    def __post_init__(self):
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}: "
                    "set model.head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary positions turn pairs, make it even")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}: "
                "every key/value head serves the same number of query heads"
            )


@_section
class Data:
    """Where the tokens are."""

    path: str = "tokens.h5"
    mask_documents: StrictBool = False


@_section
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
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Count = 0
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
    trace: StrictBool = False
    checked: StrictBool = False
    hang_limit_s: Real = 300.0
    skip_limit: Positive = 3
    digests: StrictBool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self):
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} must not exceed lr {self.lr}")
        if self.exact_blocks & (self.exact_blocks - 1):
            raise ValueError(f"exact_blocks {self.exact_blocks} must be a power of two (1, 2, 4, 8, ...)")
        if self.numerics == "exact" and self.microbatch is None:
            raise ValueError(
                "numerics exact needs microbatch: left out, it would depend on the layout, and the bits with it; "
                f"set it, for example to {_default_microbatch(self.global_batch, 1)}"
            )


@_section
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


@_section
class Config:
    """Everything a run is told. Build it with :meth:`load` or by keyword; change it with :meth:`with_values`."""

    model: Model
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    layout: Layout = field(default_factory=Layout)

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
            values[section][name] = _parse_override(text)
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

    def resolve(self, ranks):
        """Fill every ``"auto"`` key of the layout for ``ranks`` ranks and check that the layout can run.

        Local and identical on all ranks.

        Raises
        ------
        ConfigError
            When the degrees do not multiply to ``ranks``, or a limit of the model is crossed.
        """
        layout = _fill_layout(self, ranks)
        microbatch = self.train.microbatch or _default_microbatch(self.train.global_batch, layout.data)
        config = replace(self, layout=layout, train=replace(self.train, microbatch=microbatch))
        _check_layout(config, ranks)
        return config

    def microbatch_bounds(self):
        """Return for each data rank its list of global sample ranges ``(start, stop)`` within a batch, one a
        microbatch, in the global order of microbatches."""
        shares, size = self.layout.shares, self.train.microbatch
        if shares == "auto":
            total = math.ceil(self.train.global_batch / size)
            cuts = [(i * size, min((i + 1) * size, self.train.global_batch)) for i in range(total)]
            return [cuts[slice(*bounds(total, self.layout.data, rank))] for rank in range(self.layout.data)]
        starts = [sum(shares[:rank]) for rank in range(len(shares))]
        return [
            [(s, min(s + size, start + share)) for s in range(start, start + share, size)]
            for start, share in zip(starts, shares)
        ]


def _plain(value):
    if is_dataclass(value):
        parts = {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
        return {name: part for name, part in parts.items() if part is not None}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _parse_override(text):
    """Read a command-line value as TOML would, else as a bare string."""
    if not isinstance(text, str):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _fill_layout(config, ranks):
    """Replace every ``"auto"`` by a simple default: what is left of the ranks goes to data, then pipeline, tensor."""
    layout = config.layout
    sizes = layout.sizes()
    left = max(1, ranks // math.prod(size for size in sizes.values() if size != "auto"))
    batches = config.train.global_batch // (config.train.microbatch or 1)
    limits = {"data": max(1, batches), "pipeline": config.model.num_layers, "tensor": config.model.num_heads}
    for axis in AXES:
        if sizes[axis] == "auto":
            sizes[axis] = max(d for d in range(1, left + 1) if left % d == 0 and d <= limits[axis])
            left //= sizes[axis]
    chunks = 1 if layout.chunks == "auto" else layout.chunks
    if layout.schedule == "interleaved" and layout.chunks == "auto" and sizes["pipeline"] > 1:
        chunks = 2
    schedule = layout.schedule
    if schedule == "auto":
        schedule = "interleaved" if chunks > 1 else "zb-h1" if sizes["pipeline"] > 1 else "1f1b"
    return replace(
        layout, **sizes, chunks=chunks, schedule=schedule, order=AXES if layout.order == "auto" else layout.order,
        zero=int(sizes["data"] > 1) if layout.zero == "auto" else layout.zero,
        sequence_parallel=sizes["tensor"] > 1 if layout.sequence_parallel == "auto" else layout.sequence_parallel,
        recompute="none" if layout.recompute == "auto" else layout.recompute,
    )


def _default_microbatch(global_batch, data):
    """Aim at four microbatches a data rank."""
    return max(1, global_batch // (4 * data))


def _check_layout(config, ranks):
    model, train, layout = config.model, config.train, config.layout
    d, p, t = layout.data, layout.pipeline, layout.tensor
    if d * p * t != ranks:
        raise ConfigError(
            f"layout data={d} x pipeline={p} x tensor={t} needs {d * p * t} ranks, this launch has {ranks}: "
            f"change the degrees or start {d * p * t} ranks (mpiexec -n {d * p * t})"
        )
    stages = p * layout.chunks
    if stages > model.num_layers:
        raise ConfigError(
            f"layout.pipeline={p} x chunks={layout.chunks} makes {stages} stages, but the model has only "
            f"{model.num_layers} layers: every stage needs one; use at most {model.num_layers // layout.chunks} "
            "pipeline ranks"
        )
    if t > model.num_heads:
        raise ConfigError(
            f"layout.tensor={t} splits model.num_heads={model.num_heads}: every tensor rank needs a head; "
            f"use tensor <= {model.num_heads}"
        )
    cuts = layout.stage_cuts
    if cuts != "auto" and (len(cuts) != stages - 1 or list(cuts) != sorted(set(cuts))
                           or (cuts and cuts[-1] >= model.num_layers)):
        raise ConfigError(
            f"layout.stage_cuts = {list(cuts)}: {stages} stages need {stages - 1} growing first layers "
            f"between 1 and {model.num_layers - 1}"
        )
    buckets = layout.bucket_cuts
    if buckets != "auto" and (list(buckets) != sorted(set(buckets)) or (buckets and buckets[-1] > model.num_layers)):
        raise ConfigError(
            f"layout.bucket_cuts = {list(buckets)}: needs growing layers between 0 and {model.num_layers}"
        )
    if isinstance(layout.recompute, tuple) and len(layout.recompute) != model.num_layers:
        raise ConfigError(
            f"layout.recompute lists {len(layout.recompute)} modes for {model.num_layers} layers: give one a layer"
        )
    if layout.shares != "auto" and (len(layout.shares) != d or sum(layout.shares) != train.global_batch):
        raise ConfigError(
            f"layout.shares = {list(layout.shares)}: data={d} needs {d} shares that sum to "
            f"train.global_batch={train.global_batch}"
        )
    if not all(config.microbatch_bounds()):
        raise ConfigError(
            f"train.global_batch={train.global_batch} in microbatches of {train.microbatch} gives fewer "
            f"microbatches than layout.data={d}: every data rank needs one; lower train.microbatch or layout.data"
        )
    # A named one that fits one microbatch fits any number.
    for count in {1} if layout.schedule in SCHEDULES else set(map(len, config.microbatch_bounds())):
        check(named_or_read(layout.schedule, p, count, layout.chunks))
    if train.seq_len > model.max_seq_len:
        raise ConfigError(
            f"train.seq_len={train.seq_len} exceeds model.max_seq_len={model.max_seq_len}: lower one or raise the other"
        )
    if train.numerics == "exact":
        _check_exact(config)


def _check_exact(config):
    """``exact`` admits the layouts whose shards are unions of its blocks."""
    blocks, layout = config.train.exact_blocks, config.layout
    if config.train.dtype == "bfloat16":
        raise ConfigError(
            "train.numerics=exact with train.dtype=bfloat16: sums are rounded once a rank, so that their bits would "
            "depend on the layout; use train.dtype = float32 or float64"
        )
    if blocks % layout.tensor:
        raise ConfigError(
            f"train.numerics=exact with exact_blocks={blocks}: layout.tensor={layout.tensor} must divide it; "
            "use a power of two"
        )
    if layout.data & (layout.data - 1) or layout.shares != "auto":
        raise ConfigError(
            f"train.numerics=exact: layout.data={layout.data} must be a power of two with shares left out, "
            "so that each rank's microbatches are one branch of the fixed sum"
        )
