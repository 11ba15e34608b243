"""The serial reference: the same model in plain PyTorch, on one process, with PyTorch's own autograd and optimiser.

It shares with the rest of mpillm only the initial values and the configuration, so that ``verify`` compares two
independent computations.
"""

import torch
import torch.nn.functional as F

from mpillm.nn.init import initial_values, parameter_table


class Reference:
    """A serial model: ``parameters`` by name, and ``loss`` of a batch.

    Parameters
    ----------
    model : mpillm.config.Model
    seed : int
    dtype : torch.dtype
    """

    def __init__(self, model, seed, dtype=torch.float64):
        self.model, self.parameters = model, {}
        for name, (shape, std) in parameter_table(model).items():
            count = int(torch.Size(shape).numel())
            values = torch.from_numpy(initial_values(name, seed, 0, count, std)).view(shape)
            self.parameters[name] = values.to(dtype).requires_grad_()

    def logits(self, tokens_BS, documents_BS=None):
        """Return ``[B, S, V]``; positions see earlier ones, of the same document if documents are given."""
        model, weights = self.model, self.parameters
        sequences, positions = tokens_BS.shape
        mask = torch.ones(positions, positions, dtype=torch.bool).tril()
        if documents_BS is not None:
            mask = (mask & (documents_BS[:, :, None] == documents_BS[:, None, :]))[:, None]
        x = weights["embedding.weight"][tokens_BS]
        for i in range(model.num_layers):
            w = {name.removeprefix(f"layers.{i}."): weight for name, weight in weights.items()
                 if name.startswith(f"layers.{i}.")}
            y = F.rms_norm(x, (model.hidden_size,), w["attention_norm.weight"], model.norm_eps)
            heads = [F.linear(y, w[f"attention.{part}.weight"]).view(sequences, positions, -1, model.head_dim)
                     .transpose(1, 2) for part in ("query", "key", "value")]
            q, k = self._rotate(heads[0]), self._rotate(heads[1])
            k, v = (t.repeat_interleave(model.num_heads // model.num_kv_heads, dim=1) for t in (k, heads[2]))
            scores = (q @ k.transpose(2, 3)) / model.head_dim ** 0.5
            o = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
            x = x + o.transpose(1, 2).reshape(sequences, positions, -1) @ w["attention.output.weight"]
            y = F.rms_norm(x, (model.hidden_size,), w["ffn_norm.weight"], model.norm_eps)
            x = x + (F.silu(y @ w["ffn.gate.weight"].T) * (y @ w["ffn.up.weight"].T)) @ w["ffn.down.weight"]
        x = F.rms_norm(x, (model.hidden_size,), weights["norm.weight"], model.norm_eps)
        return x @ weights.get("head.weight", weights["embedding.weight"]).T

    def loss(self, tokens_BS, targets_BS, documents_BS=None):
        """Return the mean cross-entropy over all targets."""
        return F.cross_entropy(self.logits(tokens_BS, documents_BS).flatten(0, 1), targets_BS.flatten())

    def _rotate(self, x_BHSN):
        half = x_BHSN.shape[-1] // 2
        rates = self.model.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(x_BHSN.shape[2], dtype=torch.float64)[:, None] * rates
        turn = torch.polar(torch.ones_like(angles), angles)
        turned = torch.complex(x_BHSN[..., :half].double(), x_BHSN[..., half:].double()) * turn
        return torch.cat((turned.real, turned.imag), -1).to(x_BHSN.dtype)


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
