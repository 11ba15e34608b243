"""The small model that tests train, with sizes that nothing divides, and its token file."""

import itertools
import json
import random
import tarfile
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from mpillm.checkpoint.reading import Checkpoint, digest_of
from mpillm.comm.single import SingleComm
from mpillm.config import Config
from mpillm.schedules.pipeline import SCHEDULES, make_schedule
from mpillm.train.engine import Engine
from mpillm.train.learning_rate import learning_rate
from mpillm.verify import compare

MODEL = {"hidden_size": 40, "num_layers": 7, "num_heads": 5, "ffn_size": 54, "vocab_size": 257}
TRAIN = {
    "steps": 6, "seq_len": 12, "global_batch": 9, "microbatch": 2, "lr": 1e-2, "warmup_steps": 2, "grad_clip": 0.5,
    "dtype": "float64", "device": "cpu", "eval_every": 0, "checkpoint_every": 0,
}
LAYOUTS = {1: {}, 2: {"layout.data": 2}, 3: {"layout.pipeline": 3}, 4: {"layout.data": 2, "layout.tensor": 2}}
# More key/value heads than tensor ranks; fewer; and groups that straddle two ranks' query heads.
GROUPED = {
    "own": {},
    "shared": {"model.num_kv_heads": 1},
    "straddling": {"model.num_heads": 6, "model.num_kv_heads": 3, "model.head_dim": 8},
}
LAYER_NORM = {"model.norm": "layer", "model.attention_bias": True, "model.output_bias": True, "model.ffn_bias": True}
# A key or more off its default in each of the families that people know.
KNOWN = {
    "llama3": {**GROUPED["straddling"], "model.rope_theta": 100.0, "model.attention_bias": True, "model.output_bias": True,
               "model.rope_scaling": {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 8, "low_freq_factor": 0.25,
                                      "high_freq_factor": 1.0}},
    "mistral": {**GROUPED["shared"], "model.window": 5},
    "qwen2": {**GROUPED["straddling"], "model.attention_bias": True, "model.tie_embeddings": True},
    "qwen3": {**GROUPED["straddling"], "model.qk_norm": "head"},
    "gemma": {**GROUPED["shared"], "model.norm_offset": True, "model.ffn": "geglu", "model.embedding_scale": 6.3,
              "model.tie_embeddings": True},
    "olmo2": {**GROUPED["straddling"], "model.qk_norm": "whole", "model.norm_placement": "output"},
    "phi3": {"model.window": 7, "model.rope_fraction": 0.75},
    "gpt2": {**LAYER_NORM, "model.positions": "learned", "model.max_seq_len": 33, "model.ffn": "gelu_tanh",
             "model.tie_embeddings": True},
    "gpt_neox": {**LAYER_NORM, "model.head_dim": 16, "model.rope_fraction": 0.25, "model.ffn": "gelu",
                 "model.residual": "parallel"},
    "bert": {**LAYER_NORM, "model.norm_placement": "post", "model.positions": "learned", "model.max_seq_len": 21,
             "model.attention": "bidirectional", "model.ffn": "gelu", "model.embedding_norm": True, "model.head": "masked",
             "model.head_bias": True, "model.tie_embeddings": True},
}
# And what no family has, but the keys can say.
FAMILIES = {
    **KNOWN,
    "documents in a window that sees both ways": {
        "data.mask_documents": True, "model.window": 4, "model.attention": "bidirectional", "model.head": "masked",
        "model.ffn": "relu", "model.ffn_bias": True},
    "norms behind, no positions, one norm of one key head": {
        **GROUPED["shared"], "model.norm_placement": "post", "model.positions": "none", "model.qk_norm": "head",
        "model.norm_offset": True},
    "capped logits with a bias, norms of the width of one key head": {
        **GROUPED["shared"], "model.logit_softcap": 0.3, "model.head_bias": True, "model.qk_norm": "whole"},
    "classes": {"model.head": "classes", "model.num_labels": 5, "model.attention": "bidirectional", "model.head_bias": True},
    "a pooler": {**LAYER_NORM, "model.norm_placement": "post", "model.head": "classes", "model.num_labels": 3,
                 "model.pooler": True, "model.attention": "bidirectional", "model.ffn": "gelu", "model.head_bias": True},
    "tags": {**GROUPED["shared"], "model.head": "tags", "model.num_labels": 7, "model.attention": "bidirectional"},
    "values": {"model.head": "values", "model.num_labels": 3, "model.value_loss": "gaussian", "model.pooling": "last",
               "model.head_bias": True},
    "means": {"model.head": "classes", "model.num_labels": 3, "model.pooling": "mean", "model.positions": "learned",
              "model.max_seq_len": 12},
    "patches": {**LAYER_NORM, "model.inputs": "patches", "model.patch_size": 11, "model.class_position": True,
                "model.positions": "learned", "model.max_seq_len": 12, "model.attention": "bidirectional",
                "model.head": "classes", "model.num_labels": 4, "model.ffn": "gelu"},
    "a series": {"model.inputs": "patches", "model.patch_size": 3, "model.head": "values"},
    "frozen up to a layer and in parts behind it, learning rates by name": {
        **LAYER_NORM, **GROUPED["straddling"], "model.qk_norm": "head", "model.norm_placement": "output",
        "train.freeze": ["embedding.*", "layers.0.*", "layers.1.attention.[qk]*", "layers.1.attention.value.weight",
                         "layers.2.ffn.up.weight", "layers.2.attention_norm.bias", "layers.3.ffn.down.*",
                         "layers.3.attention.query.bias", "norm.weight"],
        "train.lr_factors": {"layers.1.*": 0.5, "head.*": 3.0, "*.bias": 0.1}},
    "frozen tied ends, frozen products of the first layer": {
        **GROUPED["shared"], "model.tie_embeddings": True, "model.qk_norm": "whole", "model.head_bias": True,
        "train.freeze": ["embedding.*", "layers.0.attention.*", "layers.0.attention_norm.*", "layers.[12].ffn.*"]},
    "parallel, a trained embedding, all biases of a frozen layer": {
        **LAYER_NORM, "model.residual": "parallel", "model.positions": "learned", "model.ffn": "gelu",
        "train.freeze": ["positions.*", "layers.[02].*.weight", "head.*"], "train.lr_factors": {"*embedding*": 0.2}},
    "a head alone": {"model.head_bias": True, "train.freeze": ["embedding.*", "layers.*", "norm.*"]},
    "a frozen body, a pooler's bias": {
        "model.head": "classes", "model.num_labels": 3, "model.pooler": True, "model.attention": "bidirectional",
        "train.freeze": ["embedding.*", "layers.*", "norm.*", "head.transform.weight"]},
    "yarn": {
        "model.rope_theta": 100.0,
        "model.rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 16, "beta_fast": 2.0, "beta_slow": 0.5}},
}


def tiny(overrides=None, ranks=None):
    """Return the small configuration with dotted overrides, resolved if a rank count is given."""
    config = Config.from_dict({"model": MODEL, "train": TRAIN, "data": {"path": "no such file"}}, overrides)
    return config if ranks is None else config.resolve(ranks)


def reference_steps(config, steps, comm):
    """Return the batches and, on rank 0, what the serial reference makes of them."""
    batches = compare.batches(config, steps)
    reference = compare.ReferenceTrainer(config) if comm.rank == 0 else None
    return batches, [reference.step(*batch) if reference else None for batch in batches]


def train(engine, steps, first=1):
    """Train an engine on the random batches ``first ...`` of its configuration; return losses and norms."""
    train, found = engine.config.train, []
    for step, batch in enumerate(compare.batches(engine.config, first + steps - 1)[first - 1:], first):
        found.append(engine.train_step(batch.part, learning_rate(train, step), counted=compare.counted(batch.targets)))
    return found


def alone(config, comm, steps):
    """Return losses, norms and whole weights of the run of one rank, computed on rank 0."""
    found = None
    if comm.rank == 0:
        engine = Engine(config.resolve(1), SingleComm())
        history = train(engine, steps)
        found = history, {name: ranges[0][1].clone() for name, ranges in engine.weight_ranges().items()}
    return comm.bcast(found)


def representative(layouts):
    """Choose few layouts in which every choice of degrees meets every other setting it can have."""
    left, kept, met = list(layouts), [], set()
    wanted = set().union(*map(_pairs_of_degrees, left))
    while not wanted <= met:
        kept.append(max(left, key=lambda config: (len(_pairs_of_degrees(config) - met), len(_pairs(config) - met))))
        left.remove(kept[-1])
        met |= _pairs(kept[-1])
    return kept


def _pairs(config):
    layout = config.layout
    settings = {"degrees": (layout.data, layout.pipeline, layout.tensor), "schedule": layout.schedule,
                "zero": layout.zero, "sequence_parallel": layout.sequence_parallel, "recompute": layout.recompute}
    return set(itertools.combinations(settings.items(), 2))


def _pairs_of_degrees(config):
    return {pair for pair in _pairs(config) if pair[0][0] == "degrees"}


def one_for_every_degrees(config, ranks):
    """Return one layout of every choice of degrees, with uncommon settings."""
    layouts = representative(compare.all_layouts(config, ranks))
    return list({tuple(found.layout.sizes().values()): found for found in layouts}.values())


def asked_at_random(seed, ranks):
    """Return a small configuration of which somebody fixed some keys, well or badly, and left the others open."""
    rng = random.Random(seed)
    layers, heads, batch = rng.randint(1, 8), rng.randint(1, 6), rng.randint(1, 12)
    is_exact, pipeline = rng.random() < 0.3, rng.choice([p for p in range(1, ranks + 1) if ranks % p == 0])
    chunks = rng.randint(1, 3)
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    cuts = sorted(rng.sample(range(1, layers), min(layers, pipeline * chunks) - 1))
    parts = sorted(rng.sample(range(1, batch), min(batch, rng.choice(divisors)) - 1))
    choices = {
        "data": rng.choice(divisors), "pipeline": pipeline, "tensor": rng.choice(divisors), "chunks": chunks,
        "order": rng.sample(["data", "pipeline", "tensor"], 3), "stage_cuts": cuts,
        "schedule": rng.choice([*SCHEDULES, str(make_schedule("gpipe", pipeline, rng.randint(1, 3)))]),
        "zero": rng.randint(0, 1), "sequence_parallel": rng.random() < 0.5,
        "recompute": rng.choice(["none", "selective", [rng.choice(["none", "full"]) for _ in range(layers)]]),
        "shares": [high - low for low, high in itertools.pairwise([0, *parts, batch])],
        "bucket_cuts": sorted(rng.sample(range(layers + 1), rng.randint(0, layers))),
    }
    microbatch = rng.choice([1, 2, 3] if is_exact else [1, 2, 3, None, None])
    train = {**TRAIN, "global_batch": batch, "numerics": "exact" if is_exact else "fast", "microbatch": microbatch}
    return Config.from_dict({
        "model": {**MODEL, "num_layers": layers, "num_heads": heads, "head_dim": 8},
        "train": {key: value for key, value in train.items() if value is not None},
        "layout": {key: value for key, value in choices.items() if rng.random() < 0.25},
    })


def with_layout(config, **layout):
    """Return a configuration with some layout keys replaced, not resolved."""
    return replace(config, layout=replace(config.layout, **layout))


def write_token_file(path, tokens=600, validation=200, vocab_size=257, seed=0, largest=None):
    """Write a token file by h5py alone: random tokens up to ``largest``, in documents of uneven length."""
    generator = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        file.attrs.update(tokenizer="bytes", vocab_size=vocab_size, end=vocab_size - 1)
        file["tokenizer"] = '{"mpillm_tokenizer": "bytes"}'
        for split, count in (("train", tokens), ("validation", validation)):
            group = file.create_group(split)
            limit = vocab_size if largest is None else largest + 1
            group["tokens"] = generator.integers(0, limit, count).astype(np.uint16)
            group["documents"] = np.arange(0, count, 17, dtype=np.uint64)
            group.attrs["bytes"] = 3 * count
    return path


def configure(path, name, **more):
    """Return the overrides of the run ``name`` below ``path``, which has the tokens."""
    return {"data.path": str(path / "tokens.h5"), "train.run_dir": str(path / name), "train.lr_schedule": "cosine",
            "model.num_layers": 4, **more}


def everything(path, name):
    """Return all tensors of the newest checkpoint of a run, joined."""
    source = Checkpoint(path / name)
    return {(kind, tensor): source.read(tensor, kind) for kind in source.tensors for tensor in source.names(kind)}


def same(path, one, other):
    """Tell whether two runs' newest checkpoints hold the same bytes."""
    left, right = everything(path, one), everything(path, other)
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


def unpack(version, folder, lacks=()):
    """Unpack the files that a version wrote (see ``data/README.rst``), without the keys that ``lacks`` names."""
    with tarfile.open(Path(__file__).parent / "data" / f"{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    path = next(folder.glob("run/checkpoints/step-*/manifest.json"))
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    for part in (manifest, manifest["model"], manifest["data"]):
        for key in lacks:
            part.pop(key, None)
    path.write_text(json.dumps({**manifest, "sha256": digest_of(manifest)}))
    path = folder / "run" / "config.toml"
    kept = [line for line in path.read_text().splitlines() if line.split(" ")[0] not in lacks]
    path.write_text("\n".join(kept))
