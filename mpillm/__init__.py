"""mpillm: transformer language models as MPI programs, split and scheduled by solvers.

Importing this package starts no MPI and imports no torch; the public names below are loaded on first use.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "Config": "mpillm.config",
    "Engine": "mpillm.inference.engine",
    "Machine": "mpillm.machine",
    "Mesh": "mpillm.comm.mesh",
    "Plan": "mpillm.plan",
    "Request": "mpillm.inference.requests",
    "Run": "mpillm.train.run",
    "Sampling": "mpillm.inference.requests",
    "check_adjoint": "mpillm.autograd.adjoint",
    "launch": "mpillm.comm.world",
    "make_plan": "mpillm.planner.search",
    "write_samples": "mpillm.data.labelled",
}

_ROOMS = "autograd", "comm", "scan"  # what can be used without the rest

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"mpillm.{name}")
    raise AttributeError(f"module 'mpillm' has no attribute '{name}'")


def __dir__():
    return sorted(__all__)
