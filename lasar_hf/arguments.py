"""Checks of arguments that a parser leaves out."""

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
