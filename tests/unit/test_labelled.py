"""Sample files, and what models with other heads than words are given of files."""

import h5py
import numpy as np
import pytest
from tiny import write_token_file

import mpillm
from mpillm.config import Config
from mpillm.data.labelled import NOT_COUNTED, SampleFile, counted
from mpillm.data.sources import MASKED, open_source, with_sizes
from mpillm.errors import ConfigError, DataError

DRAW = np.random.default_rng(0)
TOKENS, CLASSES = DRAW.integers(0, 50, (20, 8)), DRAW.integers(0, 4, 20)
LENGTHS = DRAW.integers(1, 9, 20)


def config_for(path, **model):
    return Config.from_dict({
        "model": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_size": 8, **model}, "data": {"path": str(path)},
        "train": {"seq_len": 8, "global_batch": 4, "microbatch": 2}})


def test_samples_come_back_in_any_order_and_splits_stay_apart(tmp_path):
    path = tmp_path / "s.h5"
    mpillm.write_samples(path, "train", TOKENS, CLASSES, LENGTHS)
    mpillm.write_samples(path, "validation", TOKENS[:3], CLASSES[:3])
    mpillm.write_samples(path, "train", TOKENS[::-1], CLASSES[::-1], LENGTHS[::-1])
    config = with_sizes(config_for(path, head="classes"))
    assert config.model.vocab_size == TOKENS.max() + 1 and config.model.num_labels == CLASSES.max() + 1
    source = open_source(config, "train")
    found = source.read([5, 0, 5, 19], range(4))
    places = 19 - np.array([5, 0, 5, 19])
    for values, wanted in ((found.inputs, TOKENS), (found.targets, CLASSES), (found.lengths, LENGTHS)):
        assert (values == wanted[places]).all() and values.dtype == np.int64
    assert open_source(config, "validation").num_samples == 3 and found.documents is None


def test_labels_of_positions_end_with_the_sequence_and_begin_behind_the_class_position(tmp_path):
    path = tmp_path / "s.h5"
    patches = DRAW.standard_normal((5, 7, 3)).astype(np.float32)
    values = DRAW.standard_normal((5, 7, 2))
    values[1, 2, 0] = np.nan
    mpillm.write_samples(path, "train", patches, values, [7, 3, 1, 7, 7])
    config = config_for(path, inputs="patches", patch_size=3, class_position=True, head="values", num_labels=2)
    inputs, labels, lengths = SampleFile(path, "train", config.model, 8).samples([1, 0])
    assert inputs.shape == (2, 7, 3) and labels.shape == (2, 8, 2) and lengths.tolist() == [4, 8]
    assert np.isnan(labels[:, 0]).all() and np.isnan(labels[0, 4:]).all() and (labels[1, 1:] == values[0]).all()
    assert counted(labels) == 2 * 3 - 1 + 2 * 7


@pytest.mark.parametrize(("inputs", "labels", "model", "message"), [
    (TOKENS, CLASSES, {"head": "tags", "num_labels": 4}, r"labels int64 \[20\], head tags with pooling none gives \['n', 8\]"),
    (TOKENS[:, :5], CLASSES, {"head": "classes"}, r"inputs int64 \[20, 5\], the model reads tokens \[n, 8\]"),
    (TOKENS, CLASSES / 2, {"head": "classes", "num_labels": 4}, "of integers"),
    (TOKENS / 2, CLASSES, {"head": "classes"}, "needs inputs"),
    (TOKENS, CLASSES[:3], {"head": "classes"}, "as many labels"),
])
def test_what_does_not_fit_is_refused_with_its_shapes(tmp_path, inputs, labels, model, message):
    with pytest.raises(ConfigError, match=message):
        mpillm.write_samples(tmp_path / "s.h5", "train", inputs, labels)
        open_source(with_sizes(config_for(tmp_path / "s.h5", **model)), "train")


@pytest.mark.parametrize(("model", "message"), [
    ({"head": "classes", "num_labels": 2, "vocab_size": 50}, "a label of .* the model has 0 to 1"),
    ({"head": "classes", "num_labels": 4, "vocab_size": 9}, "a token of .* the model has 0 to 8"),
])
def test_numbers_beyond_the_model_s_are_refused(tmp_path, model, message):
    mpillm.write_samples(tmp_path / "s.h5", "train", TOKENS, CLASSES)
    with pytest.raises(DataError, match=message):
        open_source(config_for(tmp_path / "s.h5", **model), "train").read(range(20), range(20))


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "text").write_text("no HDF5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    refused = {"text": "cannot be read as HDF5", "none": "cannot be read", "other.h5": "has no inputs and labels"}
    for name, message in refused.items():
        with pytest.raises(DataError, match=message):
            open_source(config_for(tmp_path / name, head="classes", num_labels=2, vocab_size=9), "train")
    with pytest.raises(ConfigError, match="split 'test': it is one of train, validation"):
        mpillm.write_samples(tmp_path / "s.h5", "test", TOKENS, CLASSES)


def test_masked_tokens_are_drawn_by_the_sample_s_number(tmp_path):
    path = write_token_file(tmp_path / "tokens.h5")
    config = config_for(path, head="masked", attention="bidirectional", ffn="gelu", vocab_size=257)
    with pytest.raises(ConfigError, match="data.mask_token = None: head masked needs"):
        open_source(config, "train")
    source = open_source(config.with_values({"data.mask_token": 256, "train.seq_len": 40}), "train")
    plain = source.tokens.samples([3, 4])[0]
    found, again = source.read([3, 4], [10, 11]), source.read([4], [11])
    is_hidden = found.targets != NOT_COUNTED
    assert (is_hidden.sum(1) == round(MASKED * 40)).all() and source.counted([3, 4]) == is_hidden.sum()
    assert (found.targets[is_hidden] == plain[is_hidden]).all() and (found.inputs == plain)[~is_hidden].all()
    assert (again.inputs == found.inputs[1]).all() and (source.read([3], [12]).targets != found.targets[0]).any()
    many = source.read([0] * 300, range(300))
    hidden = many.targets != NOT_COUNTED
    assert np.mean(many.inputs[hidden] == 256) == pytest.approx(0.8, abs=0.04)
