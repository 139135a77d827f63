"""Checks of arguments that a parser does not make."""

import difflib
import importlib
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import fields
from numbers import Integral
from typing import Any


def check_choices(arguments: Any) -> None:
    """
    Refuse values that are not among a field's `choices`, which `argparse` checks on the command line only.

    Args:
        arguments:
            Instance of a dataclass whose fields may have `metadata["choices"]`. `None` is always accepted.

    Raises:
        `ValueError`: if a value is not one of its field's choices.
    """
    for field in fields(arguments):
        choices, value = field.metadata.get("choices"), getattr(arguments, field.name)
        if choices is not None and value is not None and value not in choices:
            raise ValueError(f"{field.name} is {value!r}; expected {', '.join(map(str, choices))}.")


def check_whole_numbers(smallest: int, **arguments: object) -> None:
    """Refuse arguments, by name, that are not whole numbers of at least `smallest`, with a `ValueError`."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < smallest:
            raise ValueError(f"{name} is {value!r}; expected a whole number of at least {smallest}.")


def near_name(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'seed'?)"` for a mistyped name, or nothing if no known one is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def import_dotted(path: str) -> Any:
    """
    Import an object by its dotted path, such as `"mine.read_shop"`. The current directory is searched too.

    Raises:
        `ValueError`: if there is no such module or name.
    """
    module, _, name = path.rpartition(".")
    if not (module and all(part.isidentifier() for part in path.split("."))):
        raise ValueError(f"{path!r} is not a dotted path; expected one such as my_module.name.")
    if os.getcwd() not in sys.path:  # last, so that no file here hides an installed package
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"{path!r} cannot be imported: {error}.") from error


def read_json_object(arguments: Any, name: str) -> None:
    """
    Parse a field that holds JSON text, as a command line gives it. YAML and Python give the object itself.

    Args:
        arguments:
            Instance of a dataclass; the field is replaced by the object.
        name (`str`):
            The field.

    Raises:
        `ValueError`: if the text is not a JSON object.
    """
    text = getattr(arguments, name)
    if not isinstance(text, str):
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is {text!r}; expected JSON ({error.msg}).") from error
    if not isinstance(value, dict):
        raise ValueError(f'{name} is {text!r}; expected an object such as {{"key": "value"}}.')
    setattr(arguments, name, value)


def read_switch(arguments: Any, name: str) -> None:
    """
    Replace the words `"auto"`, `"true"` and `"false"` in a field by `None`, `True` and `False`. These values are
    accepted too, since YAML has booleans.

    Args:
        arguments:
            Instance of a dataclass; the field is replaced.
        name (`str`):
            The field.

    Raises:
        `ValueError`: if the field has another value.
    """
    value = getattr(arguments, name)
    words = {"auto": None, "true": True, "false": False, "none": None}
    if str(value).lower() not in words:
        raise ValueError(f"{name} is {value!r}; expected auto, true or false.")
    setattr(arguments, name, words[str(value).lower()])
