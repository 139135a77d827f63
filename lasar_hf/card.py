"""Model cards: what a checkpoint is, how to use it, how it was made, and how well it ranks."""

import os
from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .files import atomic_file
from .model.modeling_lasar import LasarForGenerativeRec
from .model.processing_lasar import LasarProcessor


CARD_NAME = "README.md"
RESULTS = "## Results"
NOT_EVALUATED = "Not evaluated yet. `recipes/eval.py` and `lasar evaluate` write results into this card."
PACKAGES = ("lasar_hf", "torch", "transformers", "trl")

USAGE = """## Use

With `pip install "torch>=2.11" "transformers>={transformers}"`, from item ids to titles:

```python
from transformers import AutoModel, AutoProcessor

processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
output = model.recommend(**processor([{history}]), top_k=3)
print(processor.decode_recommendations(output)[0])
```

As a pipeline, which also takes titles and mixes in the item memory if there is one:

```python
from transformers import pipeline

recommend = pipeline("generative-recommendation", model="{name}", trust_remote_code=True)
print(recommend({history}, top_k=3))
```
"""

LIMITS = """## Limits

It recommends items of its own catalogue to users with at least one known item. Scores are log-probabilities over this
catalogue. It knows what its training data know, including their biases: popular items are recommended more often.
{license}"""

CITATION = """## Citation

```bibtex
@article{lasar2026,
  title   = {Latent Adaptive Semantic Aligned Reasoning for Generative Recommendation},
  journal = {arXiv preprint arXiv:2605.10207},
  year    = {2026}
}
```
"""


def table(rows: Mapping[str, Any], head: tuple[str, str] = ("", "")) -> str:
    """A Markdown table of two columns."""
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())]) + "\n"


def hub_name(name: str | None) -> str | None:
    """The name of a model on the Hub; `None` for a local path."""
    is_name = name is not None and name.count("/") <= 1 and not name.startswith((".", "/", "~"))
    return name if is_name and name and not os.path.exists(name) else None


def base_model_of(path: str | None) -> str | None:
    """The model on the Hub that a training began with: its name, or that on the card of a checkpoint of ours."""
    if hub_name(path) or path is None or not Path(path, CARD_NAME).exists():
        return hub_name(path)
    return ModelCard.load(Path(path, CARD_NAME)).data.base_model


def changed_arguments(args: Any) -> dict[str, Any]:
    """Arguments that differ from the defaults of their class, without names of files and of services."""
    output = {}
    for part in fields(args):
        value = getattr(args, part.name)
        default = part.default if part.default is not MISSING else None
        is_name = isinstance(value, str) and not os.path.exists(value)
        is_plain = isinstance(value, (bool, int, float, list)) or is_name
        if part.init and is_plain and value != default and not part.name.startswith(UNINTERESTING):
            output[f"`{part.name}`"] = f"`{value}`"
    return output


# Beginnings of the names of arguments that do not decide the model, or are secret.
UNINTERESTING = (
    "output_dir", "logging_", "log_", "report_to", "run_name", "save_", "eval_", "hub_", "push_to_hub", "disable_tqdm",
    "dataloader_", "ddp_", "use_cpu", "load_best", "metric_for", "greater_is", "per_device_eval", "trackio",
    "project", "do_", "local_rank", "wandb", "dataset_num_proc", "license", "dataset",
)  # fmt: skip


def model_card(
    name: str, description: str, model: LasarForGenerativeRec, processor: LasarProcessor | None, args: Any,
    tags: list[str], facts: Mapping[str, Any] | None = None,
) -> str:
    """
    Text of a model card.

    Args:
        name (`str`):
            Name on the Hub, or of the folder.
        description (`str`):
            What the training was.
        model ([`LasarForGenerativeRec`]), processor ([`LasarProcessor`], *optional*):
            The model, and its prompt format and catalogue.
        args ([`~transformers.TrainingArguments`]):
            Arguments of the training.
        tags (`list[str]`):
            Tags for the Hub.
        facts (`Mapping`, *optional*):
            `dataset` (name), `license`, `base_model`, `counts` (numbers of the data by name) and `semantic_ids` (the
            report of `semantic_ids.json`), as far as known.
    """
    facts, config = facts or {}, model.config
    license_, base = facts.get("license"), hub_name(facts.get("base_model"))
    # No pipeline of transformers recommends items, and without a tag the Hub may guess "text-generation".
    data = ModelCardData(
        library_name="transformers", pipeline_tag="other", tags=tags, license=license_, base_model=base,
        model_name=name,
    )
    kind = f"{config.backbone_config.model_type}, {model.num_parameters() / 1e6:.1f} M parameters"
    numbers = {
        "Backbone": kind + (f", from [{base}](https://huggingface.co/{base})" if base else ""),
        "Latent steps": f"{config.min_latent_steps} to {config.max_latent_steps}, by a policy head, for each user",
        "Semantic IDs": f"{config.num_sid_levels} levels of {config.codebook_size} codes",
        "Items of the history": "never recommended" if config.exclude_history else "may be recommended again",
    }  # fmt: skip
    parts = [
        f"# {name}",
        f"A recommender that reasons in hidden states before it writes the Semantic ID of an item (LASAR, "
        f"[arXiv 2605.10207](https://arxiv.org/abs/2605.10207)). {description}",
        table(numbers),
    ]
    if processor is not None:
        history = processor.catalog.item_ids[:3]
        parts += [USAGE.format(name=name, history=history, transformers=version("transformers"))]
        parts += ["## Data", table(data_facts(processor, facts)), "## Prompt", prompt_text(processor)]
    settings = changed_arguments(args)
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    parts += [
        "## Training", f"Arguments of `{type(args).__name__}` that differ from its defaults:",
        table(settings, ("argument", "value")), f"Versions: {versions}.", RESULTS, NOT_EVALUATED,
        LIMITS.format(license="" if license_ else "\nNo licence has been chosen for this model."), CITATION,
    ]  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part.strip() for part in parts) + "\n"


