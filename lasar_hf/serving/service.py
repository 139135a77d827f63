"""A recommender behind a queue, with a catalogue that can change meanwhile."""

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..model.catalog_lasar import SidCatalog
from ..model.processing_lasar import LasarProcessor
from ..model.recommender_lasar import Recommender
from .batcher import Batcher
from .metrics import Metrics
from .schemas import CatalogCounts, NewItem, RecommendRequest


class User(NamedTuple):
    """A user of a batch: item ids."""

    history: Sequence[str | int]
    allow: Sequence[str | int] | None
    deny: Sequence[str | int] | None


class Settings(NamedTuple):
    """What the users of a batch have in common."""

    top_k: int
    latent_steps: int | None
    exclude_history: bool | None


class RecommendService:
    """
    Recommends in batches and changes the catalogue between them.

    Args:
        recommender ([`Recommender`]):
            The model with its catalogue. It is replaced as a whole when the catalogue changes, so a batch sees the
            catalogue before or after a change.
        num_beams (`int`, *optional*, defaults to `50`):
            Width of the beam search.
        batching (`dict`):
            Arguments of [`~batcher.Batcher`].

    Raises:
        `ValueError`: if a number is out of range.
    """

    def __init__(self, recommender: Recommender, num_beams: int = 50, **batching):
        if num_beams < 1:
            raise ValueError(f"num_beams is {num_beams}; expected at least 1.")
        self.recommender, self.num_beams = recommender, num_beams
        self.batcher = Batcher(self._recommend, **batching)  # type: ignore[arg-type]
        self.metrics = Metrics(self.batcher.__len__)
        self._change = asyncio.Lock()

    def _recommend(self, users: list[User], settings: Settings) -> list[dict]:
        self.metrics.batch_size.observe(len(users))
        return self.recommender.recommend(
            [user.history for user in users],
            num_beams=self.num_beams,
            allow=[user.allow for user in users],  # type: ignore[misc]
            deny=[user.deny for user in users],  # type: ignore[misc]
            unknown_items="skip",
            batch_size=len(users),
            **settings._asdict(),
        )

    async def warm_up(self) -> None:
        """Recommend once, so that the first user does not wait for what is built at the first call."""
        recommender = self.recommender
        recommender.item_index("")  # the index of titles
        user = User(recommender.catalog.item_ids[:1], None, None)
        await self.batcher.submit([user], Settings(1, None, None))

    def read(self, request: RecommendRequest) -> tuple[list[User], Settings]:
        """
        The users and settings of a request.

        Raises:
            `ValueError`: if there is not exactly one of `history` and `histories`, a history is empty, an item is
            unknown, or a setting does not fit the model.
        """
        recommender, config = self.recommender, self.recommender.model.config
        if (request.history is None) == (request.histories is None):
            raise ValueError("Expected history, for one user, or histories, for several.")
        histories = request.histories or [request.history]
        if len(histories) > self.batcher.max_queue:
            raise ValueError(f"The request has {len(histories)} users; expected at most {self.batcher.max_queue}.")
        if request.latent_steps is not None and request.latent_steps > config.max_latent_steps:
            raise ValueError(f"latent_steps is {request.latent_steps}; expected 0 … {config.max_latent_steps}.")
        if request.exclude_history is not None:
            config.check_exclusion(request.exclude_history)

        def ids(items: Sequence[str | int], unknown_items: str = "error") -> list[str]:
            return [recommender.catalog.item_ids[index] for index in recommender.item_indices(items, unknown_items)]

        allow, deny = (items and ids(items) for items in (request.allow, request.deny))
        users = []
        for number, history in enumerate(histories):
            try:
                users.append(User(ids(history, request.unknown_items), allow, deny))
            except ValueError as error:
                where = "" if request.histories is None else f"histories.{number}: "
                raise ValueError(f"{where}{error}") from error
        return users, Settings(request.top_k, request.latent_steps, request.exclude_history)

    async def add(self, items: list[NewItem]) -> None:
        """Add items to the catalogue; a `ValueError` says why they cannot be added."""
        await self._replace_catalog(lambda catalog: with_items(catalog, items))

    async def remove(self, item_ids: list[str]) -> None:
        """Hide items of the catalogue; a `ValueError` says why they cannot be removed."""
        await self._replace_catalog(lambda catalog: catalog.remove(item_ids))

    async def _replace_catalog(self, change: Callable[[SidCatalog], SidCatalog]) -> None:
        async with self._change:  # a change starts from the catalogue of the change before
            old = self.recommender
            self.recommender = await asyncio.to_thread(lambda: with_catalog(old, change(old.catalog)))

    def counts(self) -> CatalogCounts:
        """Sizes of the catalogue."""
        catalog = self.recommender.catalog
        return CatalogCounts(num_items=catalog.num_items, num_removed=len(catalog) - catalog.num_items)


def with_catalog(recommender: Recommender, catalog: SidCatalog) -> Recommender:
    """The recommender with another catalogue, which has the items of its own at the same indices."""
    old, config = recommender.processor, recommender.model.config
    catalog.check_matches(config.num_sid_levels, config.codebook_size)
    processor = LasarProcessor(old.tokenizer, catalog, old.instruction, old.max_history, old.add_bos)
    changed = Recommender(recommender.model, processor, recommender.memory, recommender.card)
    changed.item_index("")  # builds the index of titles
    return changed


def with_items(catalog: SidCatalog, items: list[NewItem]) -> SidCatalog:
    """The catalogue with new items and returning ones, which keep codes and titles that are left out."""
    codes, titles = [], []
    for item in items:
        index, own, title = catalog.index_of.get(item.item_id), item.codes, item.title
        if index is not None:
            own = catalog.codes[index].tolist() if own is None else own
            title = catalog.titles[index] if title is None and catalog.titles else title
        if own is None or len(own) != catalog.num_levels:
            raise ValueError(
                f"Item {item.item_id!r} has the codes {own}; expected {catalog.num_levels} codes, for example of "
                "lasar_hf.semantic_ids.assign_new_items."
            )
        codes.append(own)
        titles.append(title)
    return catalog.add(codes, [item.item_id for item in items], titles)
