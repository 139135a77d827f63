"""What a recommendation is made of: the depth policy, the list at every depth, the latent path and the beams."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .configuration_lasar import sid_token
from .memory_lasar import ItemMemory


@dataclass
class Explanation:
    """
    How a model came to its recommendations for one user, as plain data.

    Args:
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
            listed items below it, and `children`; a leaf has `item_ids` and `titles`.

    Example:

    ```python
    >>> explanation = recommender.explain(["item-0", "item-1"])
    >>> [items[0]["title"] for items in explanation.by_depth]
    >>> explanation.plot("explanation.png")
    ```
    """

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
        figure = Figure(figsize=(13, 4.2), layout="constrained")
        policy, lists, latent = figure.subplots(1, 3, width_ratios=[2, 3, 4])
        # 1. The policy.
        depths = list(self.depth_probabilities)
        colours = ["tab:orange" if depth == self.latent_steps else "tab:blue" for depth in depths]
        policy.bar(depths, list(self.depth_probabilities.values()), color=colours)
        policy.set(title="How many latent steps?", xlabel="latent steps", ylabel="policy's probability", xticks=depths)
        # 2. The best items of the chosen depth, after every number of steps.
        probability = [{item["item_id"]: item["score"] for item in items} for items in self.by_depth]
        for item in self.by_depth[self.latent_steps][:num_items]:
            scores = [scores.get(item["item_id"], -torch.inf) for scores in probability]
            lists.plot(torch.tensor(scores).exp().tolist(), marker="o", label=_short(item))
        lists.axvline(self.latent_steps, color="tab:orange", linestyle=":")
        lists.set(title="The best items after each step", xlabel="latent steps", ylabel="probability")
        lists.set_xticks(range(len(self.by_depth)))
        lists.legend(fontsize="x-small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18))
        # 3. The latent states, each with its nearest item.
        latent.plot(*zip(*self.path, strict=True), color="lightgray", zorder=0)
        for step, (point, nearest) in enumerate(zip(self.path, self.nearest_items, strict=True)):
            latent.scatter(*point, color="tab:orange" if step == self.latent_steps else "tab:blue")
            label = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": "x-small"}
            latent.annotate(f"{step}: {_short(nearest[0])}", point, **label)
        latent.margins(x=0.45, y=0.15)  # room for the names
        latent.set(title="Latent states and their nearest items", xticks=[], yticks=[])
        return figure


def _short(item: dict[str, Any], length: int = 40) -> str:
    text = item["title"] or item["item_id"]
    return text if len(text) <= length else text[: length - 1] + "…"


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
        model.model.read_tokens(state, end, torch.ones(1, 1, 1, dtype=torch.bool, device=end.device))
    states = state.latent_states()[0].float()  # (1 + N_max, H)
    policy = state.depth_logits[0].float().softmax(dim=-1).tolist()  # (C,)
    probabilities = dict(enumerate(policy, start=config.min_latent_steps))
    chosen = max(probabilities, key=probabilities.get)
    # 2. The recommendations at every depth, as a batch.
    inputs = processor.pad([prompt] * (1 + max_steps)).to(model.device)
    own = [torch.tensor(history)] * (1 + max_steps) if config.exclude_history else None
    output = model.recommend(
        **inputs, catalog=catalog, top_k=top_k, num_beams=num_beams, latent_steps=torch.arange(1 + max_steps),
        deny=own, memory=memory,
    )
    by_depth = processor.decode_recommendations(output)
    return Explanation(
        latent_steps=chosen, depth_probabilities=probabilities, by_depth=by_depth,
        nearest_items=nearest_items(model, catalog, states, top_k), path=_principal_plane(states),
        beam_tree=_beam_tree(catalog, by_depth[chosen]),
    )


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
    titles = catalog.titles or [None] * len(catalog)
    return [
        [
            {"item_id": catalog.item_ids[item], "title": titles[item], "similarity": value}
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
    for item in recommended:
        probability = float(torch.tensor(item["score"]).exp())
        node = root
        node["probability"] += probability
        for level, code in enumerate(catalog.codes[catalog.index_of[item["item_id"]]].tolist()):
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
