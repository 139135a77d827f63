"""Bodies of requests and answers."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr


MAX_TOP_K = 100
MAX_HISTORY = 10_000
MAX_NAME = 4096  # characters of an id or title, which an error repeats

Item = Annotated[StrictStr, Field(max_length=MAX_NAME)] | StrictInt
Items = Annotated[list[Item], Field(max_length=MAX_HISTORY)]


class Body(BaseModel):
    """A body in which a mistyped name is an error."""

    model_config = ConfigDict(extra="forbid")


class RecommendRequest(Body):
    """A request of one user (`history`) or of several (`histories`)."""

    history: Items | None = Field(None, description="Item ids or titles of one user, oldest first.")
    histories: list[Items] | None = Field(None, min_length=1, description="Histories of several users instead.")
    top_k: int = Field(10, ge=1, le=MAX_TOP_K, description="Number of items per user.")
    latent_steps: int | None = Field(
        None, ge=0, description="Latent steps, 0 for direct generation. By default, the policy head chooses."
    )
    exclude_history: bool | None = Field(
        None, description="Leave out the items of the history. By default, as the model was trained."
    )
    allow: Items | None = Field(None, description="Ids or titles of the items that may be recommended; null for all.")
    deny: Items | None = Field(None, description="Ids or titles of items that may not be recommended.")
    unknown_items: Literal["error", "skip"] = Field(
        "error", description="Whether unknown items of a history are refused or left out."
    )


class RecommendedItem(BaseModel):
    """An item of a ranked list."""

    item_id: str
    title: str | None
    score: float = Field(description="Log-probability.")


class Recommendation(BaseModel):
    """The ranked items of one user."""

    items: list[RecommendedItem] = Field(description="Best first.")
    latent_steps: int | None = Field(description="Latent steps taken; null if no item of the history is known.")


class Recommendations(BaseModel):
    """The answer to `histories`, in their order."""

    results: list[Recommendation]


class NewItem(Body):
    """An item to add to the catalogue."""

    item_id: StrictStr = Field(min_length=1)
    title: str | None = None
    codes: list[Annotated[StrictInt, Field(ge=0, lt=2**31)]] | None = Field(
        None,
        description="Its Semantic ID, for example of lasar_hf.semantic_ids.assign_new_items. An item that was "
        "removed keeps its own if it is left out.",
    )


class AddRequest(Body):
    """Items to add, all or none."""

    items: list[NewItem] = Field(min_length=1)


class RemoveRequest(Body):
    """Items that are not recommended any more; histories may still contain them."""

    item_ids: list[StrictStr] = Field(min_length=1)


class CatalogCounts(BaseModel):
    """Items that can be recommended, and removed ones."""

    num_items: int
    num_removed: int


class Health(CatalogCounts):
    """State of the server."""

    status: str
    model: str
    max_latent_steps: int
    queue_length: int
