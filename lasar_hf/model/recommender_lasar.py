"""A checkpoint as one object: from histories of item ids or titles to ranked items with titles."""

import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers.utils import cached_file

from .catalog_lasar import SidCatalog
from .checkpoint_lasar import hub_arguments, push_arguments
from .configuration_lasar import LasarConfig
from .explain_lasar import Explanation, explain
from .files_lasar import atomic_file
from .memory_lasar import MEMORY_NAME, ItemMemory
from .modeling_lasar import LasarForGenerativeRec
from .processing_lasar import LasarProcessor


CARD_NAME = "README.md"
# Files of an earlier upload that are removed, unless they are written again: shards and a memory would be loaded.
OLD_WEIGHTS = ("model*.safetensors*", MEMORY_NAME)
SEMANTIC_ID = re.compile(r"(<[a-z]_\d+>\s*)+")


def title_key(title: str) -> str:
    """Titles that differ only in case, spaces and the way to write the same letters in Unicode have the same key."""
    return " ".join(unicodedata.normalize("NFKC", title.casefold()).split())


def is_history(histories: Sequence) -> bool:
    """Whether this is one history, items instead of a list for each user."""
    return len(histories) > 0 and isinstance(histories[0], (str, Integral))


def renamed_card(card: str, name: str) -> str:
    """A model card for another name of the checkpoint, in its header, its title and the first lines of its usage."""
    card = re.sub(r"^(model-index:\n- name: ).*", lambda match: match[1] + json.dumps(name), card, flags=re.MULTILINE)
    card = re.sub(r"^# .*", lambda match: f"# {name}", card, count=1, flags=re.MULTILINE)
    line = f"name = {json.dumps(name)}  # the folder"
    return re.sub(r'^name = ".*"  # the folder', lambda match: line, card, count=1, flags=re.MULTILINE)


