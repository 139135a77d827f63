"""Prompts and answers as token ids: instruction, the history's Semantic IDs, `<|latent_start|>`; the target's SID."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..configuration_lasar import CONTROL_TOKENS, LATENT_START_TOKEN, sid_token


PAD_TOKEN = "<|pad|>"
EOS_TOKEN = "<|endoftext|>"
_LETTERS_FITTED = 5000  # of a text: a title may be one endless word, and time grows with the square of a word's length


class PromptEncoder:
    """
    Turns histories and items into token ids.

    The layout is `instruction, SIDs of the history, <|latent_start|>` for the prompt (METHOD.md, section 1). The
    instruction is tokenised once and SIDs are looked up in a table, so that a prompt costs no call of the tokenizer.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Fast tokenizer on which SID and control tokens are registered as special tokens.
        codes (`np.ndarray`):
            Semantic IDs `(I, M)`.
        instruction (`str`, *optional*, defaults to `"Recommend the next item."`):
            Text before the history.
        max_history (`int`, *optional*, defaults to `50`):
            Most items of a history that are shown; the newest are kept.

    Attributes:
        sid_ids (`np.ndarray`):
            Token ids of each item's SID, `(I, M)`, int64.
        latent_start_id, latent_id, latent_end_id (`int`):
            Token ids of the control tokens.

    Raises:
        ValueError: the tokenizer lacks a SID or control token, holds one that is not special, or splits the prompt in
            another way than piece by piece; `codes` is not `(I, M)`; `max_history` is below 1.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        codes: np.ndarray,
        instruction: str = "Recommend the next item.",
        max_history: int = 50,
    ):
        codes = np.asarray(codes)
        if codes.ndim != 2 or not len(codes) or not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"`codes` has shape {codes.shape} and type {codes.dtype}, expected integers (I, M).")
        if max_history < 1:
            raise ValueError(f"`max_history` is {max_history}, expected at least 1.")
        self.tokenizer = tokenizer
        self.codes = codes
        self.instruction = instruction
        self.max_history = max_history
        self.latent_start_id, self.latent_id, self.latent_end_id = self._special_ids(CONTROL_TOKENS)
        self.sid_ids = np.empty(codes.shape, dtype=np.int64)
        for level in range(codes.shape[1]):
            used, position = np.unique(codes[:, level], return_inverse=True)
            self.sid_ids[:, level] = np.array(self._special_ids([sid_token(level, code) for code in used]))[position]
        self.instruction_ids = tokenizer(instruction, add_special_tokens=False).input_ids
        # A tokenizer may normalise or merge across pieces; the id table would then disagree with the text silently.
        if tokenizer(self.text([0]), add_special_tokens=False).input_ids != self.prompt([0]):
            raise ValueError(
                f"the tokenizer reads {self.text([0])!r} in another way than its pieces; register the SID and control "
                "tokens as special tokens without stripping or normalisation."
            )

    def text(self, history: Sequence[int]) -> str:
        """The prompt as text: instruction, SIDs of the newest `max_history` items (oldest first), latent start."""
        rows = self._shown(history)
        tokens = [sid_token(level, code) for sid in self.codes[rows].tolist() for level, code in enumerate(sid)]
        return self.instruction + "".join(tokens) + LATENT_START_TOKEN

    def prompt(self, history: Sequence[int]) -> list[int]:
        """Token ids of `text(history)`, as the tokenizer gives them with `add_special_tokens=False`."""
        return [*self.instruction_ids, *self.sid_ids[self._shown(history)].ravel().tolist(), self.latent_start_id]

    def answer(self, item: int) -> list[int]:
        """The `M` SID token ids of an item."""
        return self.answers([item])[0]

    def answers(self, items: Sequence[int]) -> list[list[int]]:
        """`answer` of each item."""
        return self.sid_ids[self._rows(items)].tolist() if len(items) else []

    def free_text(self, text: str) -> list[int]:
        """Token ids of text from the catalogue, in which `<a_9>` or `<|latent|>` stays text and is no token."""
        return self.free_texts([text])[0]

    def free_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """`free_text` of each, in one call of the tokenizer."""
        if not len(texts):
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True).input_ids

    def _shown(self, history: Sequence[int]) -> np.ndarray:
        if not len(history):
            raise ValueError("a prompt needs a history of at least one item.")
        return self._rows(history[-self.max_history :])

    def _rows(self, items: Sequence[int]) -> np.ndarray:
        rows = np.asarray(items)
        if rows.min() < 0 or rows.max() >= len(self.codes):  # a negative row would silently count from the end
            raise ValueError(f"item rows {rows.min()} to {rows.max()}, but there are {len(self.codes)} items.")
        return rows

    def _special_ids(self, tokens: Sequence[str]) -> list[int]:
        added = self.tokenizer.get_added_vocab()
        for token, as_text in zip(tokens, self.free_texts(tokens), strict=True):
            if token not in added:
                raise ValueError(f"the tokenizer has no token {token}: register SID and control tokens on it first.")
            if added[token] in as_text:
                raise ValueError(f"the tokenizer knows {token}, but not as a special token: item text could forge it.")
        return [added[token] for token in tokens]


def build_tokenizer(texts: Sequence[str], vocab_size: int = 2000) -> PreTrainedTokenizerFast:
    """
    Fit a small byte-level BPE to the catalogue's text, for backbones trained from scratch. Any text can be encoded; of
    each one here the first 5,000 letters are looked at.

    Args:
        texts (`Sequence[str]`):
            Item texts and the instructions that will be used.
        vocab_size (`int`, *optional*, defaults to `2000`):
            Most entries, with the 256 bytes and the two special tokens; fewer when the text is small.

    Returns:
        `PreTrainedTokenizerFast`: with `<|pad|>` (id 0) for padding and `<|endoftext|>` (id 1) as first and last token
        of a text; neither is added by itself. The same texts give the same tokenizer.

    Raises:
        ValueError: `vocab_size` does not hold the bytes and the special tokens.
    """
    smallest = 256 + 2
    if vocab_size < smallest:
        raise ValueError(f"`vocab_size` is {vocab_size}, expected at least {smallest}: bytes and special tokens.")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((text[:_LETTERS_FITTED] for text in texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD_TOKEN, eos_token=EOS_TOKEN, bos_token=EOS_TOKEN
    )
