"""What a recommendation is made of: the depth policy, the list at every depth, the latent path and the beams."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .configuration_lasar import sid_token
from .memory_lasar import ItemMemory


_CHOSEN, _OTHER = "tab:orange", "tab:blue"  # colours of the number of steps that the policy chose, and of others


@dataclass
class Explanation:
    """
    How a model came to its recommendations for one user, as plain data.

    Args:
        history (`list[dict]`):
            The user's items, oldest first: `item_id` and `title`.
        latent_steps (`int`):
            Latent steps that the policy chose, its most likely number.
        depth_probabilities (`dict[int, float]`):
            The policy's probability of each number of steps it may choose.
        by_depth (`list[list[dict]]` of length `1 + N_max`):
            The recommendations after 0 … `N_max` steps: `item_id`, `title` and `score`, best first.
        nearest_items (`list[list[dict]]` of length `1 + N_max`):
            Items nearest to each latent state `h_0 … h_{N_max}`: `item_id`, `title` and `similarity`, the cosine
            between the state and the head's rows of the item's codes, averaged over levels.
        path (`list[tuple[float, float]]` of length `1 + N_max`):
            The latent states on their first two principal components.
        beam_tree (`dict`):
            The recommendations after `latent_steps` by their codes. A node has its `token`, the `probability` of the
            listed Semantic IDs below it, and `children`; a leaf has `item_ids` and `titles`. Items that share a
            Semantic ID have its probability once, that of the likeliest of them.

    Example:

    ```python
    >>> explanation = recommender.explain(["item-0", "item-1"])
    >>> [items[0]["title"] for items in explanation.by_depth]
    >>> explanation.plot("explanation.png")
    ```
    """

    history: list[dict[str, Any]]
    latent_steps: int
    depth_probabilities: dict[int, float]
    by_depth: list[list[dict[str, Any]]]
    nearest_items: list[list[dict[str, Any]]]
    path: list[tuple[float, float]]
    beam_tree: dict[str, Any]

    def plot(self, path: str, num_items: int = 5) -> None:
        """Save [`~Explanation.figure`] to an image file, such as `explanation.png`."""
        self.figure(num_items).savefig(path, dpi=110)

    def figure(self, num_items: int = 5):
        """
        The policy, the probability of the best items after every number of steps, and the latent path as a matplotlib
        figure.

        Args:
            num_items (`int`, *optional*, defaults to `5`):
                Items of the chosen depth to follow over all depths.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("A figure needs matplotlib. Install it with: pip install matplotlib") from error
        figure = Figure(figsize=(13, 5), layout="constrained")
        policy, lists, latent = figure.subplots(1, 3, width_ratios=[2, 3, 3])
        chosen = self.latent_steps
        legend = {"fontsize": "x-small", "frameon": False, "loc": "upper center", "bbox_to_anchor": (0.5, -0.17)}
        recent = [*["…"][: len(self.history) - 3], *map(_short, self.history[-3:])]
        figure.suptitle(f"The user had: {' → '.join(recent)}", fontsize="medium")
        # 1. The policy.
        depths = list(self.depth_probabilities)
        colours = [_CHOSEN if depth == chosen else _OTHER for depth in depths]
        policy.bar(depths, list(self.depth_probabilities.values()), color=colours)
        policy.set(
            title=f"The policy takes {chosen} latent step{'' if chosen == 1 else 's'}",
            xlabel="latent steps",
            ylabel="probability of this number",
            xticks=depths,
        )
        # 2. The best items of the chosen depth, after every number of steps. Small probabilities stay visible.
        probability = [{item["item_id"]: math.exp(item["score"]) for item in items} for items in self.by_depth]
        lists.axvline(chosen, color=_CHOSEN, linewidth=6, alpha=0.3)
        names = ("blue", "green", "red", "purple", "brown", "pink", "cyan")
        lists.set_prop_cycle(color=[f"tab:{name}" for name in names])
        for rank, item in enumerate(self.by_depth[chosen][:num_items], start=1):
            line = [items.get(item["item_id"], math.nan) for items in probability]
            lists.plot(line, marker="o", label=f"{rank}. {_short(item)}")
        lists.set(title="Recommended items", xlabel="after so many latent steps", ylabel="probability", yscale="log")
        lists.set_xticks(range(len(self.by_depth)))
        if self.by_depth[chosen]:
            lists.legend(**legend)
        # 3. The latent states, each with its nearest item.
        latent.plot(*zip(*self.path, strict=True), color="lightgray", zorder=0)
        for step, (point, nearest) in enumerate(zip(self.path, self.nearest_items, strict=True)):
            colour = _CHOSEN if step == chosen else _OTHER
            latent.scatter(*point, s=180, color=colour, label=f"{step}: near {_short(nearest[0])}")
            latent.annotate(str(step), point, color="white", ha="center", va="center", fontsize="small")
        latent.margins(0.12)
        latent.set(title="Latent state after each step", xlabel="first two principal components", xticks=[], yticks=[])
        latent.legend(**legend, markerscale=0.5)
        return figure


def _short(item: dict[str, Any], length: int = 36) -> str:
    text = item["title"] or item["item_id"]
    text = text if len(text) <= length else text[: length - 1] + "…"
    return text.replace("$", r"\$")  # otherwise matplotlib reads formulas


