"""What several commands share: the configuration argument with its ``--section.key VALUE`` overrides."""

import difflib
import functools

import click

from mpillm import files
from mpillm.config import Config
from mpillm.errors import ConfigError
from mpillm.files import to_json


def with_config(function):
    """Give a command a ``CONFIG`` argument and dotted overrides; it receives the loaded :class:`Config`."""

    @click.argument("path", metavar="CONFIG", type=click.Path())
    @click.argument("rest", nargs=-1, type=click.UNPROCESSED, metavar="[--SECTION.KEY VALUE]...")
    @functools.wraps(function)
    def wrapped(path, rest, **options):
        return function(Config.load(path, parse_overrides(rest)), **options)

    return wrapped


CONTEXT = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}


def parse_overrides(words):
    """Read ``--section.key VALUE`` and ``--section.key=VALUE`` words into a dict."""
    overrides, words = {}, list(words)
    while words:
        word = words.pop(0)
        key, has_value, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in key:
            raise ConfigError(f"{word}: unknown option{_meant(word)}; a key of the configuration is set as --section.key "
                              "VALUE")
        if not has_value:
            if not words:
                raise ConfigError(f"{word}: needs a value, as in {word} VALUE")
            value = words.pop(0)
        overrides[key] = value
    return overrides


def _meant(word):
    """Return which option of the command was meant, if one is near."""
    context = click.get_current_context(silent=True)
    options = [name for option in context.command.params for name in option.opts] if context else []
    close = difflib.get_close_matches(word.partition("=")[0], options, 1)
    return f", did you mean {close[0]}?" if close else ""


def write_json(path, found):
    """Write JSON to a file, or to standard output for ``-``."""
    if path == "-":
        click.echo(to_json(found, indent=1))
    else:
        files.write_json(path, found)
