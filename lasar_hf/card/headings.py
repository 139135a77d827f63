"""Markdown by its headings, so that one part of a card can be read or replaced."""

import re


def split_headings(text: str, level: int = 2) -> dict[str, str]:
    """The text under each heading of a level, by the heading; `""` has the text before the first one."""
    before, *parts = re.split(rf"^{'#' * level} (.+)\n", text, flags=re.MULTILINE)
    return {"": before.strip()} | {name: body.strip() for name, body in zip(parts[::2], parts[1::2], strict=True)}


def join_headings(parts: dict[str, str], level: int = 2) -> str:
    """The inverse of [`split_headings`]."""
    blocks = [f"{'#' * level} {name}\n\n{body}" if name else body for name, body in parts.items()]
    return "\n\n".join(block for block in blocks if block) + "\n"
