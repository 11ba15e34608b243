"""``mpillm calibrate``: fit the cost model to measured iterations, and predict others."""

import click

from mpillm.cli.options import write_json


@click.command("calibrate")
@click.option("--measured", required=True, type=click.Path(), metavar="A.csv", help="rows with iteration_ms")
@click.option("--predict", required=True, type=click.Path(), metavar="B.csv", help="rows to predict")
@click.option("--json", "output", metavar="FILE|-", help="write what came out there, - for standard output")
def command(measured, predict, output):
    """Fit rates to the iterations of A.csv by a linear program, and predict those of B.csv."""
    import numpy as np

    from mpillm.planner import calibrate

    found = calibrate.calibrate(calibrate.read_rows(measured, is_measured=True))
    rows = calibrate.read_rows(predict, is_measured=False)
    predicted_ms = found.predict_s(rows) * 1e3
    known = rows.get(calibrate.MEASURED)
    error = None if known is None else float(np.mean(np.abs(predicted_ms / known - 1)))
    coefficients = {f"{'several nodes' if across else 'one node'}: {name}": value
                    for across, values in found.coefficients.items() for name, value in values.items()}
    if output:
        write_json(output, {"coefficients": coefficients, "predictions": predicted_ms.tolist(), "mape": error})
    if output != "-":
        for name, value in coefficients.items():
            if value:
                click.echo(f"{name}: {value:.4g}")
        text = "" if error is None else f", mean absolute error {100 * error:.2f} %"
        click.echo(f"{len(predicted_ms)} rows predicted{text}")
