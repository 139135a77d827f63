"""The prompt format of a checkpoint: from histories of item ids to token ids, and from recommendations to titles.

    [BOS] instruction <a_3><b_1> … <a_0><b_7> <|latent_start|>

The processor is saved with the weights, so training, evaluation and serving use the same format.
"""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from .catalog_lasar import SidCatalog
from .checkpoint_lasar import hub_arguments, push_arguments
from .configuration_lasar import CONTROL_TOKENS, LATENT_START_TOKEN, sid_token
from .files_lasar import checked_files, write_checksums


PROCESSOR_NAME = "processor_config.json"
PROMPT_LAYOUT = "{bos}{instruction}{history}" + LATENT_START_TOKEN


class LasarProcessor(ProcessorMixin):
    r"""
    Tokenizer, catalogue and prompt format of a LASAR checkpoint.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with the Semantic-ID and control tokens registered as special tokens, as
            [`LasarForGenerativeRec.from_backbone`] leaves it.
        catalog ([`SidCatalog`]):
            The items.
        instruction (`str`, *optional*, defaults to `"Recommend the next item."`):
            Text before the history.
        max_history (`int`, *optional*, defaults to `50`):
            Maximum number of history items in a prompt; the most recent ones are kept.
        add_bos (`bool`, *optional*):
            Whether a prompt starts with the tokenizer's BOS token. Defaults to the tokenizer's own setting, with
            which the backbone was trained. A prompt never has an EOS token.
        layout (`str`, *optional*, defaults to `"{bos}{instruction}{history}<|latent_start|>"`):
            Order of the parts of a prompt. It is stored, so that a checkpoint with another layout is refused.
        prefix_ids (`list[int]`, *optional*):
            Token ids of BOS and instruction. They are stored, so that a tokenizer with other ids is refused.

    Attributes:
        sid_token_ids (`torch.Tensor` of shape `(I, M)`):
            Token ids of each item's Semantic ID.
        prefix_ids (`list[int]`):
            Token ids before the history: BOS, if any, and the instruction.

    Raises:
        `ValueError`: if the tokenizer lacks a Semantic-ID or control token, has one that is not special, or merges
        text across the parts of a prompt, `instruction` contains a special token, `max_history` is less than 1,
        `layout` is another one, or `add_bos` is set without a BOS token.

    Example:

    ```python
    >>> from lasar_hf import LasarForGenerativeRec, LasarProcessor

    >>> processor = LasarProcessor.from_pretrained("outputs/quickstart/model")
    >>> model = LasarForGenerativeRec.from_pretrained("outputs/quickstart/model")
    >>> inputs = processor([["item-0", "item-1", "item-2"]])
    >>> output = model.recommend(**inputs, catalog=processor.catalog, top_k=3)
    >>> processor.decode_recommendations(output)[0]
    [{'item_id': 'item-3', 'title': 'Marble Canyon Almanac, Volume Four', 'score': -0.166}, …]
    ```
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        catalog: SidCatalog,
        instruction: str = "Recommend the next item.",
        max_history: int = 50,
        add_bos: bool | None = None,
        layout: str = PROMPT_LAYOUT,
        prefix_ids: Sequence[int] | None = None,
    ):
        super().__init__(tokenizer)
        if layout != PROMPT_LAYOUT:
            raise ValueError(
                f"layout is {layout!r}, but this version writes prompts as {PROMPT_LAYOUT!r}. Use the version of "
                "lasar_hf that saved the checkpoint."
            )
        if max_history < 1:
            raise ValueError(f"max_history is {max_history}; expected at least 1.")
        if add_bos is None:
            add_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        elif add_bos and tokenizer.bos_token_id is None:
            raise ValueError("add_bos is True, but the tokenizer has no BOS token.")
        self.catalog, self.instruction, self.max_history, self.add_bos = catalog, instruction, max_history, add_bos
        control_ids = self._special_token_ids(CONTROL_TOKENS)
        self.latent_start_token_id, self.latent_token_id, self.latent_end_token_id = control_ids
        self.sid_token_ids = self._sid_token_ids()
        bos_ids = [tokenizer.bos_token_id] if add_bos else []
        self.prefix_ids = [*bos_ids, *self._tokenize(instruction)]
        if self._tokenize(instruction) != self.text_ids([instruction])[0]:
            raise ValueError(f"instruction is {instruction!r}; expected plain text without special tokens.")
        if prefix_ids is not None and self.prefix_ids != list(prefix_ids):
            raise ValueError(
                f"The tokenizer encodes the instruction {instruction!r} with the ids {self.prefix_ids}, not with the "
                f"prefix_ids {list(prefix_ids)} of the training. Save the tokenizer of the training to the checkpoint."
            )
        # `prompt_ids` joins the ids of the parts, so the tokenizer must not merge text across them.
        if self._tokenize(self.prompt_text([0])) != self.prompt_ids([0]):
            raise ValueError(
                f"The tokenizer does not encode {self.prompt_text([0])!r} as the concatenation of its parts. Register "
                "Semantic-ID and control tokens as special tokens without stripping or normalization."
            )

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _special_token_ids(self, tokens: Sequence[str]) -> list[int]:
        """Ids of tokens, which must be special, so that item text cannot produce them."""
        added = self.tokenizer.get_added_vocab()
        for token, ids in zip(tokens, self.text_ids(tokens), strict=True):
            if token not in added:
                raise ValueError(
                    f"The tokenizer has no token {token}. Register the Semantic-ID and control tokens first, for "
                    "example with LasarForGenerativeRec.from_backbone."
                )
            if added[token] in ids:
                raise ValueError(
                    f"{token} is not a special token, so item text could produce it. Register it as a special token."
                )
        return [added[token] for token in tokens]

    def _sid_token_ids(self) -> torch.Tensor:
        """Token ids `(I, M)` of the catalogue's Semantic IDs."""
        codes = self.catalog.codes
        token_ids = torch.empty(codes.shape, dtype=torch.long)
        for level in range(codes.shape[1]):
            used, position = codes[:, level].unique(return_inverse=True)
            ids = self._special_token_ids([sid_token(level, code) for code in used.tolist()])
            token_ids[:, level] = torch.tensor(ids)[position]
        return token_ids

    def __call__(self, histories: Sequence[Sequence[str | int]]) -> BatchFeature:
        """
        Prompts of a batch of histories.

        Args:
            histories (`list[list[str | int]]` of length `B`):
                Item ids of each user, oldest first.

        Returns:
            [`~transformers.BatchFeature`]: `input_ids` and `attention_mask` `(B, L)`, left-padded, for
            [`LasarForGenerativeRec.recommend`].

        Raises:
            `ValueError`: if a history is empty or contains an item that the catalogue does not have.
        """
        return self.pad([self.prompt_ids(self.item_indices(history)) for history in histories])

    def item_indices(self, history: Sequence[str | int]) -> list[int]:
        """Indices of items in the catalogue, from their ids; an id that it does not have raises a `ValueError`."""
        if isinstance(history, (str, int)):
            raise ValueError(f"history is {history!r}; expected a list of item ids.")
        indices = [self.catalog.index_of.get(str(item_id)) for item_id in history]
        if None in indices:
            raise ValueError(f"The catalogue has no item {history[indices.index(None)]!r}.")
        return indices

    def pad(self, prompts: Sequence[Sequence[int]]) -> BatchFeature:
        """Left-pad `B` prompts of [`~LasarProcessor.prompt_ids`] to the batch of [`~LasarProcessor.__call__`]."""
        ids = [torch.tensor(prompt) for prompt in prompts]
        masks = [torch.ones_like(prompt) for prompt in ids]
        pad = partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
        pad_id = self.tokenizer.pad_token_id or 0
        return BatchFeature({"input_ids": pad(ids, padding_value=pad_id), "attention_mask": pad(masks)})

    def prompt_ids(self, history: Sequence[int]) -> list[int]:
        """Token ids of the prompt for item indices, oldest first. It ends in `<|latent_start|>`."""
        shown = self.sid_token_ids[self._shown(history)].flatten().tolist()
        return [*self.prefix_ids, *shown, self.latent_start_token_id]

    def prompt_text(self, history: Sequence[int]) -> str:
        """The prompt of [`~LasarProcessor.prompt_ids`] as text, to be tokenised with `add_special_tokens=False`."""
        codes = self.catalog.codes[self._shown(history)].tolist()
        tokens = [sid_token(level, code) for sid in codes for level, code in enumerate(sid)]
        bos = self.tokenizer.bos_token if self.add_bos else ""
        return bos + self.instruction + "".join(tokens) + LATENT_START_TOKEN

    def answer_ids(self, items: Sequence[int]) -> list[list[int]]:
        """The `M` token ids of each item's Semantic ID, from item indices."""
        return self.sid_token_ids[self._checked(items)].tolist() if len(items) else []

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of titles or descriptions, without special tokens: `<a_9>` in a text stays plain text."""
        if not len(texts):
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True).input_ids

    def decode_recommendations(self, output) -> list[list[dict[str, Any]]]:
        """
        Item ids, titles and scores of recommendations for this catalogue.

        Args:
            output ([`RecommendOutput`]):
                Output of [`LasarForGenerativeRec.recommend`].

        Returns:
            `list[list[dict]]`: for each prompt `item_id` (`str`), `title` (`str`, `None` if unknown) and `score`
            (`float`, log-probability), best first, without padding.
        """
        item_ids, titles = self.catalog.item_ids, self.catalog.titles
        return [
            [
                {"item_id": item_ids[item], "title": titles[item] if titles is not None else None, "score": score}
                for item, score in zip(items, scores, strict=True)
                if item >= 0
            ]
            for items, scores in zip(output.items.tolist(), output.scores.tolist(), strict=True)
        ]

    def check_matches(self, config) -> None:
        """
        Refuse, with a `ValueError`, a tokenizer whose Semantic-ID or control tokens have other ids than in the
        [`LasarConfig`] of a model, or a catalogue with other levels or codes.
        """
        config.check_token_ids()
        self.catalog.check_matches(config.num_sid_levels, config.codebook_size)
        for name in ("latent_start_token_id", "latent_token_id", "latent_end_token_id"):
            if getattr(self, name) != getattr(config, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)} in the tokenizer and {getattr(config, name)} in config.json. "
                    "Save the tokenizer of the training to the checkpoint."
                )
        levels = torch.arange(config.num_sid_levels) * config.codebook_size  # (M,)
        expected = config.sid_token_offset + levels + self.catalog.codes  # (I, M)
        if not self.sid_token_ids.equal(expected):
            raise ValueError(
                "The tokenizer has other ids for the Semantic-ID tokens than config.json (sid_token_offset "
                f"{config.sid_token_offset}). Save the tokenizer of the training to the checkpoint."
            )

    def check_format(self, instruction: str | None = None, max_history: int | None = None) -> None:
        """Refuse settings that differ from the checkpoint's prompt format, with a `ValueError`; `None` fits any."""
        for name, value in (("instruction", instruction), ("max_history", max_history)):
            if value is not None and value != getattr(self, name):
                raise ValueError(
                    f"{name} is {value!r}, but the checkpoint was trained with {getattr(self, name)!r}. Leave "
                    f"{name} out to use the checkpoint's prompt format."
                )

    def _shown(self, history: Sequence[int]) -> torch.Tensor:
        if not len(history):
            raise ValueError("history is empty; expected at least one item.")
        return self._checked(history[-self.max_history :])

    def _checked(self, indices: Sequence[int]) -> torch.Tensor:
        items = torch.as_tensor(indices)
        # A negative index would silently count from the end.
        if items.min() < 0 or items.max() >= len(self.sid_token_ids):
            raise ValueError(
                f"Item indices are {int(items.min())} … {int(items.max())}; expected 0 … "
                f"{len(self.sid_token_ids) - 1}."
            )
        return items

    def to_dict(self) -> dict[str, Any]:
        """The prompt format. Tokenizer and catalogue have their own files."""
        output = {name: getattr(self, name) for name in ("instruction", "max_history", "add_bos", "prefix_ids")}
        auto_map = {"AutoProcessor": "processing_lasar.LasarProcessor"}
        return output | {"layout": PROMPT_LAYOUT, "auto_map": auto_map, "processor_class": type(self).__name__}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """
        Write the prompt format (`processor_config.json`), the tokenizer, the catalogue and this code to a folder. With
        `push_to_hub`, upload them all; `repo_id` defaults to the folder's name, other `kwargs` are as for
        [`~transformers.ProcessorMixin.push_to_hub`].
        """
        self.catalog.save_pretrained(save_directory)
        files = super().save_pretrained(save_directory)
        write_checksums(save_directory, PROCESSOR_NAME)
        if push_to_hub:
            # The base class would only upload the files that it wrote itself, without the catalogue.
            self.push_to_hub(**push_arguments(save_directory, kwargs))
        return files

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "LasarProcessor":
        """
        Load a processor from a folder or a model id on the Hub. Arguments as for
        [`~transformers.ProcessorMixin.from_pretrained`].

        Raises:
            `ValueError`: if a file is damaged or not the one that was saved, or as for [`LasarProcessor`].
        """
        with checked_files(pretrained_model_name_or_path, PROCESSOR_NAME, **hub_arguments(kwargs)):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # A default in place of a missing setting would silently be another prompt than in training.
        for name, kind in (("instruction", str), ("max_history", int), ("add_bos", bool), ("layout", str)):
            value = (processor_dict or {}).get(name)
            if type(value) is not kind:
                raise ValueError(
                    f"processor_config.json of {pretrained_model_name_or_path} has {name} {value!r}; expected "
                    f"{kind.__name__}. Save the LasarProcessor of the training to that folder."
                )
        try:
            arguments = super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
        except OSError:
            raise
        except Exception as error:  # the tokenizers library raises nothing more precise
            raise ValueError(
                f"tokenizer.json or tokenizer_config.json of {pretrained_model_name_or_path} is damaged ({error!r}). "
                "Save or download the checkpoint again."
            ) from error
        return [*arguments, SidCatalog.from_pretrained(pretrained_model_name_or_path, **kwargs)]


__all__ = ["LasarProcessor"]