class Recommender:
    """
    Model, prompt format, catalogue and item memory of a checkpoint.

    Args:
        model ([`LasarForGenerativeRec`]), processor ([`LasarProcessor`]):
            The model, and its prompt format and catalogue.
        memory ([`ItemMemory`], *optional*):
            Memory to mix the model with. Set `recommender.memory = None` to leave it out.
        card (`str`, *optional*):
            Text of the model card, saved as `README.md`.

    Example:

    ```python
    >>> from lasar_hf import Recommender

    >>> recommender = Recommender.from_pretrained("outputs/quickstart/model")
    >>> recommender.recommend([["item-0", "Marble Canyon Almanac, Volume Two"]], top_k=1)
    [{'items': [{'item_id': 'item-3', 'title': 'Marble Canyon Almanac, Volume Four', 'score': -0.055}],
      'latent_steps': 2}]
    ```
    """

    def __init__(
        self,
        model: LasarForGenerativeRec,
        processor: LasarProcessor,
        memory: ItemMemory | None = None,
        card: str | None = None,
    ):
        processor.check_matches(model.config)
        self.model, self.processor, self.card = model, processor, card
        self.memory = memory
        model.catalog = processor.catalog

    @property
    def catalog(self) -> SidCatalog:
        """The items that can be recommended."""
        return self.processor.catalog

    @property
    def memory(self) -> ItemMemory | None:
        """The memory that the model is mixed with."""
        return self._memory

    @memory.setter
    def memory(self, memory: ItemMemory | None) -> None:
        if memory is not None:
            memory.check_matches(self.catalog)
            memory = memory.to(self.model.device)
        self._memory = memory

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, device: str | torch.device | None = None, **kwargs
    ) -> "Recommender":
        """
        Load all parts of a checkpoint from a folder or a model id on the Hub.

        Args:
            pretrained_model_name_or_path (`str`):
                Folder or model id.
            device (`str` or `torch.device`, *optional*):
                Where to compute. Defaults to `device_map`, if it is given, or else the accelerator, if there is one.
            kwargs:
                Passed to [`LasarForGenerativeRec.from_pretrained`], such as `dtype`; `revision`, `token`, `cache_dir`
                and `local_files_only` hold for all parts.
        """
        hub = hub_arguments(kwargs)
        processor = LasarProcessor.from_pretrained(pretrained_model_name_or_path, **hub)
        # Before the weights are read, which takes longer and knows no tokenizer.
        processor.check_matches(LasarConfig.from_pretrained(pretrained_model_name_or_path, **hub))
        model = LasarForGenerativeRec.from_pretrained(pretrained_model_name_or_path, **kwargs).eval()
        if device is None and "device_map" not in kwargs and torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator()
        path = cached_file(
            pretrained_model_name_or_path, CARD_NAME, _raise_exceptions_for_missing_entries=False, **hub
        )
        card = None
        if path is not None:
            with open(path, encoding="utf-8") as file:
                card = file.read()
        return cls(model if device is None else model.to(device), processor, model.memory, card)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """
        Save all parts to a folder. Without a memory, one that the folder has is removed, since its weight was fitted
        to another model. `kwargs` as for [`LasarForGenerativeRec.save_pretrained`], such as `max_shard_size`; with
        `push_to_hub`, all parts are uploaded too.
        """
        hub = push_arguments(save_directory, kwargs)
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        if self.memory is not None:
            self.memory.save_pretrained(save_directory)
        elif os.path.exists(os.path.join(save_directory, MEMORY_NAME)):
            os.remove(os.path.join(save_directory, MEMORY_NAME))
        if self.card is not None:
            with atomic_file(os.path.join(save_directory, CARD_NAME)) as temporary:
                temporary.write_text(self.card, encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(**hub)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        max_shard_size: int | str = "50GB",
        **kwargs,
    ) -> str:
        """
        Upload all parts in one commit, with a card whose usage has this name. Other weights and another memory that
        the repository has are removed.

        Args:
            repo_id (`str`):
                Name on the Hub, such as `user/shop`.
            private (`bool`, *optional*):
                Whether a new repository is private.
            token (`str`, *optional*):
                Token of the Hub. Defaults to that of `hf auth login`.
            revision (`str`, *optional*):
                Branch, which is made if it is new. Defaults to `main`.
            max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`):
                Largest size of a file of weights.
            kwargs:
                Passed to [`~huggingface_hub.HfApi.upload_folder`], such as `commit_message` and `create_pr`.

        Returns:
            `str`: address of the commit.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        kwargs.setdefault("commit_message", "Upload recommender")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            if self.card is not None:
                with open(os.path.join(folder, CARD_NAME), "w", encoding="utf-8") as file:
                    file.write(renamed_card(self.card, repo_id))
            return api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, delete_patterns=[*OLD_WEIGHTS], **kwargs
            )

    @cached_property
    def _items_of_titles(self) -> tuple[dict[str, int], dict[str, list[int]]]:
        """The first item of each title, and all items of the titles that several have, by [`title_key`]."""
        first: dict[str, int] = {}
        shared: dict[str, list[int]] = {}
        for index, title in enumerate(self.catalog.titles or []):
            if title is not None:
                key = title_key(title)
                if first.setdefault(key, index) != index:
                    shared.setdefault(key, [first[key]]).append(index)
        return first, shared

    def item_index(self, item: str | int) -> int | None:
        """
        Index of an item in the catalogue from its id or title, `None` if the catalogue does not have it.

        Raises:
            `ValueError`: if several items have the title, or the text is a Semantic ID.
        """
        index = self.catalog.index_of.get(str(item))
        if index is not None:
            return index
        if SEMANTIC_ID.fullmatch(str(item).strip()):
            raise ValueError(f"{item!r} is a Semantic ID; expected the id or the title of an item.")
        first, shared = self._items_of_titles
        key = title_key(str(item))
        if key in shared:
            ids = ", ".join(repr(self.catalog.item_ids[index]) for index in shared[key][:5])
            raise ValueError(f"{len(shared[key])} items have the title {item!r}. Use an item id: {ids}.")
        return first.get(key)

    def item_indices(self, history: Sequence[str | int], unknown_items: str = "error") -> list[int]:
        """Indices of the items of a history, oldest first. Arguments and errors as for [`~Recommender.recommend`]."""
        if isinstance(history, str) or not isinstance(history, Iterable):
            raise ValueError(f"The history is {history!r}; expected a list of item ids or titles.")
        indices = [self.item_index(item) for item in history]
        if unknown_items == "skip":
            return [index for index in indices if index is not None]
        if None in indices:
            item = history[indices.index(None)]
            key = title_key(str(item))
            titles = self._items_of_titles[0].items() if key else ()
            near = [self.catalog.titles[index] for title, index in titles if key in title]
            hint = f" Titles that contain it: {', '.join(map(repr, near[:3]))}." if near else ""
            raise ValueError(
                f"The catalogue has no item {item!r}.{hint} Use an item id or a title, or unknown_items='skip'."
            )
        if not indices:
            raise ValueError("The history is empty; expected at least one item.")
        return indices

    def recommend(
        self,
        histories: Sequence[Sequence[str | int]],
        top_k: int = 10,
        num_beams: int = 50,
        latent_steps: int | None = None,
        exclude_history: bool | None = None,
        allow: Sequence[Sequence[str] | None] | None = None,
        deny: Sequence[Sequence[str] | None] | None = None,
        unknown_items: str = "error",
        batch_size: int = 64,
    ) -> list[dict]:
        """
        Recommend items to users.

        Args:
            histories (`list[list[str]]` of length `B`):
                Item ids or titles of each user, oldest first. Titles are matched without case and extra spaces.
            top_k, num_beams (`int`, *optional*, defaults to `10` and `50`):
                Number of items per user, and width of the beam search.
            latent_steps (`int`, *optional*):
                Latent steps, 0 for direct generation. Defaults to those that the policy head chooses.
            exclude_history (`bool`, *optional*):
                Leave out the items of the history. Defaults to `model.config.exclude_history`.
            allow, deny (`list[list[str] | None]` of length `B`, *optional*):
                Item ids or titles that each user may get, and may not get; `None` for no limit.
            unknown_items (`str`, *optional*, defaults to `"error"`):
                `"error"` refuses unknown items and empty histories. `"skip"` leaves unknown items out; a user without
                a known item gets no items.
            batch_size (`int`, *optional*, defaults to `64`):
                Users per batch. Histories of similar length are read together.

        Returns:
            `list[dict]`: for each user `items`, a list of `item_id`, `title` (`None` if unknown) and `score`
            (log-probability), best first, and `latent_steps`, the number of steps taken (`None` without a known item).

        Raises:
            `ValueError`: if an item is unknown, a title is that of several items, a text is a Semantic ID, a history
            is empty, or as for [`LasarForGenerativeRec.recommend`].
        """
        if unknown_items not in ("error", "skip"):
            raise ValueError(f"unknown_items is {unknown_items!r}; expected 'error' or 'skip'.")
        is_list = isinstance(histories, Iterable) and not isinstance(histories, str)
        histories = list(histories) if is_list else []
        if not is_list or is_history(histories):
            raise ValueError("histories is one history or no list; expected a list of histories, one for each user.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1.")
        if exclude_history is None:
            exclude_history = self.model.config.exclude_history
        self.model.config.check_exclusion(exclude_history)
        indices = [self.item_indices(history, unknown_items) for history in histories]
        allow_indices = self._listed("allow", allow, len(indices))
        deny_indices = self._listed("deny", deny, len(indices))
        results: list[dict[str, Any]] = [{"items": [], "latent_steps": None} for _ in indices]
        known = [user for user, items in enumerate(indices) if items]
        order = sorted(known, key=lambda user: len(indices[user]))
        for start in range(0, len(order), batch_size):
            users = order[start : start + batch_size]
            # The whole history is left out, also the part that is too old for the prompt.
            denied = [
                torch.tensor((indices[user] if exclude_history else []) + (deny_indices[user] or []), dtype=torch.long)
                for user in users
            ]
            allowed = [
                None if items is None else torch.tensor(items, dtype=torch.long)
                for items in (allow_indices[user] for user in users)
            ]
            inputs = self.processor.pad([self.processor.prompt_ids(indices[user]) for user in users])
            output = self.model.recommend(
                **inputs.to(self.model.device),
                catalog=self.catalog,
                top_k=top_k,
                num_beams=num_beams,
                latent_steps=latent_steps,
                allow=allowed,
                deny=denied,
                allow_empty=True,
                memory=self.memory,
            )
            lists = self.processor.decode_recommendations(output)
            for user, items, steps in zip(users, lists, output.latent_steps.tolist(), strict=True):
                results[user] = {"items": items, "latent_steps": steps}
        return results

    def _listed(self, name: str, lists: Sequence | None, num_users: int) -> list[list[int] | None]:
        if lists is None:
            return [None] * num_users
        if isinstance(lists, str) or len(lists) != num_users:
            raise ValueError(f"{name} has {len(lists)} lists; expected one for each of the {num_users} histories.")
        if any(isinstance(items, (str, Integral)) for items in lists):
            raise ValueError(f"{name} is {lists!r}; expected a list of items, or None, for each of the histories.")
        return [None if items is None else self.item_indices(items) if len(items) else [] for items in lists]

    def explain(self, history: Sequence[str | int], top_k: int = 10, num_beams: int = 50) -> Explanation:
        """
        How the model came to its recommendations for one user, see [`Explanation`].

        Args:
            history (`list[str]`):
                Item ids or titles, oldest first.
            top_k, num_beams (`int`, *optional*, defaults to `10` and `50`):
                As for [`~Recommender.recommend`].
        """
        return explain(self.model, self.processor, self.item_indices(history), top_k, num_beams, self.memory)


__all__ = ["Recommender"]
