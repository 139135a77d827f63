"""A small tokenizer fitted to the catalogue's text, for backbones trained from scratch."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


PAD_TOKEN = "<|pad|>"
EOS_TOKEN = "<|endoftext|>"
_LETTERS_FITTED = 5000  # of a text: a title may be one endless word, and time grows with the square of a word's length


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
