"""The checkpoint that a run goes on from: which one, and whether it may."""

import warnings
from dataclasses import asdict

from mpillm.checkpoint import reading, saving
from mpillm.data.samples import ORDERS
from mpillm.data.tokens import file_digest
from mpillm.errors import CheckpointError, ConfigError, DataError


def find_start(folder, resume):
    """Return the checkpoint to go on from, or None. Local.

    Parameters
    ----------
    folder : pathlib.Path
        Of the run.
    resume : str
        As :class:`mpillm.train.run.Run` takes it.

    Raises
    ------
    ConfigError
        Where ``resume`` contradicts what the folder holds.
    CheckpointError
        If there are complete checkpoints and none can be opened.
    """
    held = reading.complete_checkpoints(folder / "checkpoints")
    if resume == "never" and (held or (folder / "metrics.jsonl").exists()):
        raise ConfigError(
            f"--resume never: {folder} holds a run already: choose another train.run_dir, or --resume auto"
        )
    if resume in ("auto", "never"):
        left = reading.interrupted_saves(folder / "checkpoints")
        if left:
            warnings.warn(f"{folder / 'checkpoints'}: {', '.join(left)} is of a save that was interrupted; the next "
                          "save removes it", stacklevel=2)
        return newest(folder)
    start = _of_a_run(resume)
    newer = [path.name for path in held if reading.step_of(path) > start.step]
    if newer:  # they would count as the newest, and push out those of this run
        raise ConfigError(
            f"--resume {resume}: is of step {start.step}, and {folder / 'checkpoints'} holds newer ones "
            f"({', '.join(newer)}): choose another train.run_dir, or move them away"
        )
    return start


def newest(folder, before=None):
    """Return the run's newest complete checkpoint of a step below ``before`` that can be opened, or None. Local.

    Raises
    ------
    CheckpointError
        If there are some, and all are damaged; or if one is of another version, and older ones no better for it.
    DataError
        If the file system cannot read one, which may be whole.
    """
    refusal = None
    for path in reversed(reading.complete_checkpoints(folder / "checkpoints")):
        if before is None or reading.step_of(path) < before:
            try:
                return _of_a_run(path)
            except reading.OtherVersion:
                raise
            except CheckpointError as error:
                refusal = error
                warnings.warn(f"{error}: looking for an older one", stacklevel=2)
    if refusal:
        raise refusal
    return None


def give_up_from(folder, step):
    """Set aside the checkpoints of ``step`` and later, whose weights are no good, if there are older ones.

    Local.

    Returns
    -------
    str
        In words, what the next start will find.
    """
    steps = [reading.step_of(path) for path in reading.complete_checkpoints(folder)]
    older = [kept for kept in steps if kept < step]
    if not steps:
        return "there is no checkpoint: start anew with a lower train.lr, or look at the data"
    if not older:  # with none at all the next start would begin at the first step
        return (f"the last checkpoint is of step {max(steps)}, and none is of other weights: start anew with a lower "
                "train.lr and another train.run_dir, or look at the data")
    bad = saving.set_aside(folder, step)
    return (f"those saved as {', '.join(bad)} are set aside; " if bad else "") + (
        f"the last checkpoint is of step {max(older)}: start again with a lower train.lr, or look at the data from "
        "there on")


def check_same(start, config, fingerprint):
    """Refuse a checkpoint of another model, optimiser, order or length of samples, or other data. Local.

    ``fingerprint`` is that of ``config.data.path``. For a checkpoint from before there were any, the file is read whole.
    """
    check_model(start, config.model)
    saved, train = start.manifest, config.train
    if saved["optimizer"] != train.optimizer:
        raise CheckpointError(
            f"checkpoint {start.path}: holds the state of {saved['optimizer']}, this run asks for "
            f"train.optimizer = {train.optimizer}: change it, or start anew with train.init_from"
        )
    data, path = saved["data"], config.data.path
    known, found = (data["fingerprint"], fingerprint) if "fingerprint" in data else (data["sha256"], file_digest(path))
    if known != found:
        raise DataError(
            f"data.path = {path}: not the tokens that checkpoint {start.path} was trained on "
            "(their SHA-256 differ): give the same file, or start anew with train.init_from"
        )
    if order_of(saved) not in [*ORDERS]:
        raise CheckpointError(
            f"checkpoint {start.path}: its run takes samples in the order {order_of(saved)!r}, this mpillm knows "
            f"{', '.join(ORDERS)}: go on with the mpillm that wrote it, or start anew with train.init_from"
        )
    # Its place in the data would be another; what was frozen has no state to go on with.
    for key, value, wanted in (("seed", saved["seed"], train.seed),
                               ("seq_len", saved["data"].get("seq_len", train.seq_len), train.seq_len),
                               ("freeze", saved.get("freeze", []), list(train.freeze))):
        if value != wanted:
            raise CheckpointError(
                f"checkpoint {start.path}: of train.{key} = {value}, this run has {wanted}: set it back, or start anew with "
                "train.init_from"
            )


def order_of(manifest):
    """Return the order of samples of a run; a checkpoint from before there was a choice names none. Local."""
    return manifest["data"].get("order", "permutation")


def check_model(source, model):
    """Refuse a checkpoint of another model than this ``[model]`` section. Local."""
    try:
        saved = asdict(source.model_section())
    except ConfigError as error:
        raise CheckpointError(f"checkpoint {source.path}: names no model: {error}") from error
    differing = [f"{key} = {saved[key]} (this run: {value})" for key, value in asdict(model).items()
                 if saved[key] != value]
    if differing:
        raise CheckpointError(
            f"checkpoint {source.path}: of another model: {', '.join(differing)}: use the configuration "
            "of that run, or another train.run_dir"
        )


def _of_a_run(path):
    """Open a checkpoint and see that its manifest says what a run needs."""
    found = reading.Checkpoint(path)
    saved = {"skipped": 0, "skipped_in_a_row": 0, **found.manifest}
    data = saved.get("data")
    counts = [data.get("samples_seen") if isinstance(data, dict) else None, saved.get("seed"), saved["skipped"],
              saved["skipped_in_a_row"]]
    if not (all(type(count) is int and 0 <= count < 1 << 63 for count in counts)
            and saved["skipped_in_a_row"] <= saved["skipped"] <= found.step
            and isinstance(saved.get("model"), dict) and isinstance(saved.get("optimizer"), str)
            and {"fingerprint", "sha256"} & data.keys()):
        raise CheckpointError(f"checkpoint {found.path}: manifest.json does not say what a run needs: model, "
                              "optimizer, seed and place in the data")
    return found
