"""What the main process of a distributed command does for all of them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .locks import locked


Result = TypeVar("Result")


def on_main_process(function: Callable[[], Result]) -> Result:
    """
    Call a function in the main process. All processes get its result, or raise its error: none waits for one that
    stopped. Every process must call it.

    Args:
        function (`Callable`):
            Function whose result can be pickled.

    Returns:
        What the function returned in the main process.

    Example:

    ```python
    >>> names = on_main_process(lambda: sorted(os.listdir(folder)))
    ```
    """
    outcome: list = [None, None]
    if PartialState().is_main_process:
        try:
            outcome = [function(), None]
        except Exception as error:
            outcome = [None, error]
    broadcast_object_list(outcome)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result


@contextmanager
def locked_for_all(folder: str | Path) -> Iterator[None]:
    """
    As [`~lasar_hf.locks.locked`], for a command that several processes run: the main one holds the folder for all. If
    it is refused, all of them end with the error. Every process must call it, after it has joined the others.
    """
    with ExitStack() as stack:

        def take() -> None:
            stack.enter_context(locked(folder))

        on_main_process(take)
        yield
