"""Pictures of collectives: latency and bandwidth against size."""

from mpillm.report.figures import LIGHT_GREY, STYLE

# of Okabe and Ito (2008), which colour-blind people can tell apart
LINES = {
    "mpillm": ("#0072B2", "o", "mpillm, in a window"), "mpillm-copy": ("#56B4E9", "s", "mpillm, elsewhere"),
    "mpillm-bound-window": ("#009E73", "v", "in a window, bound"), "mpillm-bound": ("#CC79A7", "D", "elsewhere, bound"),
    "mpi": ("#D55E00", "^", "MPI library"), "gloo": ("#777777", "x", "PyTorch, gloo"),
}
_WIDTH_IN, _COLUMN_IN, _HEIGHT_IN = 0.8, 2.1, 3.6


def draw_collectives(rows):
    """Return a figure of the rows of ``bench collectives``: a column an operation, a line an implementation.

    Local. Needs matplotlib. Rows of candidates are left out.
    """
    import matplotlib
    from matplotlib.figure import Figure

    operations = list(dict.fromkeys(row["op"] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH_IN + _COLUMN_IN * len(operations), _HEIGHT_IN), layout="constrained")
        axes = figure.subplots(2, len(operations), sharex=True, sharey="row", squeeze=False)
        for column, op in enumerate(operations):
            for impl, (colour, marker, label) in LINES.items():
                own = [row for row in rows if (row["op"], row["impl"]) == (op, impl)]
                style = {"color": colour, "marker": marker, "label": label, "markersize": 3, "linewidth": 1}
                sizes = [row["bytes"] for row in own]
                axes[0][column].loglog(sizes, [row["median_s"] * 1e6 for row in own], **style)
                axes[1][column].loglog(sizes, [row["bandwidth_bytes_per_s"] / 1e9 for row in own], **style)
            axes[0][column].set_title(op)
            axes[1][column].set_xlabel("bytes")
            for panel in axes[:, column]:
                panel.grid(color=LIGHT_GREY, linewidth=0.3)
                panel.set_xscale("log", base=2)
        axes[0][0].set_ylabel("median, µs")
        axes[1][0].set_ylabel("bandwidth, GB/s")
        shown = LINES.keys() & {row["impl"] for row in rows}
        handles, labels = axes[0][0].get_legend_handles_labels()
        kept = [(handle, label) for handle, label in zip(handles, labels)
                if any(LINES[impl][2] == label for impl in shown)]
        figure.legend(*zip(*kept), loc="outside lower center", ncols=len(kept))
        return figure
