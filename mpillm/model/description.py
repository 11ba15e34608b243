"""The ``[model]`` section: a transformer in keys that mean one thing each, checked against each other.

There is no family here: a family is a table in :mod:`mpillm.hf` that says which of these keys it sets.
"""

from typing import Annotated, Literal

from pydantic import Field, StrictBool

from mpillm.errors import ConfigError
from mpillm.plain import FractionOfOne, Positive, PositiveReal, Real, config_section

# What [model] kind stood for, a key of mpillm 0.1 that old runs and checkpoints have.
SHAPES = {
    "llama": {},
    "gpt": {"norm": "layer", "positions": "learned", "ffn": "gelu", "attention_bias": True, "output_bias": True,
            "ffn_bias": True},
}
GATED = {"swiglu": "silu", "geglu": "gelu_tanh"}  # feed-forwards of three matrices, and what their gate goes through


def in_keys_of_today(model, source):
    """Return a ``[model]`` section with the keys that its ``kind`` stood for in its place, if it has one. Local.

    Raises
    ------
    ConfigError
        If the ``source`` has a ``kind`` that never was.
    """
    kind = model.get("kind", "llama")
    if kind not in [*SHAPES]:
        raise ConfigError(f"{source}: model.kind = {kind}: it stood for {' or '.join(SHAPES)} in mpillm 0.1: leave it out, and "
                          "say with the other keys what differs from a Llama")
    return {**SHAPES[kind], **{key: value for key, value in model.items() if key != "kind"}}


@config_section
class RopeScaling:
    """How rotary angles are changed for sequences longer than the model was first trained on.

    ``linear`` divides every angle by ``factor``; ``llama3`` those that turn slowly alone; ``yarn`` (Peng et al. 2023) goes
    over from one to the other by the turns a pair makes, and scales queries and keys by ``attention_factor``.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: Annotated[float, Field(strict=True, ge=1, allow_inf_nan=False)]
    original_max_seq_len: Positive | None = None
    low_freq_factor: PositiveReal = 1.0
    high_freq_factor: PositiveReal = 4.0
    beta_fast: PositiveReal = 32.0
    beta_slow: PositiveReal = 1.0
    attention_factor: PositiveReal | None = None
    truncate: StrictBool = True

    def __post_init__(self):
        if self.kind != "linear" and self.original_max_seq_len is None:
            raise ValueError(f"rope_scaling.kind {self.kind} needs rope_scaling.original_max_seq_len: the length that the "
                             "model was trained on before")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"rope_scaling.low_freq_factor {self.low_freq_factor} must be less than high_freq_factor "
                             f"{self.high_freq_factor}")


@config_section
class Model:
    """A stack of transformer layers; left at their defaults the keys describe a Llama."""

    hidden_size: Positive
    num_layers: Positive
    num_heads: Positive
    ffn_size: Positive
    vocab_size: Positive | None = None
    num_kv_heads: Positive | None = None
    head_dim: Positive | None = None
    max_seq_len: Positive = 2048
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: PositiveReal = 1e-5
    norm_offset: StrictBool = False
    norm_placement: Literal["pre", "post", "output"] = "pre"
    positions: Literal["rotary", "learned", "none"] = "rotary"
    rope_theta: PositiveReal = 10000.0
    rope_fraction: FractionOfOne = 1.0
    rope_scaling: RopeScaling | None = None
    attention: Literal["causal", "bidirectional"] = "causal"
    window: Positive | None = None
    qk_norm: Literal["none", "head", "whole"] = "none"
    attention_bias: StrictBool = False
    output_bias: StrictBool = False
    ffn: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu"] = "swiglu"
    ffn_bias: StrictBool = False
    residual: Literal["sequential", "parallel"] = "sequential"
    embedding_scale: PositiveReal = 1.0
    embedding_norm: StrictBool = False
    inputs: Literal["tokens", "patches"] = "tokens"
    patch_size: Positive | None = None
    class_position: StrictBool = False
    head: Literal["words", "masked", "classes", "tags", "values"] = "words"
    num_labels: Positive | None = None
    pooling: Literal["none", "first", "last", "mean"] | None = None
    pooler: StrictBool = False
    value_loss: Literal["squared", "gaussian"] = "squared"
    head_bias: StrictBool = False
    logit_softcap: Real = 0.0
    tie_embeddings: StrictBool = False

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
        if self.pooling is None:
            pooled = "last" if self.attention == "causal" else "first"
            object.__setattr__(self, "pooling", pooled if self.head == "classes" else "none")
        if self.head == "values" and self.num_labels is None:
            object.__setattr__(self, "num_labels", 1)
        for rule in _RULES:
            if message := rule(self):
                raise ValueError(message)

    @property
    def rotary_dim(self):
        """How many numbers of a head its position turns, in pairs."""
        return int(self.head_dim * self.rope_fraction) if self.positions == "rotary" else 0

    @property
    def is_gated(self):
        """Whether a feed-forward has a gate beside what it multiplies: three matrices in place of two."""
        return self.ffn in GATED

    @property
    def activation(self):
        """The function inside a feed-forward: what its gate goes through, or what it multiplies."""
        return GATED.get(self.ffn, self.ffn)

    @property
    def has_final_norm(self):
        """Whether a norm stands behind the last layer; with ``post`` every layer ends in its own."""
        return self.norm_placement != "post"

    @property
    def has_words(self):
        """Whether the head gives a number to every word of the vocabulary."""
        return self.head in ("words", "masked")

    @property
    def missing(self):
        """The key of a size that the data have still to say, or ``None``."""
        if self.vocab_size is None and (self.inputs == "tokens" or self.has_words):
            return "vocab_size"
        return "num_labels" if self.head_size is None else None

    @property
    def outputs_per_label(self):
        """How many numbers the head gives for one label: a Gaussian's mean and the logarithm of its variance."""
        return 2 if self.head == "values" and self.value_loss == "gaussian" else 1

    @property
    def head_size(self):
        """How many numbers the head gives; ``None`` while the data have not said."""
        labels = self.vocab_size if self.has_words else self.num_labels
        return labels and labels * self.outputs_per_label

    def has_band(self, positions):
        """Tell whether some of so many positions are too far apart to see each other, which attention's kernels must be
        told by a mask: they know no window. Local."""
        return self.window is not None and self.window < positions


