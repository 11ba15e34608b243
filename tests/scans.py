"""What tests of scans share: elements of every operator, the sequential form, uneven divisions."""

import torch

from mpillm.scan import (
    ADD,
    AFFINE,
    AFFINE_DENSE,
    LOG_ADD,
    LOG_PLUS,
    MAX_PLUS,
    MAXIMUM,
    SOFTMAX,
    Operator,
    softmax_partials,
)

AFTER = Operator("then", lambda left, right: left * right[..., 1:] + right)  # of one's own, without an identity
# What a scan of a user's own may be: the place of a maximum, the first of equal ones.
FIRST_OF = Operator("first of", lambda left, right: tuple(
    torch.where(left[0] >= right[0], one, other) for one, other in zip(left, right)))


def elements(name, n, seed=0):
    """Return an operator and ``n`` elements for it; some are minus infinity where it knows that."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(n, *shape, generator=generator, dtype=torch.float64)

    def holes(x):
        return torch.where(torch.rand(x.shape, generator=generator) < 0.2, -torch.inf, x)

    def whole(*shape):
        return torch.randint(-9, 9, (n, *shape), generator=generator)

    return {
        "add": lambda: (ADD, draw(3)),
        "maximum": lambda: (MAXIMUM, whole(3)),
        "log_add": lambda: (LOG_ADD, holes(draw(3))),
        "affine": lambda: (AFFINE, (draw(3), draw(3))),
        "affine_dense": lambda: (AFFINE_DENSE, (draw(3, 3) / 2, draw(3))),
        "max_plus": lambda: (MAX_PLUS, holes(draw(2, 3, 3))),
        "max_plus, integers": lambda: (MAX_PLUS, torch.where(whole(3, 3) < -4, -2**62, whole(3, 3))),
        "log_plus": lambda: (LOG_PLUS, holes(draw(3, 3))),
        "softmax": lambda: (SOFTMAX, tuple(p[0] for p in softmax_partials(holes(draw(2, 4)), draw(4, 3)))),
        "first of": lambda: (FIRST_OF, (whole(), torch.arange(n))),
    }[name]()


NAMES = ("add", "maximum", "log_add", "affine", "affine_dense", "max_plus", "max_plus, integers", "log_plus", "softmax",
         "first of")


def parts_of(x):
    return x if isinstance(x, tuple) else (x,)


def like(x, parts):
    return tuple(parts) if isinstance(x, tuple) else parts[0]


def part(x, low, high):
    return like(x, [p[low:high] for p in parts_of(x)])


def sequential(operator, x):
    """Return what a loop over the elements gives."""
    found = [part(x, i, i + 1) for i in range(len(parts_of(x)[0]))]
    for i in range(1, len(found)):
        found[i] = operator.combine(found[i - 1], found[i])
    return like(x, [torch.cat(p) for p in zip(*map(parts_of, found))] or [p[:0] for p in parts_of(x)])


def divisions(n, ranks):
    """Yield borders of ``ranks`` parts of ``n`` elements: even, all on one rank, uneven."""
    yield [i * n // ranks for i in range(ranks + 1)]
    for owner in {0, ranks - 1}:
        yield [0] * (owner + 1) + [n] * (ranks - owner)
    generator = torch.Generator().manual_seed(n)
    cuts = torch.randint(0, n + 1, (ranks - 1,), generator=generator)
    yield [0, *cuts.sort().values.tolist(), n]


def equal(x, y, tolerance=0.0):
    """Tell whether all parts are equal, in all bits or nearly."""
    return all(torch.equal(a, b) if not tolerance else
               torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(parts_of(x), parts_of(y), strict=True))
