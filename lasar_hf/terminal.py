"""Text of others on a terminal."""

JOINERS = "\u200c\u200d"  # not shown, but scripts and emoji need them


def printable(text: str) -> str:
    r"""
    A text that a terminal only shows. White space becomes blanks, and other characters that are not shown become
    escapes: a terminal obeys ESC, and marks of writing direction reorder what stands around them.

    Example:

    ```python
    >>> printable("Red\x1b[2J cup\n")
    'Red\\x1b[2J cup '
    ```
    """
    shown = (" " if letter.isspace() else letter for letter in text)
    return "".join(
        letter if letter.isprintable() or letter in JOINERS else letter.encode("unicode_escape").decode()
        for letter in shown
    )
