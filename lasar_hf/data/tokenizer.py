"""A small tokenizer that is fitted to the catalogue's text, for backbones trained from scratch."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


PAD_TOKEN = "<|pad|>"
EOS_TOKEN = "<|endoftext|>"
MAX_CHARACTERS = 5000  # per text, since the time grows with the square of the length of a word


def build_tokenizer(texts: Sequence[str], vocab_size: int = 2000) -> PreTrainedTokenizerFast:
    """
    Fit a small byte-level BPE tokenizer to the catalogue's text. It can encode any text.

    Args:
        texts (`Sequence[str]`):
            Item texts and the instructions that will be used. The first 5,000 characters of each are read.
        vocab_size (`int`, *optional*, defaults to `2000`):
            Maximum size, including 256 bytes and two special tokens; less if there is little text.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: with `<|pad|>` (id 0) for padding and `<|endoftext|>` (id 1) as BOS
        and EOS token, neither of which is added automatically. The same texts give the same tokenizer.

    Raises:
        `ValueError`: if `vocab_size` is too small for the bytes and the special tokens.
    """
    smallest = 256 + 2
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; expected at least {smallest}, for bytes and special tokens.")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((text[:MAX_CHARACTERS] for text in texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD_TOKEN, eos_token=EOS_TOKEN, bos_token=EOS_TOKEN
    )
