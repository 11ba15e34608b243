"""What a model is trained on: samples by number, as its head asks for them."""

from typing import NamedTuple

import numpy as np

from mpillm.data.labelled import NOT_COUNTED, SampleFile, num_labels, num_tokens
from mpillm.data.tokens import TokenFile
from mpillm.errors import ConfigError

MASKED = 0.15  # of the tokens of a sample (Devlin et al. 2019); of these
AS_MASK, AS_RANDOM = 0.8, 0.1  # the rest stay as they are


class Samples(NamedTuple):
    """Some samples; each field is an array with one row a sample, or ``None``.

    ``inputs``: tokens ``[n, S]`` or patches ``[n, S, P]``; ``targets``: what the head is to say; ``documents``: in which
    document each position is; ``lengths``: how many positions a sequence has.
    """

    inputs: np.ndarray | None
    targets: np.ndarray | None
    documents: np.ndarray | None = None
    lengths: np.ndarray | None = None

    def part(self, start, stop):
        """Return samples ``[start, stop)``."""
        return Samples(*(values if values is None else values[start:stop] for values in self))


class WordSource:
    """The next token of every token of a text."""

    def __init__(self, config, split):
        self.config, self.seq_len = config, config.train.seq_len
        vocab_size = config.model.vocab_size if split == "train" else None
        self.tokens = TokenFile(config.data.path, split, self.seq_len, vocab_size)
        self.num_samples = self.tokens.num_samples

    def read(self, indices, numbers, with_tokens=True):
        """Return some samples. ``numbers`` are those by which what is drawn at random is drawn; ``with_tokens`` tells whether
        more is wanted than who sees whom."""
        documents = self.tokens.documents_of(indices) if self.config.data.mask_documents else None
        inputs, targets = self.tokens.samples(indices) if with_tokens else (None, None)
        return Samples(inputs, targets, documents)

    def counted(self, indices):
        """Return how many targets of some samples count."""
        return len(indices) * self.seq_len


class MaskedSource(WordSource):
    """Some tokens of a text, from all the others: as many in every sample, drawn by the sample's number."""

    def __init__(self, config, split):
        super().__init__(config, split)
        self.seed, self.mask = config.train.seed, config.data.mask_token
        self.num_masked = max(1, round(MASKED * self.seq_len))
        if self.mask is None or self.mask >= config.model.vocab_size:
            raise ConfigError(f"data.mask_token = {self.mask}: head masked needs the number of the token that stands for a "
                              f"hidden one, below model.vocab_size = {config.model.vocab_size}")

    def read(self, indices, numbers, with_tokens=True):
        """Return some samples, as :meth:`WordSource.read` does."""
        found = super().read(indices, numbers, with_tokens)
        if not with_tokens:
            return found
        inputs, targets = found.inputs.copy(), np.full_like(found.inputs, NOT_COUNTED)
        for row, number in enumerate(numbers):
            draw = np.random.Generator(np.random.Philox(key=[self.seed, 1 << 32 | 0x6D61], counter=[0, 0, 0, number]))
            places = draw.permutation(self.seq_len)[:self.num_masked]
            how, others = draw.random(self.num_masked), draw.integers(0, self.config.model.vocab_size, self.num_masked)
            targets[row, places] = inputs[row, places]
            inputs[row, places] = np.where(how < AS_MASK, self.mask,
                                           np.where(how < AS_MASK + AS_RANDOM, others, inputs[row, places]))
        return found._replace(inputs=inputs, targets=targets)

    def counted(self, indices):
        """Return how many targets of some samples count."""
        return len(indices) * self.num_masked


class LabelSource:
    """Samples with labels."""

    def __init__(self, config, split):
        self.file = SampleFile(config.data.path, split, config.model, config.train.seq_len)
        self.num_samples = self.file.num_samples

    def read(self, indices, numbers, with_tokens=True):
        """Return some samples, as :meth:`WordSource.read` does."""
        inputs, labels, lengths = self.file.samples(indices)
        return Samples(inputs, labels, lengths=lengths)

    def counted(self, indices):
        """Return how many labels of some samples count."""
        return self.file.counted(indices)


SOURCES = {"words": WordSource, "masked": MaskedSource}


def open_source(config, split):
    """Return where the samples of a split come from: ``data.path``, as ``model.head`` reads it. Local."""
    return SOURCES.get(config.model.head, LabelSource)(config, split)


def with_sizes(config):
    """Return the configuration with the vocabulary and the number of labels of its data, unless it names them itself. Local."""
    model, path, found = config.model, config.data.path, {}
    if model.inputs == "tokens" and model.vocab_size is None:
        found["model.vocab_size"] = (TokenFile(path, "train", config.train.seq_len).vocab_size if model.has_words
                                     else num_tokens(path))
    if model.head in ("classes", "tags") and model.num_labels is None:
        found["model.num_labels"] = num_labels(path)
    return config.with_values(found) if found else config


def random_batches(config, count):
    """Draw global batches that have everything that the model can meet: shorter sequences, targets that do not count. Local."""
    train, model, generator = config.train, config.model, np.random.default_rng(config.train.seed)
    size, found = (train.global_batch, train.seq_len), []
    for _ in range(count):
        documents = lengths = None
        if model.has_words and config.data.mask_documents:
            documents = np.sort(generator.integers(0, 3, size))
        if model.head == "words":
            tokens = generator.integers(0, model.vocab_size, (size[0], size[1] + 1))
            found.append(Samples(tokens[:, :-1], tokens[:, 1:], documents))
            continue
        if model.inputs == "patches":
            inputs = generator.standard_normal((size[0], size[1] - model.class_position, model.patch_size))
        else:
            inputs = generator.integers(0, model.vocab_size, size)
        if not model.has_words:
            lengths = generator.integers(2, size[1] + 1, size[0])
        targets_size = size[:1] if model.pooling != "none" else size
        if model.head == "values":
            targets = generator.standard_normal((*targets_size, model.num_labels))
            targets[generator.random(targets.shape) < 0.2] = np.nan
        else:
            labels = model.vocab_size if model.head == "masked" else model.num_labels
            targets = generator.integers(0, labels, targets_size)
            targets[generator.random(targets_size) < 0.2] = NOT_COUNTED
        found.append(Samples(inputs, targets, documents, lengths))
    return found
