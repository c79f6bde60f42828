"""A user's own code, named on a command line as ``FILE.py:FUNCTION``."""

import importlib.util
import sys
import traceback
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipeline.console import InputError


def load_function(spec: str, what: str) -> Callable[..., Any]:
    """The function that ``spec`` names; its file is run.

    Args:
        spec: ``FILE.py:FUNCTION``.
        what: the user's word for it, which starts the messages: "preset".

    Raises:
        InputError: no such file or function, or the file cannot be run.
    """
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise InputError(f"{what} {spec!r}: there is no file {path}")
    full = str(Path(path).absolute())
    # a name of its own for each file: two of them may be loaded
    module_name = f"user_{what}_{sha256(full.encode()).hexdigest()[:8]}"
    found = importlib.util.spec_from_file_location(module_name, path)
    if found is None or found.loader is None:
        raise InputError(f"{what} {spec!r}: {path} is not a Python file")
    module = importlib.util.module_from_spec(found)
    # dataclasses look for the module that defines them there
    sys.modules[found.name] = module
    try:
        found.loader.exec_module(module)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # the code is the user's: it may raise anything
        raise InputError(f"{what} {spec!r} cannot be made: {blame(error, spec)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{what} {spec!r}: {path} has no function {name}")
    loaded: Callable[..., Any] = function
    return loaded


def blame(error: BaseException, spec: str) -> str:
    """What the user's code raised and in which line of the file that ``spec`` names."""
    path = spec.rpartition(":")[0]
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename in (path, str(Path(path).absolute()))
    ]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{where}; correct the file"
