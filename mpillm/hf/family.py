"""What a table of a family of models says, and ``config.json`` read and written by it.

A key that would change numbers is understood, or refused by its name. So is a key that nobody here has heard of: it could.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Callable

from mpillm.config import Config
from mpillm.errors import ConfigError
from mpillm.hf.folder import Refused
from mpillm.hf.rope import Rope
from mpillm.model.description import Model

REQUIRED = "required"  # in place of a default

# Keys of any family that change no number of the model: how it was made and stored, how texts are continued. Dropout is not
# computed by mpillm; by transformers in training alone.
HARMLESS = """
    *_pdrop *_token_id *dropout* _attn_implementation* _commit_hash _name_or_path _num_labels architectures
    attn_implementation auto_map chunk_size_feed_forward dtype finetuning_task gradient_checkpointing id2label
    initializer_range is_decoder keys_to_ignore_at_inference label2id model_type num_labels output_attentions
    output_hidden_states output_past pretraining_tp problem_type return_dict task_specific_params tf_legacy_loss tokenizer_class
    torch_dtype torchscript transformers.js_config transformers_version unsloth_* use_bfloat16 use_cache
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_scores prefix remove_invalid_values repetition_penalty return_dict_in_generate
    suppress_tokens temperature top_k top_p typical_p
