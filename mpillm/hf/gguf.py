"""Weights of a GGUF file of llama.cpp: what its metadata say of the model, any range of any parameter dequantised."""

from dataclasses import replace

import numpy as np
import torch

from mpillm.errors import ConfigError, DataError
from mpillm.files import to_json
from mpillm.hf.family import Family, Key
from mpillm.hf.folder import Refused, reporting
from mpillm.hf.gguf_tokenizer import read_tokenizer
from mpillm.hf.reading import Source
from mpillm.model.description import RopeScaling
from mpillm.model.rotary import rotary_rates

ARCHITECTURE = "general.architecture"
TENSORS = "tensors"  # stands for the names of a file's tensors among its metadata: what is there says of biases and ties
FACTORS = "rope_freqs.weight"
# How Llama 3.1 to 3.3 slow pairs down. A file holds the factor of each pair in place of these figures.
LLAMA3 = {"kind": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}
AT_ONCE = 1 << 20  # numbers that are dequantised
READ_AS = {"F64": "F64", "F16": "F16", "BF16": "BF16"}  # all others as F32


def _read_llama(values):
    """Return what no single key of the metadata says."""
    tensors = values[TENSORS]
    width, heads = values.get("llama.embedding_length"), values.get("llama.attention.head_count")
    head_dim = values.get("llama.attention.key_length")
    if head_dim is None and type(width) is type(heads) is int and heads > 0:
        head_dim = width // heads
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if values.get(key, head_dim) != head_dim:
            raise Refused(key, values[key], f"keys have {head_dim} numbers a head, and mpillm turns whole heads of one size: "
                          "convert another model")
    factor = values.get("llama.rope.scaling.factor", 0)
    is_scaled = values.get("llama.rope.scaling.type", "linear") == "linear" and factor not in (0, 1)
    return {"tie_embeddings": "output.weight" not in tensors, "attention_bias": "blk.0.attn_q.bias" in tensors,
            "output_bias": "blk.0.attn_output.bias" in tensors, "ffn_bias": "blk.0.ffn_up.bias" in tensors,
            "rope_scaling": {"kind": "linear", "factor": factor} if is_scaled else None}


LLAMA = Family(
    "llama", (),
    {"token_embd": "embedding", "output_norm": "norm", "output": "head", "blk.{}.attn_norm": "attention_norm",
     "blk.{}.attn_q": "attention.query", "blk.{}.attn_k": "attention.key", "blk.{}.attn_v": "attention.value",
     "blk.{}.attn_output": "attention.output", "blk.{}.ffn_norm": "ffn_norm", "blk.{}.ffn_gate": "ffn.gate",
     "blk.{}.ffn_up": "ffn.up", "blk.{}.ffn_down": "ffn.down"},
    {"llama.vocab_size": Key("vocab_size"), "llama.embedding_length": Key("hidden_size"),
     "llama.feed_forward_length": Key("ffn_size"), "llama.block_count": Key("num_layers"),
     "llama.attention.head_count": Key("num_heads"), "llama.attention.head_count_kv": Key("num_kv_heads", None),
     "llama.attention.key_length": Key("head_dim", None), "llama.context_length": Key("max_seq_len"),
     "llama.attention.layer_norm_rms_epsilon": Key("norm_eps"), "llama.rope.freq_base": Key("rope_theta", 10000.0)},
    only={ARCHITECTURE: ("llama",), "general.type": ("model",), "split.count": (0, 1), "llama.attention.causal": (True,),
          "llama.expert_count": (0,), "llama.expert_used_count": (0,), "llama.rope.scaling.type": ("none", "linear")},
    read=_read_llama,
    read_keys=(TENSORS, "llama.attention.value_length", "llama.rope.dimension_count", "llama.rope.scaling.factor"),
    ignored=(r"rope_freqs\.weight",),  # read before
    harmless=("GGUF.*", "general.*", "split.*", "tokenizer.*", "quantize.imatrix.*", "llama.tensor_data_layout",
              "llama.rope.scaling.finetuned", "llama.rope.scaling.original_context_length"),
)
FAMILIES = {"llama": LLAMA}  # by general.architecture
# Rows of these are stored for pairs of neighbours.
INTERLEAVED = ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")


