"""What a run obeys: the layout, and which algorithm each collective takes; beside it what was predicted."""

from bisect import bisect_left
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import StrictInt

from mpillm.errors import ConfigError
from mpillm.files import write_json
from mpillm.model.description import Model, in_keys_of_today
from mpillm.plain import KNOWN_KEYS, checked, load_json
from mpillm.schedules.algorithm import COMPOSED, LIBRARY, PADDED, PIECES, WHOLE, WINDOW, Algorithm
from mpillm.schedules.generators import ALGORITHMS

ANY = "*"
IN_WINDOW = "window"  # the sixth item of a row for tensors that lie in a window


@dataclass(frozen=True)
class DecisionTable:
    """Which algorithm a collective takes: that of the first row, by size, that the message fits into.

    Attributes
    ----------
    rows : tuple of (op, axis, dtype, up_to_bytes, algorithm) or (op, axis, dtype, up_to_bytes, algorithm, "window")
        ``axis`` and ``dtype`` may be ``"*"``; rows that name the dtype go before those that name the axis, these before
        the others. ``up_to_bytes`` of the whole vector, ``None`` without a limit. ``algorithm`` is the text of an
        :class:`~mpillm.schedules.algorithm.Algorithm`; ``"two_level"`` takes shared memory inside nodes where it can,
        ``"padded:M"`` and ``"pieces:M"`` what the table says for a message of M bytes. Rows that end in ``"window"`` hold
        for tensors that lie in one; where an operation has none, the others hold for these as well.
    """

    __pydantic_config__ = KNOWN_KEYS
    rows: tuple[tuple, ...]

    def choose(self, op, axis, dtype, n_bytes, in_window=False):
        """Return the algorithm for a message; ``"mpi"`` where no row fits. Local."""
        limits, algorithms = self.choices(op, axis, dtype, in_window)
        return str(algorithms[bisect_left(limits, n_bytes)])

    def choices(self, op, axis, dtype, in_window=False):
        """Return limits in bytes, the last infinite, and the :class:`Algorithm` up to each. Local."""
        for where in ((IN_WINDOW,), ()) if in_window else ((),):
            for key in ((op, axis, dtype), (op, ANY, dtype), (op, axis, ANY), (op, ANY, ANY)):
                if (*key, *where) in self._limits:
                    return self._limits[(*key, *where)]
        return [float("inf")], [Algorithm(LIBRARY)]

    @cached_property
    def _limits(self):
        found = {}
        for op, axis, dtype, limit, algorithm, *where in self.rows:
            limits, algorithms = found.setdefault((op, axis, dtype, *where), ([], []))
            limits.append(float("inf") if limit is None else limit)
            algorithms.append(Algorithm.parse(algorithm))
        for limits, algorithms in found.values():
            if limits != sorted(limits):
                raise ConfigError(f"decision table: limits {limits} of one operation are not in ascending order")
            if limits[-1] != float("inf"):
                limits.append(float("inf"))
                algorithms.append(Algorithm(LIBRARY))
            others = [algorithm for algorithm in algorithms if algorithm.n_bytes]
            nested = [str(other) for other in others if algorithms[bisect_left(limits, other.n_bytes)].n_bytes]
            if nested:
                raise ConfigError(f"decision table: {', '.join(nested)}: for that many bytes the table has no "
                                  "algorithm, but another size to go by: name a size that has one")
        return found

    def __post_init__(self):
        for row in self.rows:
            is_row = len(row) >= 5 and row[5:] in ((), (IN_WINDOW,)) and row[0] in OPERATIONS
            if not is_row or not (row[3] is None or isinstance(row[3], int)):
                raise ConfigError(f"decision table: row {list(row)}: needs [op, axis, dtype, up_to_bytes or null, "
                                  f'algorithm], and "{IN_WINDOW}" at its end if it is for tensors in a window')
            names = [LIBRARY, WINDOW, *ALGORITHMS[row[0]], *([COMPOSED] if row[0] == "allreduce" else [])]
            if row[4] not in names and not (row[0] in WHOLE and Algorithm.parse(row[4]).n_bytes):
                names += [f"{PADDED}:BYTES", f"{PIECES}:BYTES"] if row[0] in WHOLE else []
                raise ConfigError(f"decision table: row {list(row)}: {row[0]} has no algorithm {row[4]}; known are "
                                  f"{', '.join(names)}")

    def to_dict(self):
        """Return the table as what JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values):
        """Read what :meth:`to_dict` wrote.

        Raises
        ------
        ConfigError
            If a row has another form or names an algorithm that its operation does not have.
        """
        return checked(cls, values, "decision table")


# Without a measured one: small messages by the library, others through shared memory where ranks share a node. The
# limits are where shared memory began to win for two ranks under MPICH 5.0.2, on tensors of a rank's own and in windows.
OPERATIONS = ("allreduce", "reduce_scatter", "allgather", "bcast", "alltoall", "scatter", "gather")
_BY_LIBRARY_BYTES = {"allreduce": 1 << 13, "reduce_scatter": 1 << 13, "allgather": 1 << 16, "bcast": 1 << 15,
                     "alltoall": 1 << 17, "scatter": 1 << 18, "gather": 1 << 18}
_IN_WINDOW_BYTES = {"allreduce": 1 << 13, "reduce_scatter": 0, "allgather": 1 << 13, "bcast": 1 << 12, "alltoall": 1 << 17}
DEFAULT_TABLE = DecisionTable(tuple(
    row for limits, where in ((_BY_LIBRARY_BYTES, ()), (_IN_WINDOW_BYTES, (IN_WINDOW,))) for op, limit in limits.items()
    for row in ((op, ANY, ANY, limit, LIBRARY, *where), (op, ANY, ANY, None, WINDOW, *where))
))


@dataclass(frozen=True)
class Plan:
    """What a run on ``num_ranks`` ranks, on ``num_nodes`` nodes, obeys.

    Attributes
    ----------
    table : DecisionTable
    model : dict
        The model it was made for; empty for any.
    layout : dict
        Keys of ``[layout]`` and ``microbatch``; empty to leave the configuration's.
    predicted : dict
        ``step_s`` and its parts, ``bubble_fraction``, ``memory_bytes_per_rank``, ``lower_bound_s``, and ``stages``: of
        every stage and microbatch ``forward_s input_s weight_s``, and ``message_s link_s shares_link microbatches``;
        ``buckets`` of gradients, ``stage algorithm in_window n_bytes``, and where they are reduced beside backward
        ``left_s time_s busy_s``; ``activations`` that tensor ranks exchange, ``operation algorithm in_window n_bytes``;
        and ``volume``: what all ranks send in a step, ``axis operation bytes``.
    binding : list of dict
        ``what value limit price_s_per_unit``: what limits the step, and what a unit more of it is worth.
    alternatives : list of dict
        ``layout step_s memory_bytes_per_rank`` of the next best.
    tried : list of dict
        ``layout predicted_s measured_s`` of the plans that were run for a few steps before this one was taken.
    """

    __pydantic_config__ = KNOWN_KEYS
    num_ranks: StrictInt
    num_nodes: StrictInt
    table: DecisionTable = DEFAULT_TABLE
    model: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    predicted: dict[str, Any] = field(default_factory=dict)
    binding: list[dict] = field(default_factory=list)
    alternatives: list[dict] = field(default_factory=list)
    tried: list[dict] = field(default_factory=list)

    def check(self, num_ranks, num_nodes):
        """Refuse a launch that the plan was not made for.

        Raises
        ------
        ConfigError
            Naming both.
        """
        if (self.num_ranks, self.num_nodes) != (num_ranks, num_nodes):
            raise ConfigError(
                f"the plan is for {self.num_ranks} ranks on {self.num_nodes} nodes, this launch has {num_ranks} on "
                f"{num_nodes}: make another with mpillm plan --ranks {num_ranks}, from mpillm probe under this launch"
            )

    def applied_to(self, config):
        """Return the configuration with the plan's layout.

        Local.

        Raises
        ------
        ConfigError
            If the plan is for another model, or the configuration asks for another layout.
        """
        if not self.layout:
            return config
        asked = {**{f"layout.{key}": value for key, value in asdict(config.layout).items()},
                 "train.microbatch": config.train.microbatch}
        planned = {**{f"layout.{key}": value for key, value in self.layout.items() if key != "microbatch"},
                   "train.microbatch": self.layout.get("microbatch")}
        planned = {key: value for key, value in planned.items() if value is not None}
        other = self._other_model(config.model) + [
            (key, asked[key], value) for key, value in planned.items() if asked.get(key) not in (None, "auto", value)
            and not (isinstance(asked[key], tuple) and list(asked[key]) == value)]
        if other:
            shown = "; ".join(f"{key} = {value} (the plan: {of_plan})" for key, value, of_plan in other)
            raise ConfigError(f"the plan is for another run: {shown}; make one for this configuration")
        return config.with_values(planned)

    def _other_model(self, model):
        """Return the keys in which a model is not the one of the plan, with both values. One that the plan lacks has its
        default there; sizes may be unknown until the data say them."""
        if not self.model:
            return []
        planned, asked = asdict(checked(Model, in_keys_of_today(self.model, "the plan"), "the plan: model")), asdict(model)
        return [(f"model.{key}", asked[key], value) for key, value in planned.items() if asked[key] != value
                and not (key in ("vocab_size", "num_labels") and None in (asked[key], value))]

    def save(self, path):
        """Write the plan as JSON."""
        write_json(path, asdict(self))

    @staticmethod
    def path_for(path, ranks):
        """Return where the plan beside ``path`` for another number of ranks is kept. Local."""
        return Path(path).with_suffix(f".{ranks}-ranks.json")

    @classmethod
    def load(cls, path, ranks=None):
        """Read what :meth:`save` wrote; where that is for other than ``ranks``, and one beside it for them, that.

        Raises
        ------
        ConfigError
            If the file is missing or no plan.
        """
        made = load_json(cls, path, "plan", "give a file that mpillm plan wrote")
        if ranks not in (None, made.num_ranks) and cls.path_for(path, ranks).is_file():
            return cls.load(cls.path_for(path, ranks))
        return made
