"""The model card of a checkpoint: what it is, how it is used, what it was trained on, and its limits."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..files import atomic_file
from ..model.catalog_lasar import SidCatalog
from ..model.configuration_lasar import LasarConfig
from ..model.processing_lasar import LasarProcessor
from ..semantic_ids.report import format_report
from .headings import join_headings, split_headings


CARD_NAME = "README.md"
USAGE = """
```python
from transformers import AutoModel, AutoProcessor

name = {name}  # the folder of this card, or its id on the Hub
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
model = AutoModel.from_pretrained(name, trust_remote_code=True)
history = {history}  # item ids, oldest first
output = model.recommend(**processor([history]), top_k=5{steps})
for item in processor.decode_recommendations(output)[0]:
    print(f"{{item['score']:8.3f}}  {{item['item_id']!r}}  {{item['title']!r}}")
```

It needs PyTorch and transformers (saved with {versions}) and runs the code in
this repository. The score is a log-probability. {policy}The pipeline also takes titles, and uses the item memory if
there is one:

```python
from transformers import pipeline

recommend = pipeline("generative-recommendation", model=name, trust_remote_code=True)
print(recommend(history, top_k=5{steps}))
```

With the package `lasar_hf`, no code of this repository runs:

```python
from lasar_hf import Recommender

recommender = Recommender.from_pretrained(name)
print(recommender.recommend([history], top_k=5{steps}))
```
"""
# Without a trained policy the number of latent steps must be given. Stage 1 trains direct generation.
NO_POLICY = "The depth policy is not trained, so the number of latent steps is given; 0 is direct generation. "
NOT_EVALUATED = """
Not evaluated yet. `lasar_hf` writes results, baselines and intervals here:

```bash
python recipes/eval.py --data_dir DATA --output_dir REPORT --models model=FOLDER
```
"""
LIMITS = """
* It recommends items of its catalogue only, to users with at least one known item.
* Results come from logged interactions: they reward what users found under the system of their time, popular items
  above all, and say nothing about the effect of showing a recommendation.
