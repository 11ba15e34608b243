"""What ``config.json`` says of rotary positions, in the words of older and newer releases of ``transformers``."""

import math
from dataclasses import dataclass

from mpillm.hf.folder import Refused

TABLES = ("rope_scaling", "rope_parameters")  # of older and newer releases; the first wins
# Keys of [model] rope_scaling, by the keys of such a table.
SCALINGS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", "original_max_position_embeddings": "original_max_seq_len",
               "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
    "yarn": {"factor": "factor", "original_max_position_embeddings": "original_max_seq_len",
             "attention_factor": "attention_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow",
             "truncate": "truncate"},
}


@dataclass(frozen=True)
class Rope:
    """How the files of a family tell of rotary positions.

    Attributes
    ----------
    kinds : tuple of str
        The scalings that the family's class computes.
    theta, fraction : tuple of str
        Keys of the base and of the share of a head that is turned, without which whole heads are. The first is read and
        written; others of older releases must say the same.
    default_fraction : float
    """

    kinds: tuple = tuple(SCALINGS)
    theta: tuple = ("rope_theta",)
    fraction: tuple = ()
    default_fraction: float = 1.0

    @property
    def keys(self):
        """The keys of ``config.json`` that are read."""
        return (*TABLES, *self.theta, *self.fraction, "partial_rotary_factor")

    def read(self, values):
        """Return the keys of ``[model]`` that the values of a ``config.json`` say.

        Raises
        ------
        Refused
            If mpillm does not compute it.
        """
        name, table = next(((name, values[name]) for name in TABLES if values.get(name)), ("rope_parameters", {}))
        if not isinstance(table, dict):
            raise Refused(name, table, "not a table")
        kind = table.get("rope_type", table.get("type", "default"))
        if kind not in [*self.kinds]:
            raise Refused(name, table, f"mpillm computes rope_type {', '.join(self.kinds)} here: convert another model")
        known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *SCALINGS[kind],
                 *(("mscale", "mscale_all_dim") if kind == "yarn" else ())}
        for key, value in table.items():
            if key not in known and value is not None:
                raise Refused(name, table, f"mpillm does not know {key} of rope_type {kind}: convert another model")
        model = {"rope_theta": _said(values, table, self.theta, "rope_theta", 10000.0),
                 "rope_fraction": _said(values, table, self.fraction or ("partial_rotary_factor",), "partial_rotary_factor",
                                        self.default_fraction)}
        if model["rope_fraction"] != 1 and not self.fraction:
            raise Refused("partial_rotary_factor", model["rope_fraction"], "here whole heads are turned: convert another model")
        return {**model, "rope_scaling": _scaling(kind, table, values)} if kind != "default" else model

    def write(self, model):
        """Return what ``config.json`` says of a model: for newer releases one table, for older ones keys beside each other."""
        kind = model.rope_scaling.kind if model.rope_scaling else "default"
        scaling = {theirs: getattr(model.rope_scaling, ours) for theirs, ours in SCALINGS[kind].items()}
        scaling = {"rope_type": kind, **{key: value for key, value in scaling.items() if value is not None}}
        table = {**scaling, "rope_theta": model.rope_theta}
        written = {self.theta[0]: model.rope_theta, "rope_scaling": scaling if kind != "default" else None}
        if self.fraction:
            table["partial_rotary_factor"] = written[self.fraction[0]] = model.rope_fraction
        return {**written, "rope_parameters": table}


def _said(values, table, names, in_table, default):
    """Return what the table says, else the first of the names, else the default. Other names must not contradict it."""
    said = {name: values[name] for name in names if values.get(name) is not None}
    value = said.get(names[0], default)
    value = value if table.get(in_table) is None else table[in_table]
    for name in said:
        if said[name] != value:
            raise Refused(name, said[name], f"contradicts {in_table} = {value}, which transformers computes with: leave it out")
    return value


def _scaling(kind, table, values):
    """Return ``[model] rope_scaling`` of a table; what it leaves out is as in ``transformers``."""
    scaling = {ours: table[theirs] for theirs, ours in SCALINGS[kind].items() if table.get(theirs) is not None}
    if "original_max_seq_len" in SCALINGS[kind].values():
        scaling.setdefault("original_max_seq_len", values.get("max_position_embeddings"))
    try:
        if "factor" not in scaling and kind == "yarn":
            scaling["factor"] = values["max_position_embeddings"] / scaling["original_max_seq_len"]
        if "attention_factor" not in scaling and table.get("mscale") and table.get("mscale_all_dim"):
            first, second = (0.1 * table[key] * math.log(scaling["factor"]) + 1 for key in ("mscale", "mscale_all_dim"))
            scaling["attention_factor"] = first / second
    except (KeyError, TypeError, ValueError) as error:
        raise Refused("rope_parameters", table, f"not the figures of rope_type yarn ({error!r})") from None
    required = [theirs for theirs in ("factor", "low_freq_factor", "high_freq_factor") if theirs in SCALINGS[kind]]
    if missing := [theirs for theirs in required if table.get(theirs) is None and theirs not in scaling]:
        raise Refused("rope_parameters", table, f"has no {missing[0]}")
    return {"kind": kind, **scaling}
