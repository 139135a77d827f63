"""Checks of arguments that a parser leaves out."""

import json
from dataclasses import fields
from typing import Any


def check_choices(arguments: Any) -> None:
    """
    Refuse values outside a field's `choices`.

    `argparse` checks them on the command line only: a value from a YAML file, or from Python, is not looked at.

    Args:
        arguments:
            Instance of a dataclass whose fields may have `metadata["choices"]`. `None` is no choice and passes.

    Raises:
        `ValueError`: if a value is none of its field's choices.
    """
    for field in fields(arguments):
        choices, value = field.metadata.get("choices"), getattr(arguments, field.name)
        if choices is not None and value is not None and value not in choices:
            raise ValueError(f"{field.name} is {value!r}: choose among {', '.join(map(str, choices))}.")


def read_json_object(arguments: Any, name: str) -> None:
    """
    Replace a field's JSON text, as a command line gives it, by the object that it says; YAML gives the object itself.

    Args:
        arguments:
            Instance of a dataclass.
        name (`str`):
            The field.

    Raises:
        `ValueError`: if the text is no JSON object.
    """
    text = getattr(arguments, name)
    if not isinstance(text, str):
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is {text!r}, expected JSON: {error.msg}.") from error
    if not isinstance(value, dict):
        raise ValueError(f'{name} is {text!r}, expected an object like {{"key": "value"}}.')
    setattr(arguments, name, value)