class GGUFFile(Source):
    """A GGUF file of a model of the form of Llama, open for reading. Local.

    Parameters
    ----------
    path : Path

    Raises
    ------
    ConfigError
        If the model computes something that mpillm's does not, or the gguf package is missing.
    DataError
        If the file cannot be read, or its tensors are not those of its metadata.
    """

    def __init__(self, path):
        self._library = _gguf_library()
        with reporting(path):
            self._reader = _open(self._library, path)
        self._stored = {tensor.name: tensor for tensor in self._reader.tensors}
        super().__init__(path, *self._read_model(path), "metadata")

    def tokenizer(self):
        """Return the tokenizer of the metadata as the text of a file ``tokenizer.json``, or None, and its settings."""
        said = {key.removeprefix("tokenizer."): field.contents() for key, field in self._reader.fields.items()
                if key.startswith("tokenizer.")}
        return read_tokenizer(said, self.model, self.path)

    def _read_model(self, path):
        values = {key: self._value(field) for key, field in self._reader.fields.items() if not key.startswith("tokenizer.")}
        kind = values.get(ARCHITECTURE)
        if kind not in [*FAMILIES]:
            raise ConfigError(f"{path}: {ARCHITECTURE} = {to_json(kind)}: mpillm reads GGUF files of {', '.join(FAMILIES)}: "
                              "convert another model, or its Hugging Face folder")
        if "token_embd.weight" in self._stored:
            values.setdefault(f"{kind}.vocab_size", int(self._stored["token_embd.weight"].shape[-1]))
        model = FAMILIES[kind].model({**values, TENSORS: [*self._stored]}, path)
        return FAMILIES[kind], self._with_factors(model, path) if FACTORS in self._stored else model

    def _value(self, field):
        """Return what a field of the metadata holds; of float32, the shortest number that is stored as that."""
        value = field.contents()
        is_short = field.types == [self._library.GGUFValueType.FLOAT32]
        return float(str(np.float32(value))) if is_short else value

    def _with_factors(self, model, path):
        """Return the model with the scaling that its file has the factors of."""
        factors = np.array(self._stored[FACTORS].data, np.float64)
        scaled = replace(model, rope_scaling=RopeScaling(factor=round(float(factors.max()), 3), **LLAMA3))
        wanted = rotary_rates(model)[0] / rotary_rates(scaled)[0]
        if model.rope_scaling or factors.shape != wanted.shape or not np.allclose(factors, wanted, rtol=1e-5, atol=0):
            raise ConfigError(f"{path}: {FACTORS}: mpillm knows the factors of Llama 3.1 to 3.3 only: convert the model's "
                              "Hugging Face folder")
        return scaled

    def _open(self):
        found = {name: _Slices(self._library, tensor, self.path) for name, tensor in self._stored.items()}
        return {name: _Unpermuted(slices, self.model.head_dim) if name.endswith(INTERLEAVED) else slices
                for name, slices in found.items()}


class _Slices:
    """Slices a tensor of a file as safetensors would, and dequantises no more than the blocks that it touches."""

    def __init__(self, library, tensor, path):
        self._library, self._tensor = library, tensor
        self._block, self._block_bytes = library.GGML_QUANT_SIZES[tensor.tensor_type]
        if not self._is_plain:
            try:
                self._dequantise(np.zeros((1, self._block_bytes), np.uint8))
            except NotImplementedError as error:
                raise DataError(f"{path}: {tensor.name}: {error} in the gguf package: take a file of other types") from error

    @property
    def _is_plain(self):
        return self._tensor.data.dtype.kind == "f"

    def get_shape(self):
        """Return the shape, the rows first."""
        return [int(size) for size in reversed(self._tensor.shape)]

    def get_dtype(self):
        """Return the type that numbers count as having."""
        return READ_AS.get(self._tensor.tensor_type.name, "F32")

    def __getitem__(self, place):
        is_row = len(self.get_shape()) == 1
        rows, columns = (slice(None), place) if is_row else place if isinstance(place, tuple) else (place, slice(None))
        start, stop, _ = columns.indices(self.get_shape()[-1])
        data = np.atleast_2d(self._tensor.data)[rows]
        if self._is_plain:
            values = np.array(data[:, start:stop], np.float64 if data.dtype.itemsize == 8 else np.float32)
        else:
            values = self._numbers(data, start, stop)
        values = torch.from_numpy(values)
        return values[0] if is_row else values

    def _numbers(self, data, start, stop):
        """Return columns ``[start, stop)`` of packed rows. The library takes several times as much memory as it returns."""
        values = np.empty((len(data), stop - start), np.float32)
        first, last = start // self._block, -(-stop // self._block)
        step = max(AT_ONCE // max(stop - start, 1), 1)
        for low in range(0, len(data) if values.size else 0, step):
            blocks = self._dequantise(data[low:low + step, first * self._block_bytes:last * self._block_bytes])
            values[low:low + step] = blocks[:, start - first * self._block:stop - first * self._block]
        return values

    def _dequantise(self, packed):
        return self._library.dequantize(packed, self._tensor.tensor_type)


class _Unpermuted:
    """Rows of queries or keys in the order of the pairs ``(i, i + N/2)`` of each head; llama.cpp turns neighbours."""

    def __init__(self, slices, head_dim):
        self._slices, self._head_dim = slices, head_dim
        self.get_shape, self.get_dtype = slices.get_shape, slices.get_dtype

    def __getitem__(self, rows):
        low, high, _ = rows.indices(self.get_shape()[0])
        first, last, size = low // self._head_dim, -(-high // self._head_dim), self._head_dim
        heads = self._slices[first * size:last * size].unflatten(0, (last - first, size // 2, 2))
        return heads.transpose(1, 2).flatten(0, 2)[low - first * size:high - first * size]


def _open(library, path):
    """Return what reads a file's index; its numbers stay on disk until they are asked for."""
    try:
        reader = library.GGUFReader(path)
    except OSError:
        raise
    except Exception as error:  # of whatever kind a damaged file leads to
        raise DataError(f"{path}: not a GGUF file that the gguf package can read ({error!r})") from error
    if reader.byte_order != "I":
        raise DataError(f"{path}: in the byte order of other machines: turn it with gguf-convert-endian of the gguf package")
    return reader


def _gguf_library():
    """Import the gguf library, which is optional."""
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ConfigError(f"GGUF files need the gguf package ({error}): pip install 'mpillm[gguf]'") from error
    return gguf
