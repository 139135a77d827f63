"""
Training examples: samples as token ids with labels, for each stage of training and for the alignment tasks.

Stage 1:  prompt <|latent_start|><|latent_end|> SID                    [`sft_examples`], [`history_examples`]
          segment SID                                                  [`chain_end_examples`]
Explicit: prompt text <|latent_start|><|latent_end|> SID               [`explicit_examples`]
Stage 2:  prompt <|latent_start|><|latent|>…<|latent|><|latent_end|> SID       [`reasoning_examples`]
GRPO:     prompt <|latent_start|>                                      [`grpo_examples`]

Examples of prepared data are cached in the cache folder of `datasets` (`HF_DATASETS_CACHE`), so the data may be on a
read-only disk. The cache can be deleted at any time.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value, concatenate_datasets, config
from datasets.fingerprint import Hasher
from torch import distributed

from ..files import folder_hashes
from ..model.processing_lasar import LasarProcessor
from ..processes import on_main_process
from .interactions import Interactions
from .prepared_data import PreparedData
from .splits import Split, samples


IGNORE_INDEX = -100  # label of tokens without loss
INSTRUCTIONS = {
    "title_to_sid": "Which item has this title? ",
    "description_to_sid": "Which item fits this description? ",
    "sid_to_title": "What is the title of this item? ",
    "titles_to_sid": "Recommend the next item after these titles. ",
}
ALIGNMENT_TASKS = tuple(INSTRUCTIONS)
MAX_TEXT_TOKENS = 64  # of a title or description
MAX_CHAIN_TOKENS = 256  # of a chain of thought that is written before the item
MAX_TITLES = 8  # newest titles of a title history, since a title is far longer than a Semantic ID
FEATURES = Features({"input_ids": List(Value("int64")), "labels": List(Value("int64"))})


def sft_examples(samples: Dataset, processor: LasarProcessor) -> Dataset:
    """
    Examples of stage 1: prompt, empty latent region, Semantic ID of the target. The loss is on the Semantic ID.

    Args:
        samples (`Dataset`):
            From [`samples`], at least one: columns `history` and `target`.
        processor ([`LasarProcessor`]):
            Prompt format and token ids.

    Returns:
        `Dataset`: `input_ids` and `labels` (-100 except for the `M` tokens of the Semantic ID); one example per
        sample, in order.
    """

    def build(batch: dict[str, list]) -> dict[str, list]:
        prompts = [[*processor.prompt_ids(history), processor.latent_end_token_id] for history in batch["history"]]
        return _labelled(prompts, processor.answer_ids(batch["target"]))

    return _map(samples, build, FEATURES)


def history_examples(split: Split, processor: LasarProcessor) -> Dataset:
    """
    Examples with the loss on every item of a user's training sequence, for backbones that are trained from scratch:
    one pass has several times the signal of a pass over [`sft_examples`].

    Args:
        split (`Split`):
            Only its training part is read. Users with a single training item are left out.
        processor:
            As for [`sft_examples`].

    Returns:
        `Dataset`: the examples of [`sft_examples`] for each user's last training item, with `labels` on all tokens
        except the instruction and the control tokens.
    """
    start = len(processor.prefix_ids)
    end = -2 - processor.sid_token_ids.shape[1]  # two control tokens and the answer follow the history

    def label_history(batch: dict[str, list]) -> dict[str, list]:
        for input_ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            labels[start:end] = input_ids[start:end]
        return batch

    return sft_examples(samples(split, "train", targets="last"), processor).map(label_history, batched=True)


def chain_end_examples(samples: Dataset, processor: LasarProcessor) -> Dataset:
    """
    Examples that teach stage 1 what a segment says: the last segment of a chain of thought, alone as for anchors, then
    the Semantic ID of the target. So the hidden state at its end, the anchor, knows the item. The loss is on the
    Semantic ID.

    Args:
        samples (`Dataset`):
            Training samples: columns `segments` and `target`.
        processor ([`LasarProcessor`]):
            Token ids.

    Returns:
        `Dataset`: `input_ids` and `labels`; one example per sample, in order.
    """
    bos_ids = [processor.tokenizer.bos_token_id] if processor.add_bos else []

    def build(batch: dict[str, list]) -> dict[str, list]:
        texts = processor.text_ids([segments[-1] for segments in batch["segments"]])
        return _labelled([bos_ids + text for text in texts], processor.answer_ids(batch["target"]))

    return _map(samples, build, FEATURES)


def explicit_examples(samples: Dataset, processor: LasarProcessor, max_text_tokens: int = MAX_CHAIN_TOKENS) -> Dataset:
    """
    Examples of explicit reasoning, the baseline of latent reasoning: the history, the text of the segments, then the
    Semantic ID after an empty latent region. The loss is on the text, the `<|latent_start|>` that ends it, and the
    Semantic ID.

    Args:
        samples (`Dataset`):
            Training samples: columns `history`, `segments` and `target`.
        processor ([`LasarProcessor`]):
            Prompt format and token ids.
        max_text_tokens (`int`, *optional*, defaults to 256):
            A longer text is cut after this many tokens.

    Returns:
        `Dataset`: `input_ids` and `labels`; one example per sample, in order.
    """

    def build(batch: dict[str, list]) -> dict[str, list]:
        prompts = [processor.prompt_ids(history) for history in batch["history"]]
        texts = processor.text_ids([" ".join(segments) for segments in batch["segments"]])
        reasoning = [[*text[:max_text_tokens], prompt[-1]] for text, prompt in zip(texts, prompts, strict=True)]
        answers = processor.answer_ids(batch["target"])
        ends = [[processor.latent_end_token_id]] * len(answers)
        parts = _labelled([prompt[:-1] for prompt in prompts], reasoning), _labelled(ends, answers)
        return {name: [a + b for a, b in zip(*(part[name] for part in parts), strict=True)] for name in FEATURES}

    return _map(samples, build, FEATURES)


def alignment_examples(
    interactions: Interactions,
    split: Split,
    processor: LasarProcessor,
    tasks: Sequence[str] = ALIGNMENT_TASKS,
    seed: int = 0,
) -> Dataset:
    """
    Examples that connect Semantic IDs with text, mixed into stage 1 (the alignment tasks of LC-Rec and MiniOneRec).

    Args:
        interactions (`Interactions`):
            Text of the items.
        split (`Split`):
            Only its training part is read, for the title histories.
        processor ([`LasarProcessor`]):
            Token ids. Item text never produces Semantic-ID or control tokens.
        tasks (`Sequence[str]`, *optional*, defaults to all four):
            `"title_to_sid"` and `"description_to_sid"` (one example per item: text, empty latent region, Semantic ID;
            loss on the Semantic ID), `"sid_to_title"` (one per item: Semantic ID, title, end of text; loss on title
            and end), `"titles_to_sid"` (one per user: titles of the training sequence, Semantic ID of its last item).
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order.

    Returns:
        `Dataset`: `input_ids` and `labels`, shuffled. Items without the text have no example, so it may be empty.
    """
    region = [processor.latent_start_token_id, processor.latent_end_token_id]
    bos_ids = [processor.tokenizer.bos_token_id] if processor.add_bos else []
    prompts: list[list[int]] = []
    answers: list[list[int]] = []
    for task in tasks:
        if task not in INSTRUCTIONS:
            raise ValueError(f"tasks contains {task!r}; expected some of {', '.join(ALIGNMENT_TASKS)}.")
        field = "description" if task == "description_to_sid" else "title"
        indices = [index for index, item in enumerate(interactions.items) if item.get(field)]
        token_ids = processor.text_ids([interactions.items[index][field] for index in indices])
        texts = {index: ids[:MAX_TEXT_TOKENS] for index, ids in zip(indices, token_ids, strict=True)}
        prefix = bos_ids + processor.tokenizer(INSTRUCTIONS[task], add_special_tokens=False).input_ids
        if task == "titles_to_sid":
            histories, targets = _title_histories(split, texts, processor.text_ids(["; "])[0])
            prompts += [prefix + history + region for history in histories]
            answers += processor.answer_ids(targets)
        elif task == "sid_to_title":
            end = processor.tokenizer.eos_token_id
            if end is None:
                raise ValueError(f"Task {task!r} needs an end-of-text token; set tokenizer.eos_token.")
            prompts += [prefix + sid for sid in processor.answer_ids(list(texts))]
            answers += [[*text, end] for text in texts.values()]
        else:
            prompts += [prefix + text + region for text in texts.values()]
            answers += processor.answer_ids(list(texts))
    return Dataset.from_dict(_labelled(prompts, answers), features=FEATURES).shuffle(seed)


def reasoning_examples(samples: Dataset, processor: LasarProcessor, depths: Sequence[int] | np.ndarray) -> Dataset:
    """
    Examples of stage 2: prompt, `N` latent tokens, Semantic ID of the target. The loss is on the Semantic ID.

    Args:
        samples, processor:
            As for [`sft_examples`].
        depths (`Sequence[int]`):
            Number of latent steps `N >= 0` of each sample, such as `AnchorStore.depths`.

    Returns:
        `Dataset`: `input_ids`, `labels`, `depth` (`int`) and `sample_index` (`int`, position in `samples`).
    """
    steps = np.asarray(depths, dtype=np.int64)
    if len(steps) != len(samples):
        raise ValueError(f"depths has {len(steps)} entries; expected {len(samples)}, one per sample.")
    if len(steps) and steps.min() < 0:
        raise ValueError(f"depths[{steps.argmin()}] is {steps.min()}; expected at least 0.")
    features = Features(FEATURES | {"depth": Value("int64"), "sample_index": Value("int64")})

    def build(batch: dict[str, list], indices: list[int]) -> dict[str, Any]:
        prompts = [
            [*processor.prompt_ids(history), *[processor.latent_token_id] * depth, processor.latent_end_token_id]
            for history, depth in zip(batch["history"], steps[indices].tolist(), strict=True)
        ]
        examples = _labelled(prompts, processor.answer_ids(batch["target"]))
        return examples | {"depth": steps[indices], "sample_index": indices}

    return _map(samples, build, features, with_indices=True)


def grpo_examples(samples: Dataset, processor: LasarProcessor, terminal_anchors: np.ndarray | None = None) -> Dataset:
    """
    Examples of the GRPO stage.

    Args:
        samples, processor:
            As for [`sft_examples`].
        terminal_anchors (`np.ndarray` of shape `(S, H)`, *optional*):
            Last anchor of each of the `S` samples, for the terminal alignment: `AnchorStore.terminal()`.

    Returns:
        `Dataset`: `prompt` (`str`, ends in `<|latent_start|>`), `target` (`int`, item index) and, with anchors,
        `terminal_anchor` (`H` floats).
    """
    features = Features(prompt=Value("string"), target=Value("int64"))
    if terminal_anchors is not None:
        if len(terminal_anchors) != len(samples):
            raise ValueError(f"terminal_anchors has {len(terminal_anchors)} rows for {len(samples)} samples.")
        features["terminal_anchor"] = List(Value("float32"))

    def build(batch: dict[str, list], indices: list[int]) -> dict[str, Any]:
        examples = {"prompt": list(map(processor.prompt_text, batch["history"])), "target": batch["target"]}
        if terminal_anchors is not None:
            examples["terminal_anchor"] = list(terminal_anchors[indices])
        return examples

    return _map(samples, build, features, with_indices=True)


def mix_examples(tables: Mapping[str, Dataset], weights: Mapping[str, float] | None = None, seed: int = 0) -> Dataset:
    """
    Mix tables of examples by weights.

    Args:
        tables (`Mapping[str, Dataset]`):
            Examples by name. Columns that not all tables have are left out.
        weights (`Mapping[str, float]`, *optional*):
            Number of times that each example of a table occurs in the mix, 1 by default: `2` is twice, `0.25` a random
            quarter of the examples, `1.5` all and a random half of them again, `0` none.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        `Dataset`: the tables one after another; trainers shuffle them.
    """
    weights = dict.fromkeys(tables, 1.0) | dict(weights or {})
    parts = []
    for number, (name, weight) in enumerate(weights.items()):
        if name not in tables:
            raise ValueError(f"weights contains {name!r}; expected some of {', '.join(tables)}.")
        if not 0 <= weight < np.inf:
            raise ValueError(f"weights has {weight} for {name!r}; expected a finite number of at least 0.")
        table, (repeats, share) = tables[name], divmod(weight, 1)
        drawn = np.random.default_rng([seed, number]).permutation(len(table))[: round(share * len(table))]
        parts += [table] * int(repeats) + [table.select(np.sort(drawn))]
    if not sum(map(len, parts)):
        raise ValueError("The mix has no examples; give a table that is not empty a weight above 0.")
    common = [name for name in parts[0].column_names if all(name in part.column_names for part in parts)]
    return concatenate_datasets([part.select_columns(common) for part in parts])


def stage1_examples(
    data: PreparedData,
    processor: LasarProcessor,
    tasks: Sequence[str],
    neighbours: np.ndarray | None = None,
    depths: Sequence[int] | np.ndarray = (),
) -> Dataset:
    """
    Examples of stage 1, mixed from several tasks.

    Args:
        data ([`PreparedData`]), processor ([`LasarProcessor`]):
            Prepared data set, and its processor.
        tasks (`Sequence[str]`):
            Each `name` or `name=weight` ([`mix_examples`]), all distinct: `next_item` ([`sft_examples`]), `history`
            ([`history_examples`]), `chain_end` ([`chain_end_examples`]), `explicit` ([`explicit_examples`]),
            `reasoning` ([`reasoning_examples`]: stage 2 without anchors at once), `alignment` ([`alignment_examples`])
            or single tasks of `ALIGNMENT_TASKS`.
        neighbours (`np.ndarray` of shape `(S, R)`, *optional*):
            As for [`with_neighbours`], of the examples of `next_item` and `reasoning`.
        depths (`Sequence[int]` of length `S`, *optional*):
            Latent steps of the examples of `reasoning`.

    Returns:
        `Dataset`: `input_ids`, `labels`, `depth` (`int`, latent steps as a label of the depth policy; -1 for none, in
        all tasks but `reasoning`) and, if they are given, `neighbours`.

    Example:

    ```python
    >>> examples = stage1_examples(data, processor, ["history", "next_item", "alignment=0.5"])
    ```
    """
    align = partial(alignment_examples, data.interactions, data.split, processor)
    makers: dict[str, Callable[[], Dataset]] = {
        "next_item": lambda: sft_examples(data.samples["train"], processor),
        "history": lambda: history_examples(data.split, processor),
        "chain_end": lambda: chain_end_examples(data.samples["train"], processor),
        "explicit": lambda: explicit_examples(data.samples["train"], processor),
        "reasoning": lambda: reasoning_examples(data.samples["train"], processor, depths),
        "alignment": align,
        **{task: partial(align, [task]) for task in ALIGNMENT_TASKS},
    }
    weights: dict[str, float] = {}
    for entry in tasks:
        name, has_weight, weight = entry.partition("=")
        if name not in makers or name in weights:
            raise ValueError(f"tasks contains {entry!r}; expected each of {', '.join(makers)} at most once.")
        try:
            weights[name] = float(weight) if has_weight else 1.0
        except ValueError:
            raise ValueError(f"tasks contains {entry!r}; expected name or name=number.") from None
    tables = {name: makers[name]() for name in weights}
    for name, table in tables.items():
        if name != "reasoning":  # an answer without latent steps does not say that none are needed
            tables[name] = table.add_column("depth", [-1] * len(table))
    if neighbours is not None:
        replaced = {"next_item", "reasoning"} & set(tables)
        if not replaced:
            raise ValueError(f"tasks is {list(tasks)}; expected next_item, whose targets the neighbours replace.")
        for name, table in tables.items():
            rows = neighbours if name in replaced else np.empty((len(table), 0), dtype=np.int64)
            tables[name] = with_neighbours(table, rows)
    return mix_examples(tables, weights)


def with_neighbours(examples: Dataset, neighbours: np.ndarray) -> Dataset:
    """
    Examples with a column `neighbours`, items that may replace the target, see `neighbour_targets` of
    [`LasarSFTConfig`].

    Args:
        examples (`Dataset`):
            One example per training sample.
        neighbours (`np.ndarray` of shape `(S, R)`):
            Item indices, -1 for none, as of [`~lasar_hf.evaluation.neighbour_draws`].
    """
    if len(neighbours) != len(examples):
        raise ValueError(
            f"neighbours has {len(neighbours)} rows; expected {len(examples)}, one per example. They belong to all "
            "items of a user but the first, so prepare the data with targets: all."
        )
    rows = [row[row >= 0] for row in neighbours]
    return examples.add_column("neighbours", rows, feature=List(Value("int64")))


def _map(samples: Dataset, build: Callable, features: Features, with_indices: bool = False) -> Dataset:
    if not len(samples):
        raise ValueError("There are no samples to make examples of.")
    options = {"batched": True, "with_indices": with_indices, "remove_columns": samples.column_names}
    if not samples.cache_files:  # in memory
        return samples.map(build, features=features, **options)
    fingerprint = Hasher.hash([samples._fingerprint, build, features, with_indices, _code_hash()])
    path = Path(config.HF_DATASETS_CACHE, "lasar_hf", f"{fingerprint}.arrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    options |= {"features": features, "cache_file_name": str(path), "new_fingerprint": fingerprint}

    def mapped() -> Dataset:
        try:
            return samples.map(build, **options)
        except (pa.ArrowInvalid, OSError):  # the file was cut, such as by a power failure
            return samples.map(build, load_from_cache_file=False, **options)

    if distributed.is_available() and distributed.is_initialized():
        on_main_process(lambda: len(mapped()))  # the others open its file
    return mapped()


@cache
def _code_hash() -> str:
    """Hash of the package, so that examples of other code are not taken from the cache."""
    return Hasher.hash(folder_hashes(Path(__file__).parents[1], "**/*.py"))


def _labelled(prompts: list[list[int]], answers: list[list[int]]) -> dict[str, list]:
    """Examples with the loss on the answer."""
    pairs = list(zip(prompts, answers, strict=True))
    return {
        "input_ids": [prompt + answer for prompt, answer in pairs],
        "labels": [[IGNORE_INDEX] * len(prompt) + answer for prompt, answer in pairs],
    }


def _title_histories(
    split: Split, titles: dict[int, list[int]], separator: list[int]
) -> tuple[list[list[int]], list[int]]:
    """The titles before each user's last training item, separated, and this item."""
    prompts, targets = [], []
    for sequence in split.train:
        shown = [titles[item] for item in sequence[:-1][-MAX_TITLES:] if item in titles]
        if shown:
            prompts.append([token for title in shown for token in [*title, *separator]][: -len(separator)])
            targets.append(sequence[-1])
    return prompts, targets
