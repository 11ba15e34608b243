"""What reading and writing of Hugging Face folders share: a name, a free place, errors that name the folder."""

from contextlib import contextmanager

from mpillm.errors import ConfigError, DataError, MpillmError

INDEX = "model.safetensors.index.json"


class Refused(Exception):
    """The value of a key of ``config.json`` cannot be used: key, value, why; of a function that knows no path."""


def refuse_used(folder, what):
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{what} {folder}: is in use already: name an empty directory or a new one")


@contextmanager
def reporting(path, *kinds):
    """Turn what the system raises, and a library if it raises of ``kinds``, into errors that name the path."""
    try:
        yield
    except MpillmError:
        raise
    except (OSError, *kinds) as error:
        raise DataError(f"{path}: {error}") from error


def safetensors_library():
    """Import the safetensors library, which is optional."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ConfigError(f"convert needs the safetensors package ({error}): pip install 'mpillm[hf]'") from error
    return safetensors
