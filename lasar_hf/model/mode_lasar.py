"""Training and evaluation mode of a model that several threads may use."""

import threading
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn


# The thread that may use a model in training mode; models in evaluation mode have none. Copies do not inherit it.
_TRAINING_THREADS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


class ModeMixin(nn.Module):
    """
    Lets threads share a model in evaluation mode, and refuses it to all threads but one in training mode.

    Recommending with a model in training mode switches it to evaluation mode for the time of the call. Another thread
    would meanwhile train without dropout, or see the training mode come back in the middle of its own call.
    """

    def train(self, mode: bool = True):
        """As [`~torch.nn.Module.train`]. A model in training mode belongs to the thread that made this call."""
        if mode:
            _TRAINING_THREADS[self] = threading.get_ident()
        super().train(mode)
        if not mode:
            _TRAINING_THREADS.pop(self, None)
        return self

    @contextmanager
    def evaluation_mode(self):
        """
        Context for inference: evaluation mode without gradients. The training flags are restored on exit.

        Raises:
            `RuntimeError`: if the model is in training mode by another thread, or another thread has put it into
            training mode before the context ends.
        """
        was_training = [part for part in self.modules() if part.training]
        if was_training:
            _TRAINING_THREADS.setdefault(self, threading.get_ident())  # its flags were set in another way
        owner = _TRAINING_THREADS.get(self)
        if owner not in (None, threading.get_ident()):
            raise RuntimeError(
                "The model is in training mode, and another thread trains it. Call model.eval() before threads share "
                "a model, or give this thread a copy."
            )
        for part in was_training:
            part.training = False
        try:
            with torch.no_grad():
                yield self
        finally:
            for part in was_training:
                part.training = True
        if _TRAINING_THREADS.get(self) != owner:
            raise RuntimeError(
                "Another thread has put the model into training mode in the middle of this call, so its result may be "
                "wrong. Train a copy of a model that other threads use."
            )
