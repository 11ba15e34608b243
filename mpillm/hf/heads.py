"""Classes of a family that end in labels: of a sequence (``ForSequenceClassification``) or of its positions
(``ForTokenClassification``). Each is the table of its family with another head."""

from dataclasses import replace

from mpillm.hf.folder import Refused

SCORE = {"score": "head"}


def with_labels(family, prefix, tags="score", sequences=None, **fixed):
    """Return a family together with its classes that end in labels. Local.

    Parameters
    ----------
    family : mpillm.hf.family.Family
    prefix : str
        What the names of these classes begin with.
    tags : str, optional
        The tensor of the head for positions; None where there is no such class.
    sequences : dict, optional
        The tensors of the head for sequences, in place of ``score``.
    **fixed
        Keys of ``[model]`` that the class for sequences has so; left out, it reads the last position, without a bias.
    """
    heads = [_ending_in(family, f"{prefix}ForSequenceClassification", sequences or SCORE,
                        {"pooling": "last", "head_bias": False, **fixed}, _read_sequences, _write_sequences)]
    if tags is not None:
        heads.append(_ending_in(family, f"{prefix}ForTokenClassification", {tags: "head"}, {"head_bias": True},
                                _read_positions, _write_names))
    return replace(family, heads=tuple(heads))


def _ending_in(family, architecture, tensors, fixed, read, write):
    """Return the table of a family with another head, which shares no matrix with the embedding."""
    body = {theirs: ours for theirs, ours in family.tensors.items() if not ours.startswith("head")}
    without_ties = ({key: value for key, value in table.items() if key != "tie_word_embeddings"}
                    for table in (family.keys, family.only))
    keys, only = without_ties
    return replace(
        family, architectures=(architecture,), tensors={**body, **tensors}, keys=keys, only=only, copies={},
        fixed={**family.fixed, "tie_embeddings": False, **fixed}, harmless=(*family.harmless, "tie_word_embeddings"),
        read=lambda values: {**(family.read(values) if family.read else {}), **read(values)},
        write=lambda model: {**(family.write(model) if family.write else {}), **write(model)})


def _read_sequences(values):
    """Return the head: one label of several, or real numbers, which is what one label alone stands for."""
    count, problem = _num_labels(values), values.get("problem_type")
    if problem == "multi_label_classification":
        raise Refused("problem_type", problem, "mpillm gives one label a sequence, or real numbers: convert another model")
    is_real = problem == "regression" or problem is None and count == 1
    return {"head": "values" if is_real else "classes", "num_labels": count}


def _write_sequences(model):
    kind = "regression" if model.head == "values" else "single_label_classification"
    return {**_write_names(model), "problem_type": kind}


def _read_positions(values):
    return {"head": "tags", "num_labels": _num_labels(values)}


def _num_labels(values):
    """Return how many labels there are: files name them all, but leave two unnamed."""
    names = values.get("id2label")
    return len(names) if isinstance(names, dict) else values.get("num_labels", values.get("_num_labels", 2))


def _write_names(model):
    names = [f"LABEL_{label}" for label in range(model.num_labels or 0)]
    return {"id2label": {str(label): name for label, name in enumerate(names)},
            "label2id": {name: label for label, name in enumerate(names)}}
