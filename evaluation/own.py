"""Scorers of a user's own: a function in a Python file, or in an installed package.

    --scorers mine.py:sharpness pickscore          # evaluate.py; --judge of train_inpo.py, pairs.py

    def sharpness(images: list[PIL.Image.Image], prompts: list[str]) -> list[float]:

B pictures (RGB, of any size, 1 to 16 of them) and their B prompts give B finite numbers, higher is
better: a list, or an array or tensor of shape (B,). The number of a picture may depend on it and
its prompt alone, since batches differ. Gradients are off. Nobody moves anything to a GPU for it.

The file is imported once a process, with its folder at the end of sys.path, and tried on two
pictures before anything is drawn. It is called by its file's name, "mine.py:sharpness", wherever it
lies. What was judged by an earlier text of the file, which its digest tells, is not continued; what
the file imports is not part of that. Nothing here takes long to import: flags are read with it.
"""

import argparse
import functools
import hashlib
import importlib
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from system.files import UserError, expanded, is_number
from system.hub import reason

FORM = r"(.+\.py|[^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)"
HOW = "FILE.py:FUNCTION"


def is_own(text: str) -> bool:
    return re.fullmatch(FORM, text) is not None


def choice(*names: str) -> Callable[[str], str]:
    """argparse's type of a flag that takes one of these names, or a function."""

    def read(text: str) -> str:
        if text in names or is_own(text):
            return text
        known = ", ".join(map(repr, names))
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {known}, {HOW})")

    return read


def title(text: str) -> str:
    """What a scorer is called: a file by its last part, anything else as it was given."""
    return text.rsplit("/", 1)[-1] if is_own(text) else text


def distinct(texts: list[str]) -> list[str]:
    """Each once; UserError where two of them are called the same."""
    texts = list(dict.fromkeys(texts))
    names = [title(text) for text in texts]
    if twice := [text for text in texts if names.count(title(text)) > 1]:
        raise UserError(f"{' and '.join(twice)} are both called {title(twice[0])}; rename a file.")
    return texts


class Own(NamedTuple):
    function: Callable
    digest: str  # of its file
    file: str


def imported(text: str) -> Own:
    """The function. Raises UserError."""
    place, name = re.fullmatch(FORM, text).groups()
    module, digest, file = _module(str(expanded(place).resolve()) if place[-3:] == ".py" else place)
    if not hasattr(module, name):
        there = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        has = f"it has {', '.join(there[:8])}" if there else "it has none"
        raise UserError(f"scorer {title(text)}: {place} has no function '{name}'; {has}.")
    if not callable(function := getattr(module, name)):
        raise UserError(f"scorer {title(text)}: '{name}' in {place} is no function.")
    return Own(function, digest, file)


@functools.cache
def _module(place: str) -> tuple[ModuleType, str, str]:
    """(a file's or package's module, digest of its file, that file's path)."""
    path = Path(place)
    try:
        if path.suffix != ".py":
            module = importlib.import_module(place)
            file = getattr(module, "__file__", None) or ""
            return module, _digest(Path(file).read_bytes() if file else b""), file
        if not path.is_file():
            raise UserError(f"there is no file '{place}'; name one as {HOW}.")
        module, source = ModuleType(f"scorer_{path.stem}"), path.read_bytes()
        module.__file__ = place
        sys.modules[module.__name__] = module  # dataclasses and pickle look there
        sys.path.append(str(path.parent))
        exec(compile(source, place, "exec"), module.__dict__)  # no .pyc, which may be an older text
        return module, _digest(source), place
    except UserError as error:
        raise UserError(f"scorer {path.name}: {error}") from error
    except (Exception, SystemExit) as error:
        raise UserError(
            f"scorer {path.name}: cannot be imported, {_raised(error, place)}"
        ) from error


def _digest(source: bytes) -> str:
    return hashlib.sha256(source).hexdigest()[:16]


def _raised(error: BaseException, file: str) -> str:
    """The end of a sentence: what was raised, and in which line of the user's file."""
    said = f"{type(error).__name__}: {reason(error)}" if str(error) else type(error).__name__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    number, line = (frames[-1].lineno, frames[-1].line) if frames else (None, None)
    if isinstance(error, SyntaxError) and error.filename == file:
        number, line, said = error.lineno, error.text, f"SyntaxError: {error.msg}"
    return f"line {number} of {file}, `{(line or '').strip()}`: {said}." if number else f"{said}."


def digests(texts: list[str]) -> dict[str, str]:
    """{name: digest of its file} of the functions among these scorers."""
    return {title(text): imported(text).digest for text in texts if is_own(text)}


def log_odds(text: str) -> float | None:
    """Its attribute `log_odds`: per unit of margin, the log-odds that the picture with the higher
    score is preferred; None where it has none. Raises UserError where that is no number above 0."""
    value = getattr(imported(text).function, "log_odds", None)
    if value is not None and not (is_number(value) and value > 0):
        raise UserError(f"scorer {title(text)}: its log_odds is {value!r}, no number above 0.")
    return value


def load(text: str) -> Callable:
    """The function of B RGB images and B prompts, checked: it returns a list of B finite floats.

    Raises UserError, also for whatever the function itself raises."""
    function, _, file = imported(text)

    def judge(images: list, prompts: list[str]) -> list[float]:
        def refuse(what: str):
            raise UserError(f"scorer {title(text)}: {what}")

        n = len(images)
        try:
            given = function(images, list(prompts))
            values = given.tolist() if hasattr(given, "tolist") else given
        except (Exception, SystemExit) as error:
            refuse(_raised(error, file))
        if not isinstance(values, (list, tuple)):
            refuse(f"it returned a {type(given).__name__}, not a list of {n} numbers.")
        if len(values) != n:
            refuse(f"it returned {len(values)} numbers for {n} pictures.")
        values = [one.tolist() if hasattr(one, "tolist") else one for one in values]
        for k, value in enumerate(values):
            if not is_number(value) and not isinstance(value, bool):
                shown = f"'{prompts[k]}', picture {k + 1} of {n}"
                refuse(f"it returned {ascii(value)[:40]} for {shown}, no finite number.")
        return [float(value) for value in values]

    return judge