* A latent step is not text. The depth can be inspected with `Recommender.explain`, but does not explain a decision.
"""
CITATION = """
```bibtex
@article{lasar2026,
  title   = {Latent Adaptive Semantic Aligned Reasoning for Generative Recommendation},
  journal = {arXiv preprint arXiv:2605.10207},
  year    = {2026}
}
```
"""


def hub_name(name: str | os.PathLike | None) -> str | None:
    """The name if it can be the id of a repository on the Hub, and not a folder; otherwise `None`."""
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return None
    return str(name)


def find_card(name: str | os.PathLike | None, revision: str | None = None) -> ModelCard | None:
    """The card of a folder or a model id on the Hub; `None` without one, or if the Hub cannot be reached."""
    path = None if name is None else Path(name, CARD_NAME)
    if hub_name(name):
        try:
            path = Path(hf_hub_download(name, CARD_NAME, revision=revision))
        except (OSError, HfHubHTTPError):  # a card must not end a training
            return None
    return ModelCard(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else None


def save_card(card: ModelCard, folder: str | os.PathLike) -> None:
    """Write a card as the `README.md` of a folder."""
    with atomic_file(Path(folder, CARD_NAME)) as temporary:
        card.save(temporary)


def folder_card(folder: str | os.PathLike) -> ModelCard:
    """The card of the checkpoint in a folder, made from the checkpoint if it has none."""
    card = find_card(folder)
    if card is None:
        processor = LasarProcessor.from_pretrained(folder)
        name = os.path.basename(os.path.abspath(folder))
        card = model_card(name, LasarConfig.from_pretrained(folder), processor.catalog, processor)
    return card


def add_section(card: ModelCard, heading: str, text: str) -> None:
    """Put a section into a card, in the place of the one with the same heading or before the training."""
    parts = split_headings(card.text)
    if heading in parts:
        parts[heading] = text.strip()
    else:
        names = list(parts)
        place = names.index("Training") if "Training" in names else len(names)
        names.insert(place, heading)
        parts = {name: parts.get(name, text.strip()) for name in names}
    card.text = join_headings(parts)


def model_card(
    name: str,
    config: LasarConfig,
    catalog: SidCatalog | None,
    processor: LasarProcessor | None = None,
    data_card: Mapping[str, Any] | None = None,
    dataset: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = ("lasar",),
    training: Mapping[str, str] | None = None,
    start: ModelCard | None = None,
) -> ModelCard:
    """
    Make the card of a checkpoint. What is not known is said to be unknown; nothing is guessed.

    Args:
        name (`str`):
            Id on the Hub, or name of the folder without the path.
        config ([`LasarConfig`]), catalog ([`SidCatalog`], *optional*), processor ([`LasarProcessor`], *optional*):
            Parts of the checkpoint. Without a processor there is no usage and no prompt.
        data_card (`Mapping`), dataset (`str`, *optional*):
            Content of the `data_card.json` of the prepared data, and a name that replaces that of its files.
        license, base_model (`str`), datasets, tags (`list[str]`, *optional*):
            As on the Hub: licence, id of the model that the training began with, ids of data sets, tags.
        training (`Mapping[str, str]`, *optional*):
            Text of each stage of the training by its title, see [`training_text`].
        start ([`~huggingface_hub.ModelCard`], *optional*):
            Card of the starting checkpoint: its licence, base model, data and stages, where they are not given.

    Example:

    ```python
    >>> from lasar_hf import LasarConfig, LasarProcessor
    >>> from lasar_hf.card import model_card, save_card

    >>> folder = "outputs/quickstart/model"
    >>> processor = LasarProcessor.from_pretrained(folder)
    >>> card = model_card("shop", LasarConfig.from_pretrained(folder), processor.catalog, processor, license="mit")
    >>> save_card(card, folder)
    ```
    """
    before = {} if start is None else split_headings(start.text)
    stages = {title: text for title, text in split_headings(before.get("Training", ""), 3).items() if title}
    stages |= training or {}
    if start is not None:
        license, base_model = license or start.data.license, base_model or start.data.base_model
        datasets = datasets or start.data.datasets or ()
    if data_card is not None:
        before |= {"Data": data_text(data_card, dataset), "Semantic IDs": semantic_id_text(config, catalog, data_card)}
        datasets = datasets or hub_datasets(data_card)
    # Each stage names the terms of its loss.
    has_policy = not stages or any("depth policy" in text for text in stages.values())
    parts = {
        "": f"# {name}\n\n{essentials(config, catalog, license, base_model, list(stages), has_policy)}",
        "Usage": usage_text(name, processor, has_policy), "Results": NOT_EVALUATED,
        "Training": join_headings(stages, 3) if stages else "Not recorded.",
        "Data": before.get("Data") or f"{dataset or 'Not recorded'}.",
        "Semantic IDs": before.get("Semantic IDs") or semantic_id_text(config, catalog, {}),
        "Prompt": prompt_text(processor), "Limits": LIMITS, "Citation": CITATION,
    }  # fmt: skip
    # No pipeline of transformers recommends items, and without a tag the Hub may guess "text-generation".
    header = ModelCardData(
        library_name="transformers",
        tags=sorted(set(tags)),
        pipeline_tag="other",
        license=license,
        base_model=base_model,
        datasets=list(datasets) or None,
    )
    return ModelCard(f"---\n{header.to_yaml()}\n---\n\n{join_headings({k: v.strip() for k, v in parts.items()})}")


def essentials(
    config: LasarConfig,
    catalog: SidCatalog | None,
    license: str | None,
    base_model: str | None,
    stages: list[str],
    has_policy: bool,
) -> str:
    """One sentence and a table of what matters most."""
    backbone = config.backbone_config
    size = f"{backbone.model_type}, {backbone.num_hidden_layers} layers, width {backbone.hidden_size}"
    excluded = "are never recommended" if config.exclude_history else "may be recommended again"
    chosen = "chosen for each user" if has_policy else "whose number must be given"
    rows = {
        "Backbone": f"{base_model or 'without a base model on the Hub'} ({size})",
        "Items": f"{len(catalog):,}" if catalog is not None else "not known",
        "Semantic ID": f"{config.num_sid_levels} levels of {config.codebook_size} codes",
        "Latent steps": f"{config.min_latent_steps} to {config.max_latent_steps}, {chosen}",
        "History": f"items of the user's history {excluded}",
        "Training": ", then ".join(stages) or "not recorded",
        "Licence": license or "none stated; ask the authors, and mind those of the base model and the data",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        "Reads the history of a user, takes latent reasoning steps in its hidden states, and writes the Semantic ID "
        f"of the item to recommend ([LASAR](https://arxiv.org/abs/2605.10207)).\n\n| | |\n|---|---|\n{table}"
    )


def usage_text(name: str, processor: LasarProcessor | None, has_policy: bool) -> str:
    """Code that runs when pasted, with the first items of the catalogue as the history."""
    if processor is None:
        return "This checkpoint has no prompt format. Save it with a `LasarProcessor`."
    is_removed, item_ids = processor.catalog.removed.tolist(), processor.catalog.item_ids
    known = [item for item, removed in zip(item_ids, is_removed, strict=True) if not removed]
    versions = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    history = json.dumps(known[:3], ensure_ascii=False)
    steps, policy = ("", "") if has_policy else (", latent_steps=0", NO_POLICY)
    return USAGE.format(name=json.dumps(name), history=history, versions=versions, steps=steps, policy=policy)


def prompt_text(processor: LasarProcessor | None) -> str:
    """The prompt format, with an example."""
    if processor is None:
        return "Not recorded."
    instruction = f"the instruction {processor.instruction!r}" if processor.instruction else "no instruction"
    return (
        f"{'A BOS token' if processor.add_bos else 'No BOS token'}, {instruction}, the Semantic IDs of the newest "
        f"{processor.max_history} items, oldest first, and `<|latent_start|>`:\n\n"
        f"```\n{processor.prompt_text([0, min(1, len(processor.catalog) - 1)])}\n```"
    )


def semantic_id_text(config: LasarConfig, catalog: SidCatalog | None, data_card: Mapping[str, Any]) -> str:
    """The quality of the Semantic IDs as `prepare.py` measured it, or the codes in use."""
    levels = f"{config.num_sid_levels} levels of {config.codebook_size} codes."
    if "semantic_ids" in data_card:
        return f"{levels} {format_report(data_card['semantic_ids'])}"
    if catalog is None:
        return levels
    used = ", ".join(str(len(catalog.codes[:, level].unique())) for level in range(config.num_sid_levels))
    collisions = len(catalog) - len(catalog.codes.unique(dim=0))
    return f"{levels} {len(catalog):,} items, {collisions:,} collisions. Codes in use on each level: {used}."


def data_name(data_card: Mapping[str, Any]) -> str:
    """Name of the data set: the reader, and the category or the names of the files without their folders."""
    arguments = data_card["arguments"]
    source, options = Path(arguments["source"]).name, arguments.get("source_args") or {}
    files = options.get("category") or options.get("interactions") or []
    names = [Path(file).name for file in ([files] if isinstance(files, str) else files)]
    return f"{source} ({', '.join(names)})" if names else source


def hub_datasets(data_card: Mapping[str, Any]) -> list[str]:
    """Hub ids of the data set, if it is one that the readers know."""
    return ["McAuley-Lab/Amazon-Reviews-2023"] if data_card["arguments"]["source"] == "amazon2023" else []


def data_text(data_card: Mapping[str, Any], dataset: str | None = None) -> str:
    """Counts, split and repeats of the data, and who wrote the chains of thought."""
    counts, data = data_card["counts"], data_card.get("data", {})
    split, lengths = data.get("split", {}), data.get("history_length")
    lines = [
        f"{dataset or data_name(data_card)}: {counts['users']:,} users, {counts['items']:,} items, "
        f"{counts['interactions']:,} interactions. Split: {split.get('kind', 'not recorded')}; "
        f"{counts['train_samples']:,} training, "
        f"{counts['validation_samples']:,} validation and {counts['test_samples']:,} test samples."
    ]
    if lengths:
        lines.append(f"A user has {lengths['min']} to {lengths['max']} interactions, median {lengths['median']:g}.")
    if "repeat_rate" in data:
        lines.append(f"{data['repeat_rate']:.2%} of the training interactions repeat an item of the user.")
    if teacher := data_card.get("chains", {}).get("teacher"):
        model = hub_name(data_card["arguments"].get("teacher_model"))
        lines.append(f"Chains of thought by the teacher `{teacher}`" + (f", `{model}`." if model else "."))
    return "\n".join(lines)