@torch.no_grad()
def explain(
    model, processor, history: Sequence[int], top_k: int = 10, num_beams: int = 50, memory: ItemMemory | None = None
) -> Explanation:
    """
    Explain the recommendations for one history of item indices, oldest first. Arguments as for
    [`LasarForGenerativeRec.recommend`]; see [`Explanation`].
    """
    config, catalog = model.config, processor.catalog
    max_steps = config.max_latent_steps
    prompt = processor.prompt_ids(history)
    # 1. One chain of the largest depth: the policy, and the latent states. The last slot is read with <|latent_end|>.
    with model.evaluation_mode():
        inputs = processor.pad([prompt]).to(model.device)
        state = model.encode_prompts(**inputs, latent_steps=max_steps)
        end = inputs["input_ids"].new_full((1, 1), config.latent_end_token_id)
        model.get_decoder().read_tokens(state, end, torch.ones(1, 1, 1, dtype=torch.bool, device=end.device))
    states = state.latent_states()[0].float()  # (1 + N_max, H)
    policy = state.depth_logits[0].float().softmax(dim=-1).tolist()  # (C,)
    probabilities = dict(enumerate(policy, start=config.min_latent_steps))
    chosen = max(probabilities, key=probabilities.get)
    # 2. The recommendations at every depth, as a batch.
    inputs = processor.pad([prompt] * (1 + max_steps)).to(model.device)
    own = [torch.tensor(history)] * (1 + max_steps) if config.exclude_history else None
    output = model.recommend(
        **inputs,
        catalog=catalog,
        top_k=top_k,
        num_beams=num_beams,
        latent_steps=torch.arange(1 + max_steps),
        deny=own,
        allow_empty=True,
        memory=memory,
    )
    by_depth = processor.decode_recommendations(output)
    return Explanation(
        history=[_item(catalog, item) for item in history],
        latent_steps=chosen,
        depth_probabilities=probabilities,
        by_depth=by_depth,
        nearest_items=nearest_items(model, catalog, states, top_k),
        path=_principal_plane(states),
        beam_tree=_beam_tree(catalog, by_depth[chosen]),
    )


def _item(catalog, index: int) -> dict[str, Any]:
    """Id and title of an item."""
    return {"item_id": catalog.item_ids[index], "title": catalog.titles[index] if catalog.titles else None}


def nearest_items(model, catalog, states: torch.Tensor, top_k: int) -> list[list[dict[str, Any]]]:
    """The items nearest to each of the states `(S, H)`, see [`Explanation`]."""
    config = model.config
    # 1. Cosine between each state and the head's row of each code.
    start = config.sid_token_id(0, 0)
    rows = model.lm_head.weight[start : start + config.num_sid_tokens].float()  # (M · K, H)
    cosine = nn.functional.normalize(states, dim=-1) @ nn.functional.normalize(rows, dim=-1).T  # (S, M · K)
    cosine = cosine.unflatten(1, (config.num_sid_levels, -1))  # (S, M, K)
    # 2. Mean over the codes of each item that can be recommended.
    items = (~catalog.removed).nonzero()[:, 0]  # (I,)
    codes = catalog.codes[items].long().to(states.device)  # (I, M)
    similarity = sum(cosine[:, level, codes[:, level]] for level in range(config.num_sid_levels))  # (S, I)
    best = (similarity / config.num_sid_levels).topk(min(top_k, len(items)), dim=-1)
    return [
        [
            _item(catalog, item) | {"similarity": value}
            for item, value in zip(items[index].tolist(), values, strict=True)
        ]
        for index, values in zip(best.indices.cpu(), best.values.tolist(), strict=True)
    ]


def _principal_plane(states: torch.Tensor) -> list[tuple[float, float]]:
    """States `(S, H)` on their first two principal components."""
    centred = states - states.mean(dim=0)
    left, scale, _ = torch.linalg.svd(centred, full_matrices=False)
    points = nn.functional.pad((left * scale)[:, :2], (0, max(0, 2 - len(scale))))  # (S, 2)
    return [tuple(point) for point in points.tolist()]


def _beam_tree(catalog, recommended: list[dict[str, Any]]) -> dict[str, Any]:
    """The tree of the codes of recommended items, with their probabilities added up."""
    root: dict[str, Any] = {"token": None, "probability": 0.0, "children": []}
    leaves = set()
    for item in recommended:
        codes = catalog.codes[catalog.index_of[item["item_id"]]].tolist()
        probability = 0.0 if tuple(codes) in leaves else math.exp(item["score"])
        leaves.add(tuple(codes))
        node = root
        node["probability"] += probability
        for level, code in enumerate(codes):
            token = sid_token(level, code)
            child = next((child for child in node["children"] if child["token"] == token), None)
            if child is None:
                child = {"token": token, "probability": 0.0, "children": []}
                node["children"].append(child)
            node = child
            node["probability"] += probability
        node.setdefault("item_ids", []).append(item["item_id"])
        node.setdefault("titles", []).append(item["title"])
    return root


__all__ = ["Explanation", "explain"]