""".split()
# Keys of any family with the values for which mpillm computes the same.
ONLY = {"quantization_config": (None,), "is_encoder_decoder": (False,), "add_cross_attention": (False,),
        "cross_attention_hidden_size": (None,), "tie_encoder_decoder": (False,), "pruned_heads": ({},)}


@dataclass(frozen=True)
class Key:
    """What a key of ``config.json`` stands for.

    Attributes
    ----------
    ours : str
        The key of ``[model]``, or several that it sets alike, separated by spaces.
    default : object
        Its value where the file has none; ``None`` in the file leaves our key at its own default.
    values : dict, optional
        Its values, and ours for them, where they are called otherwise; of several for one the first is written.
    """

    ours: str
    default: object = REQUIRED
    values: dict | None = None


@dataclass(frozen=True)
class Family:
    """A family of models of ``transformers``: what its files call things.

    Attributes
    ----------
    model_type : str
    architectures : tuple of str
        Classes whose weights are these; the first is written.
    tensors : dict
        Tensors, without ``.weight`` and ``.bias``, and the parameters in them; ``{}`` stands for the layer. Several
        parameters, separated by spaces, lie one behind the other.
    keys : dict of str to Key
        Of ``config.json``.
    fixed : dict
        Keys of ``[model]`` that no file says, since the family has them so.
    only : dict
        Keys of ``config.json`` with the values for which mpillm computes the same.
    rope : Rope, optional
        How its files tell of rotary positions.
    read : callable, optional
        What no single key says: takes the values of a file, returns keys of ``[model]``. Keys of the file win over them.
    write : callable, optional
        The way back: takes a model, returns keys of ``config.json``.
    read_keys : tuple of str
        Those that ``read`` looks at.
    is_fused_by_head : bool
        Parameters in one tensor lie head by head: query, key and value of the first, then of the second.
    input_first : tuple of str
        Ends of names of weights that are stored input-first.
    base : str
        What the names of tensors begin with, unless the folder was written by the class without a head.
    copies : dict
        Tensors that repeat others in models with tied ends, as the head repeats the embedding.
    ignored : tuple of str
        Patterns of tensors that the model does not compute with.
    added : dict
        Parameters to each row of which the first row of a tensor is added. It is written as zeros.
    harmless : tuple of str
        Keys of ``config.json`` that change no number; a ``*`` stands for anything.
    heads : tuple of Family
        The same with other heads, for other classes.
    """

    model_type: str
    architectures: tuple
    tensors: dict
    keys: dict
    fixed: dict = field(default_factory=dict)
    only: dict = field(default_factory=dict)
    rope: Rope | None = None
    read: Callable | None = None
    write: Callable | None = None
    read_keys: tuple = ()
    is_fused_by_head: bool = False
    input_first: tuple = ()
    base: str = "model."
    copies: dict = field(default_factory=dict)
    ignored: tuple = ()
    added: dict = field(default_factory=dict)
    harmless: tuple = ()
    heads: tuple = ()

    @property
    def all_heads(self):
        """Itself, and the same with other heads."""
        return (self, *self.heads)

    def of_class(self, architectures):
        """Return the family with the head of the class that the ``architectures`` of a file name; itself if it has none such.
        Local."""
        return next((one for one in self.heads if architectures in [[name] for name in one.architectures]), self)

    def model(self, values, path):
        """Return the model that the values of a ``config.json`` describe.

        Local. ``path`` is of the file.

        Raises
        ------
        ConfigError
            If mpillm does not compute the same, or knows no meaning of a key.
        """
        classes = [[name] for one in self.all_heads for name in one.architectures]
        only = {"architectures": (*classes, None), **ONLY, **self.only}
        for key, allowed in only.items():
            if key in values and values[key] is not None and values[key] not in allowed:
                shown = " or ".join(json.dumps(value) for value in allowed if value is not None)
                raise _refused(path, key, values[key], f"mpillm computes {self.model_type} models with "
                               f"{shown or 'none'} only: convert another model")
        rope_keys = self.rope.keys if self.rope else ()
        known = (*only, *self.keys, *rope_keys, *self.read_keys, *self.harmless, *HARMLESS)
        for key, value in values.items():
            if value is not None and not any(fnmatchcase(key, name) for name in known):
                raise _refused(path, key, value, f"mpillm does not know what this changes in {self.model_type} models: if it "
                               "changes no number, take the key out of the file; else convert another model")
        model = {**self.fixed}
        try:
            model.update(self.rope.read(values) if self.rope else {})
            model.update(self.read(values) if self.read else {})
        except Refused as error:
            raise _refused(path, *error.args) from None
        for key, meaning in self.keys.items():
            value = self._value(values, key, path)
            model.update({ours: value for ours in meaning.ours.split() if value is not None})
        return Config.from_dict({"model": model}, source=path).model

    def _value(self, values, key, path):
        """Return our value for a key, or None where it is left out."""
        meaning = self.keys[key]
        value = values.get(key, meaning.default)
        if meaning.default is REQUIRED and (key not in values or value is None):
            raise ConfigError(f"{path}: {key}: required, but not given")
        if meaning.values is None or value is None:
            return value
        if value not in [*meaning.values]:
            raise _refused(path, key, value, f"mpillm computes {self.model_type} models with "
                           f"{' or '.join(map(json.dumps, meaning.values))} only: convert another model")
        return meaning.values[value]

    def config(self, model):
        """Return what a ``config.json`` of the family says of a model, as far as it can. Local."""
        written = {"architectures": [self.architectures[0]], "model_type": self.model_type}
        written.update(self.rope.write(model) if self.rope else {})
        for key, meaning in self.keys.items():
            value = getattr(model, meaning.ours.split()[0])
            if meaning.values is not None:
                value = next((theirs for theirs, ours in meaning.values.items() if ours == value), None)
            written[key] = value
        written.update(self.write(model) if self.write else {})
        return written

    def differences(self, model):
        """Return the keys of ``[model]`` that a file of the family cannot say of a model. Local."""
        try:
            said = self.model(self.config(model), self.model_type)
        except ConfigError:  # what it would say is no model of the family
            said = None
        if said is None:
            return [*asdict(model)]
        if model.positions != "rotary":  # without which it means nothing
            model = replace(model, rope_theta=Model.rope_theta)
        return [key for key in asdict(model) if getattr(model, key) != getattr(said, key)]


def _refused(path, key, value, why):
    return ConfigError(f"{path}: {key} = {json.dumps(value)}: {why}")
