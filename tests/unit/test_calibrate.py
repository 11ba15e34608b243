"""Calibration by linear programs: known rates come back, outliers do not pull, published rows are predicted."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mpillm.cli.calibrate import command
from mpillm.errors import DataError
from mpillm.planner.calibrate import COLUMNS, _in_waves, calibrate, fit_memory, fit_rates, read_rows

PUBLISHED = Path(__file__).parents[3] / "shared" / "data"


def test_known_rates_come_back_in_spite_of_outliers():
    rng = np.random.default_rng(0)
    features, known = rng.uniform(0.1, 1, (60, 4)), np.array([2.0, 0.5, 0.0, 1.0])
    measured = features @ known
    measured[::10] *= 3
    assert fit_rates(features, measured) == pytest.approx(known, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_one_rate_is_a_weighted_median(seed):
    rng = np.random.default_rng(seed)
    x, t = rng.uniform(1, 2, 9), rng.uniform(1, 3, 9)
    candidates = t / x  # the optimum of a sum of |x c / t - 1| lies at a kink
    best = min(candidates, key=lambda c: np.abs(x * c / t - 1).sum())
    assert fit_rates(x[:, None], t)[0] == pytest.approx(best)


def test_no_rate_goes_below_its_physical_bound():
    found = fit_rates(np.array([[1.0, 1.0], [1.0, 2.0]]), np.array([1.0, 1.0]), [0.0, 0.4])
    assert found[1] >= 0.4 - 1e-12 and found[0] >= 0


def test_memory_separates_what_fitted_from_what_did_not():
    rng = np.random.default_rng(1)
    features, known = rng.uniform(0, 4e9, (200, 3)), np.array([16.0, 2.0, 1.0])
    fitted = features @ known <= 40e9
    found = fit_memory(features, fitted, 40e9, 0.1e9, least=[16.0, 0.0, 0.0])
    agrees = (features @ found <= 40e9) == fitted
    assert found[0] >= 16 and agrees.mean() > 0.97


def published(name):
    """Return the rows of a file that lies beside the project."""
    if not (PUBLISHED / name).exists():
        pytest.skip(f"{name} is not part of the project")
    return read_rows(PUBLISHED / name, is_measured=True)


def errors_across(rows, fold):
    """Return how far each row is from what the rows of other folds predict, as shares; and those predictions, in seconds."""
    predicted_s = np.zeros(len(fold))
    for held in set(fold):
        others, own = ({key: values[chosen] for key, values in rows.items()} for chosen in (fold != held, fold == held))
        predicted_s[fold == held] = calibrate(others).predict_s(own)
    return np.abs(predicted_s * 1e3 / rows["iteration_ms"] - 1), predicted_s


def by_index(count):
    return np.arange(count) % 5


@pytest.mark.parametrize("fold_of", [by_index, *(lambda n, s=seed: np.random.default_rng(s).permutation(n) % 5
                                                 for seed in range(6))])
def test_published_iterations_across_nodes_are_predicted_across_folds(fold_of):
    rows = published("vtrain_multi.csv")
    errors, _ = errors_across(rows, fold_of(len(rows["gpus"])))
    assert errors.mean() < (0.05 if fold_of is by_index else 0.052)


def test_published_iterations_in_a_node_are_predicted_and_ranked_across_folds():
    rows = published("vtrain_single.csv")
    errors, predicted_s = errors_across(rows, by_index(len(rows["gpus"])))
    assert errors.mean() < 0.02
    same = list(zip(*(rows[name] for name in ("hidden", "heads", "layers", "seq", "gpus", "global_batch"))))
    groups = [np.array([i for i, one in enumerate(same) if one == kind]) for kind in set(same)]
    regrets = [rows["iteration_ms"][group[np.argsort(predicted_s[group])[:5]]].min() / rows["iteration_ms"][group].min()
               - 1 for group in groups if len(group) >= 6]
    assert len(regrets) > 40 and np.mean(regrets) < 0.003


@pytest.mark.parametrize(("name", "column", "limits"), [
    ("vtrain_single.csv", "hidden", {1024: 0.13, 2048: 0.3}),
    ("vtrain_single.csv", "gpus", {2: 0.02, 4: 0.02, 8: 0.05}),
    ("vtrain_multi.csv", "hidden", {6144: 0.035, 8192: 0.065}),
])
def test_published_iterations_of_a_size_that_was_not_measured_are_predicted(name, column, limits):
    """Each size from the others alone; the limits are what is reached. Without a constant for every layer those of a node
    were 58 and 185 % off in the hidden size, and 7 % on 8 GPUs."""
    rows = published(name)
    errors, _ = errors_across(rows, rows[column])
    found = {size: errors[rows[column] == size].mean() for size in limits}
    assert all(found[size] < limit for size, limit in limits.items()), found


def test_the_last_wave_of_tiles_counts_as_a_whole_one():
    full = 2 * 108 * 256 * 128 * 64.0
    for rows, columns, waves in ((108 * 256, 128, 1), (108 * 256, 129, 2), (108 * 256 + 1, 128, 2), (1, 1, 1)):
        assert _in_waves(rows, columns, 64) == waves * full


def write_rows(path, rows, columns):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def test_the_command_predicts_in_row_order(tmp_path):
    columns = (*COLUMNS, "iteration_ms")
    rows = [(8, 64, b, 1024, 16, 24, 1024, t, 8 // t, 1, 100.0 * b * t) for b in (1, 2, 4) for t in (1, 2)]
    write_rows(tmp_path / "a.csv", rows, columns)
    write_rows(tmp_path / "b.csv", [row[:-1] for row in rows[::-1]], COLUMNS)
    words = ["--measured", str(tmp_path / "a.csv"), "--predict"]
    found = json.loads(CliRunner().invoke(command, [*words, str(tmp_path / "b.csv"), "--json", "-"]).output)
    same = json.loads(CliRunner().invoke(command, [*words, str(tmp_path / "a.csv"), "--json", "-"]).output)
    assert found["mape"] is None and found["predictions"] == pytest.approx(same["predictions"][::-1])
    errors = np.abs(np.array(same["predictions"]) / [row[-1] for row in rows] - 1)
    assert same["mape"] == pytest.approx(errors.mean()) and same["coefficients"]


@pytest.mark.parametrize("value, text", [
    ("x", "line 2: hidden = 'x'"), ("0", "must be a positive number"), (None, "lacks"),
])
def test_bad_rows_are_refused_with_file_and_line(tmp_path, value, text):
    row = dict.fromkeys((*COLUMNS, "iteration_ms"), "8") | {"hidden": value}
    if value is None:
        del row["hidden"]
    write_rows(tmp_path / "a.csv", [list(row.values())], list(row))
    with pytest.raises(DataError, match=text):
        read_rows(tmp_path / "a.csv", is_measured=True)