def _groups_heads_evenly(model):
    if model.num_heads % model.num_kv_heads:
        return (f"num_heads {model.num_heads} is not a multiple of num_kv_heads {model.num_kv_heads}: "
                "every key/value head serves the same number of query heads")


def _turns_pairs(model):
    if model.positions == "rotary" and (model.rotary_dim % 2 or not model.rotary_dim):
        is_whole = model.rope_fraction == 1
        size = f"head_dim {model.head_dim}" + ("" if is_whole else f" times rope_fraction {model.rope_fraction:g}")
        return (f"{size} is {'odd' if is_whole else f'{model.rotary_dim}, no even number above 0'}: rotary positions turn "
                f"pairs, make it even{'' if is_whole else ', or change rope_fraction'}")


def _has_what_rotary_needs(model):
    if model.positions != "rotary" and (model.rope_scaling or model.rope_fraction != 1):
        key = "rope_scaling" if model.rope_scaling else "rope_fraction"
        return f"{key} is given, but positions {model.positions} turn nothing: leave it out, or set positions to rotary"


def _goes_through_many_turns(model):
    if model.rope_scaling and model.rope_scaling.kind == "yarn" and model.rope_theta <= 1:
        return f"rope_theta {model.rope_theta:g} with rope_scaling yarn: all pairs turn alike: it must be more than 1"


def _adds_beside_one_norm(model):
    if model.residual == "parallel" and model.norm_placement != "pre":
        return (f"residual parallel with norm_placement {model.norm_placement}: both halves of a parallel layer read the "
                "same input, behind their norms: set norm_placement to pre")


def _offsets_rms_weights(model):
    if model.norm_offset and model.norm == "layer":
        return "norm_offset is for norm rms: LayerNorm has a bias, and weights around one: leave it out"


def _hides_the_answer(model):
    if model.head == "words" and model.attention == "bidirectional":
        return ("attention bidirectional with head words: every position would see the token that it is to predict: set "
                "head to masked, or attention to causal")


def _reads_words_for_words(model):
    if model.inputs == "patches":
        if model.patch_size is None:
            return "inputs patches needs patch_size: how many real numbers a patch has"
        if model.has_words:
            return f"inputs patches with head {model.head}: patches are no words: set head to classes, tags or values"
    for key, needed in (("patch_size", "inputs patches"), ("class_position", "inputs patches")):
        if getattr(model, key) and model.inputs != "patches":
            return f"{key} is given, but inputs are {model.inputs}: it is for {needed}"
    if model.tie_embeddings and not model.has_words:
        return f"tie_embeddings with head {model.head}: it has no matrix of words to share: leave it out"


def _pools_what_it_answers(model):
    is_pooled = model.pooling != "none"
    if model.head == "classes" and not is_pooled:
        return "pooling none with head classes: a class is one answer a sequence: set pooling to first, last or mean"
    if is_pooled and model.head not in ("classes", "values"):
        return f"pooling {model.pooling} with head {model.head}: it answers at every position: leave it out"
    if model.pooler and not is_pooled:
        return f"pooler with head {model.head} and pooling none: it stands before one answer a sequence: leave it out"


_RULES = (_groups_heads_evenly, _turns_pairs, _has_what_rotary_needs, _goes_through_many_turns, _adds_beside_one_norm,
          _offsets_rms_weights, _hides_the_answer, _reads_words_for_words, _pools_what_it_answers)