def data_facts(processor: LasarProcessor, facts: Mapping[str, Any]) -> dict[str, str]:
    """Rows of the card about data and Semantic IDs."""
    catalog = processor.catalog
    rows = {"Data set": facts["dataset"]} if facts.get("dataset") else {}
    rows["Items that can be recommended"] = f"{catalog.num_items:,}"
    for name, number in (facts.get("counts") or {}).items():
        if name != "items":
            rows[name.replace("_", " ").capitalize()] = f"{number:,}"
    report = facts.get("semantic_ids") or {}
    if "levels" in report:
        used = ", ".join(str(level["codes_used"]) for level in report["levels"])
        rows["Codes in use, by level"] = used
        rows["Items that share a Semantic ID"] = str(report["collisions"])
    return rows


def prompt_text(processor: LasarProcessor) -> str:
    """The section about the prompt format, with an example."""
    bos = "starts with the tokenizer's BOS token" if processor.add_bos else "has no BOS token"
    example = processor.prompt_text(range(min(2, len(processor.catalog))))
    return (
        f"A prompt {bos}, then has the instruction `{processor.instruction!r}`, the Semantic IDs of the last "
        f"{processor.max_history} items of the history, oldest first, and `<|latent_start|>`. Two items:\n\n"
        f"```\n{example}\n```"
    )


def save_card(folder: str | os.PathLike, text: str) -> None:
    """Write a card to a folder."""
    with atomic_file(Path(folder, CARD_NAME)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def renamed(text: str, name: str) -> str:
    """The text of a card with another name of the model: in its title, its usage and its `model-index`."""
    card = ModelCard(text, ignore_metadata_errors=True)
    title = card.text.strip().partition("\n")[0].removeprefix("# ")
    if card.data.eval_results:
        card.data.model_name = name
    content = card.text.replace(f"# {title}\n", f"# {name}\n", 1).replace(f'"{title}"', f'"{name}"')
    return f"---\n{card.data.to_yaml()}\n---\n{content}"


def add_results(
    folder: str | os.PathLike, text: str, metrics: Mapping[str, Mapping[str, float]], dataset: str, split: str
) -> None:
    """
    Write results into the card of a checkpoint: its section of results, and the `model-index` that the Hub reads.

    Args:
        folder (`str`):
            Folder of the checkpoint, which has a card.
        text (`str`):
            Text of the section, such as tables.
        metrics (`Mapping[str, Mapping[str, float]]`):
            Metrics by their names, of each variant of the model by its name.
        dataset, split (`str`):
            Data set and split that they belong to.
    """
    path = Path(folder, CARD_NAME)
    card = ModelCard.load(path)
    card.data.eval_results = [
        EvalResult(
            task_type="other", task_name="Sequential recommendation", dataset_type=dataset, dataset_name=dataset,
            dataset_split=split, metric_type=metric.lower(), metric_name=f"{metric} ({variant})", metric_value=value,
        )
        for variant, values in metrics.items() for metric, value in values.items()
    ]  # fmt: skip
    card.data.model_name = card.data.model_name or Path(folder).name
    before, _, rest = card.text.partition(f"\n{RESULTS}\n")
    _, separator, after = rest.partition("\n## ")
    content = f"{before}\n{RESULTS}\n\n{text.strip()}\n{separator}{after}"
    save_card(folder, f"---\n{card.data.to_yaml()}\n---\n{content}")
