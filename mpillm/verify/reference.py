"""The serial reference: the same model in plain PyTorch, on one process, with PyTorch's own autograd and optimiser.

It shares with the rest of mpillm only the initial values and the configuration, so that ``verify`` compares two
independent computations.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

from mpillm.model.parameters import initial_values, parameters

NOT_COUNTED = -100  # a target that is none
_gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"swiglu": F.silu, "geglu": _gelu_tanh, "gelu": F.gelu, "gelu_tanh": _gelu_tanh, "relu": F.relu}


class Reference:
    """A serial model: ``parameters`` by name, and ``loss`` of a batch.

    Parameters
    ----------
    model : mpillm.model.description.Model
    seed : int
    dtype : torch.dtype
    """

    def __init__(self, model, seed, dtype=torch.float64):
        self.model, self.parameters = model, {}
        for name, parameter in parameters(model).items():
            values = torch.from_numpy(initial_values(parameter, seed, 0, parameter.size)).view(parameter.shape)
            self.parameters[name] = values.to(dtype).requires_grad_()

    def logits(self, inputs, documents_BS=None, lengths_B=None):
        """Return ``[B, S, V]`` of tokens ``[B, S]`` or patches ``[B, S, P]``; ``[B, V]`` where one answer a sequence is read.

        Positions see those that the model lets them, of the same document if documents are given, and none behind a
        sequence's length."""
        x_BSD = self._embed(inputs)
        if lengths_B is not None:
            documents_BS = torch.arange(x_BSD.shape[1]) >= lengths_B[:, None]
        mask = self._mask(x_BSD.shape[1], documents_BS)
        for i in range(self.model.num_layers):
            x_BSD = self._layer(f"layers.{i}", x_BSD, mask)
        return self._head(x_BSD, lengths_B)

    def loss(self, inputs, targets, documents_BS=None, lengths_B=None):
        """Return the mean loss over all targets that count: cross-entropy where they are words or labels and not -100,
        squared error or a Gaussian's negative log-likelihood where they are real and not NaN."""
        found = self.logits(inputs, documents_BS, lengths_B)
        if self.model.head != "values":
            return F.cross_entropy(found.flatten(0, -2), targets.flatten(), ignore_index=NOT_COUNTED)
        targets, counted = targets.flatten(), ~targets.flatten().isnan()
        if self.model.value_loss == "squared":
            return F.mse_loss(found.flatten()[counted], targets[counted])
        mean, log_variance = found.unflatten(-1, (-1, 2)).flatten(0, -2)[counted].unbind(-1)
        return F.gaussian_nll_loss(mean, targets[counted], log_variance.exp(), full=True, eps=1e-300)

    def _embed(self, inputs):
        model, weights = self.model, self.parameters
        if model.inputs == "patches":
            x_BSD = inputs @ weights["patches.weight"]
            if model.class_position:
                x_BSD = torch.cat((weights["class_position.weight"].expand(len(inputs), 1, -1), x_BSD), 1)
        else:
            x_BSD = weights["embedding.weight"][inputs]
        x_BSD = x_BSD * model.embedding_scale
        if model.positions == "learned":
            x_BSD = x_BSD + weights["positions.weight"][:x_BSD.shape[1]]
        if model.inputs == "patches":
            x_BSD = x_BSD + weights["patches.bias"]
        return self._norm("embedding_norm", x_BSD) if model.embedding_norm else x_BSD

    def _mask(self, positions, documents_BS):
        """Return who (rows) sees whom (columns), broadcast over sequences and heads."""
        model, place = self.model, torch.arange(positions)
        distance = place[:, None] - place
        mask = distance >= 0 if model.attention == "causal" else torch.ones_like(distance, dtype=torch.bool)
        if model.window is not None:
            mask = mask & (distance.abs() < model.window)
        if documents_BS is not None:
            mask = (mask & (documents_BS[:, :, None] == documents_BS[:, None, :]))[:, None]
        return mask

    def _layer(self, name, x, mask):
        model = self.model
        if model.residual == "parallel":
            return (x + self._attention(f"{name}.attention", self._norm(f"{name}.attention_norm", x), mask)
                    + self._ffn(f"{name}.ffn", self._norm(f"{name}.ffn_norm", x)))
        for norm, part in ((f"{name}.attention_norm", lambda y: self._attention(f"{name}.attention", y, mask)),
                           (f"{name}.ffn_norm", lambda y: self._ffn(f"{name}.ffn", y))):
            if model.norm_placement == "pre":
                x = x + part(self._norm(norm, x))
            elif model.norm_placement == "post":
                x = self._norm(norm, x + part(x))
            else:
                x = x + self._norm(norm, part(x))
        return x

    def _attention(self, name, x_BSD, mask):
        model = self.model
        q, k, v = (self._linear(f"{name}.{part}", x_BSD) for part in ("query", "key", "value"))
        if model.qk_norm == "whole":
            q, k = self._rms(f"{name}.query_norm", q), self._rms(f"{name}.key_norm", k)
        q, k, v = (y.unflatten(-1, (-1, model.head_dim)).transpose(1, 2) for y in (q, k, v))  # [B, heads, S, N]
        if model.qk_norm == "head":
            q, k = self._rms(f"{name}.query_norm", q), self._rms(f"{name}.key_norm", k)
        if model.positions == "rotary":
            q, k = self._rotate(q), self._rotate(k)
        k, v = (y.repeat_interleave(model.num_heads // model.num_kv_heads, dim=1) for y in (k, v))
        scores = (q @ k.transpose(2, 3)) / model.head_dim ** 0.5
        o = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        return self._linear_of_rows(f"{name}.output", o.transpose(1, 2).flatten(2))

    def _ffn(self, name, x):
        up = self._linear(f"{name}.up", x)
        act = ACTIVATIONS[self.model.ffn]
        inner = act(self._linear(f"{name}.gate", x)) * up if self.model.is_gated else act(up)
        return self._linear_of_rows(f"{name}.down", inner)

    def _head(self, x, lengths_B):
        model, weights = self.model, self.parameters
        if model.has_final_norm:
            x = self._norm("norm", x)
        if model.head == "masked":
            x = self._norm("head.norm", ACTIVATIONS[model.ffn](self._linear("head.transform", x)))
        if model.pooler:
            x = torch.tanh(self._linear("head.transform", x))
        if model.pooling != "none":
            lengths = [x.shape[1]] * len(x) if lengths_B is None else lengths_B.tolist()
            pool = {"first": lambda row, n: row[0], "last": lambda row, n: row[n - 1], "mean": lambda row, n: row[:n].mean(0)}
            x = torch.stack([pool[model.pooling](row, n) for row, n in zip(x, lengths)])
        logits = F.linear(x, weights["embedding.weight" if model.tie_embeddings else "head.weight"], weights.get("head.bias"))
        return model.logit_softcap * torch.tanh(logits / model.logit_softcap) if model.logit_softcap else logits

    def _linear(self, name, x):
        return F.linear(x, self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias"))

    def _linear_of_rows(self, name, x):
        """Multiply with a weight that is stored input-first."""
        return F.linear(x, self.parameters[f"{name}.weight"].T, self.parameters.get(f"{name}.bias"))

    def _norm(self, name, x):
        if self.model.norm == "rms":
            return self._rms(name, x)
        return F.layer_norm(x, x.shape[-1:], self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"],
                            self.model.norm_eps)

    def _rms(self, name, x):
        weight = self.parameters[f"{name}.weight"]
        return F.rms_norm(x, x.shape[-1:], 1 + weight if self.model.norm_offset else weight, self.model.norm_eps)

    def _rotate(self, x_BHSN):
        dim, scaling = self.model.rotary_dim, self.model.rope_scaling
        wavelengths = 2 * math.pi * self.model.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        scale = 1.0
        if scaling is not None:
            wavelengths, scale = SCALINGS[scaling.kind](wavelengths, scaling, self.model.rope_theta)
        angles = 2 * math.pi * torch.arange(x_BHSN.shape[2], dtype=torch.float64)[:, None] / wavelengths
        turn = torch.polar(torch.full_like(angles, scale), angles)
        turned = torch.complex(x_BHSN[..., :dim // 2].double(), x_BHSN[..., dim // 2:dim].double()) * turn
        return torch.cat((turned.real.to(x_BHSN.dtype), turned.imag.to(x_BHSN.dtype), x_BHSN[..., dim:]), -1)


# How scalings lengthen the waves of rotary positions: the new wavelengths, and a factor on queries and keys each.


def _lengthen_linear(wavelengths, scaling, theta):
    return wavelengths * scaling.factor, 1.0


def _lengthen_llama3(wavelengths, scaling, theta):
    """As in Llama 3.1: short waves stay, long ones are lengthened, between them the rates go over from one to the other."""
    short = scaling.original_max_seq_len / scaling.high_freq_factor
    long = scaling.original_max_seq_len / scaling.low_freq_factor
    smooth = ((scaling.original_max_seq_len / wavelengths - scaling.low_freq_factor)
              / (scaling.high_freq_factor - scaling.low_freq_factor))
    between = 1 / ((1 - smooth) / (wavelengths * scaling.factor) + smooth / wavelengths)
    lengthened = torch.where(wavelengths > long, wavelengths * scaling.factor, between)
    return torch.where(wavelengths < short, wavelengths, lengthened), 1.0


def _lengthen_yarn(wavelengths, scaling, theta):
    """As in YaRN (Peng et al. 2023): a ramp over the pairs between those that make ``beta_fast`` and ``beta_slow`` turns."""
    dim = 2 * len(wavelengths)

    def pair_of(turns):
        return dim / 2 * math.log(scaling.original_max_seq_len / (2 * math.pi * turns), theta)

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    rates = ramp / (scaling.factor * wavelengths) + (1 - ramp) / wavelengths
    factor = 0.1 * math.log(scaling.factor) + 1 if scaling.attention_factor is None else scaling.attention_factor
    return 1 / rates, factor


SCALINGS = {"linear": _lengthen_linear, "llama3": _lengthen_llama3, "yarn": _lengthen_yarn}


def make_optimizer(train, groups):
    """Return PyTorch's optimiser of the ``[train]`` section over parameter groups."""
    adam = {"betas": train.betas, "eps": train.eps, "fused": True}
    kind, options = {
        "adamw": (torch.optim.AdamW, adam),
        "adam": (torch.optim.Adam, adam),
        "sgd": (torch.optim.SGD, {"momentum": train.momentum, "fused": True}),
        "rmsprop": (torch.optim.RMSprop, {"alpha": train.betas[1], "eps": train.eps, "momentum": train.momentum,
                                          "foreach": True}),
        "adagrad": (torch.optim.Adagrad, {"eps": train.eps, "fused": True}),
    }[train.optimizer]
    return kind(groups, lr=train.lr, **options)
