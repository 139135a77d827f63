"""Training rows: samples in token ids with labels, for each stage of training and for the alignment tasks."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets

from ..model.processing_lasar import LasarProcessor
from .interactions import Interactions
from .prepared_data import PreparedData
from .splits import Split, samples


IGNORE = -100  # label of a token that no loss is computed on
ALIGNMENT_TASKS = ("title_to_sid", "description_to_sid", "sid_to_title", "titles_to_sid")
INSTRUCTIONS = {
    "title_to_sid": "Which item has this title? ",
    "description_to_sid": "Which item fits this description? ",
    "sid_to_title": "What is the title of this item? ",
    "titles_to_sid": "Recommend the next item after these titles. ",
}
_TITLES_SHOWN = 8  # newest titles of a title history: a title is far longer than a SID
_ROW = Features({"input_ids": List(Value("int64")), "labels": List(Value("int64")), "task": Value("string")})


def sft_examples(samples: Dataset, processor: LasarProcessor) -> Dataset:
    """
    Rows of stage 1: prompt, an empty latent region, the target's SID. The loss is on the SID.

    Args:
        samples (`Dataset`):
            From `samples`: columns `history` and `target`.
        processor (`LasarProcessor`):
            Token ids of histories and items.

    Returns:
        `Dataset`: `input_ids` (prompt, `<|latent_end|>`, `M` SID tokens), `labels` (-100 but for the SID), `task`
        (`"next_item"`); one row a sample, in order.
    """

    def build(batch: dict[str, list]) -> dict[str, list]:
        prompts = [[*processor.prompt_ids(history), processor.latent_end_token_id] for history in batch["history"]]
        return _labelled(prompts, processor.answer_ids(batch["target"]), "next_item")

    return _map(samples, build, _ROW)


def history_examples(split: Split, processor: LasarProcessor) -> Dataset:
    """
    One row a user, with the loss on every item: each item of the training sequence is the next one of its prefix.

    For backbones trained from scratch: several times the signal of a pass over `sft_examples`. Only the training
    part of the split is read; users with a single training item are left out.

    Returns:
        `Dataset`: `input_ids` (prompt of the training sequence but for its last item, `<|latent_end|>`, the last
        item's SID), `labels` (every SID token; -100 on the instruction and the control tokens), `task` (`"history"`).
    """
    start = len(processor.prefix_ids)

    def build(batch: dict[str, list]) -> dict[str, list]:
        rows = _labelled(
            [[*processor.prompt_ids(history), processor.latent_end_token_id] for history in batch["history"]],
            processor.answer_ids(batch["target"]),
            "history",
        )
        end = -2 - processor.sid_token_ids.shape[1]  # behind the history: two control tokens and the answer
        for input_ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
            labels[start:end] = input_ids[start:end]
        return rows

    return _map(samples(split, "train", targets="last"), build, _ROW)


def alignment_examples(
    interactions: Interactions,
    split: Split,
    processor: LasarProcessor,
    tasks: Sequence[str] = ALIGNMENT_TASKS,
    max_text_tokens: int = 64,
    seed: int = 0,
) -> Dataset:
    """
    Rows that tie SIDs to text, mixed into stage 1 (the alignment tasks of LC-Rec and MiniOneRec).

    Args:
        interactions (`Interactions`):
            The items' text.
        split (`Split`):
            Its training part gives the title histories; no validation or test item is read.
        processor (`LasarProcessor`):
            Token ids. Item text can not produce SID or control tokens.
        tasks (`Sequence[str]`, *optional*, defaults to all four):
            `"title_to_sid"` and `"description_to_sid"` (one row an item: text, empty latent region, SID; loss on the
            SID), `"sid_to_title"` (one row an item: SID, title, end of text; loss on title and end), `"titles_to_sid"`
            (one row a user: titles of the training sequence, its last item's SID).
        max_text_tokens (`int`, *optional*, defaults to `64`):
            Tokens kept of each title or description.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order of the rows.

    Returns:
        `Dataset`: `input_ids`, `labels`, `task`; shuffled. Items without the text are left out, so it is empty when
        there is none.

    Raises:
        ValueError: an unknown task, or a tokenizer without end-of-text token.
    """
    parts = []
    for task in tasks:
        if task not in INSTRUCTIONS:
            raise ValueError(f"`tasks` holds {task!r}, expected some of {', '.join(ALIGNMENT_TASKS)}.")
        field = "description" if task == "description_to_sid" else "title"
        texts = _item_texts(interactions, field, processor, max_text_tokens)
        instruction = processor.tokenizer(INSTRUCTIONS[task], add_special_tokens=False).input_ids
        if task == "titles_to_sid":
            parts.append(_title_histories(split, processor, instruction, texts))
        else:
            rows = _sid_to_text if task == "sid_to_title" else _text_to_sid
            parts.append(Dataset.from_dict(rows(processor, instruction, texts, task), features=_ROW))
    return concatenate_datasets([Dataset.from_dict({name: [] for name in _ROW}, features=_ROW), *parts]).shuffle(seed)


def reasoning_examples(
    samples: Dataset, processor: LasarProcessor, depths: Sequence[int]
) -> Dataset:
    """
    Rows of stage 2: prompt, `N` latent slots, `<|latent_end|>`, the target's SID. The loss is on the SID.

    Args:
        samples (`Dataset`):
            From `samples`.
        processor (`LasarProcessor`):
            Token ids.
        depths (`Sequence[int]`):
            Latent steps `N >= 1` of each sample, in the order of `samples`.
    Returns:
        `Dataset`: `input_ids`, `labels`, `depth` (`int`) and `sample` (`int`, row of `samples`).

    Raises:
        ValueError: another number of depths than of samples, or a depth below 1.
    """
    depths = np.asarray(depths, dtype=np.int64)
    if len(depths) != len(samples):
        raise ValueError(f"`depths` has {len(depths)} entries for {len(samples)} samples.")
    if len(depths) and depths.min() < 1:
        raise ValueError(f"the depth of sample {depths.argmin()} is {depths.min()}, expected at least 1.")
    features = Features(
        {name: _ROW[name] for name in ("input_ids", "labels")} | {"depth": Value("int64"), "sample": Value("int64")}
    )

    def build(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        steps = depths[indices].tolist()
        prompts = [
            [*processor.prompt_ids(history), *[processor.latent_token_id] * depth, processor.latent_end_token_id]
            for history, depth in zip(batch["history"], steps, strict=True)
        ]
        rows = _labelled(prompts, processor.answer_ids(batch["target"]), "")
        del rows["task"]
        return rows | {"depth": steps, "sample": indices}

    return _map(samples, build, features, with_indices=True)


def grpo_examples(samples: Dataset, processor: LasarProcessor, anchors=None) -> Dataset:
    """
    Rows of the RL stage.

    Args:
        samples (`Dataset`):
            From `samples`.
        processor (`LasarProcessor`):
            Writes the prompts.
        anchors (`AnchorStore`, *optional*):
            Anchors of the samples, for the terminal alignment.

    Returns:
        `Dataset`: `prompt` (`str`, ends in `<|latent_start|>`), `target` (`int`, item row) and, with anchors,
        `terminal_anchor` (`H` floats: the anchor of the sample's last segment).
    """
    features = Features({"prompt": Value("string"), "target": Value("int64")})
    if anchors is not None:
        _same_length(anchors, samples)
        if "segments" in samples.column_names:
            _same_depths(anchors, np.array([len(segments) for segments in samples["segments"]]))
        features["terminal_anchor"] = List(Value("float32"))

    def build(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows = {"prompt": [processor.prompt_text(history) for history in batch["history"]], "target": batch["target"]}
        if anchors is not None:
            rows["terminal_anchor"] = [anchors[index][-1] for index in indices]
        return rows

    return _map(samples, build, features, with_indices=True)


def _map(samples: Dataset, build: Callable, features: Features, with_indices: bool = False) -> Dataset:
    if not len(samples):
        raise ValueError("there are no samples to make rows of.")
    return samples.map(
        build, batched=True, with_indices=with_indices, remove_columns=samples.column_names, features=features
    )


def _labelled(prompts: list[list[int]], answers: list[list[int]], task: str) -> dict[str, list]:
    """Rows with the loss on the answer alone."""
    pairs = list(zip(prompts, answers, strict=True))
    return {
        "input_ids": [prompt + answer for prompt, answer in pairs],
        "labels": [[IGNORE] * len(prompt) + answer for prompt, answer in pairs],
        "task": [task] * len(pairs),
    }


def _item_texts(
    interactions: Interactions, field: str, processor: LasarProcessor, max_text_tokens: int
) -> dict[int, list[int]]:
    """Token ids of a text field for each item row that has it; one call of the tokenizer."""
    rows = [row for row, item in enumerate(interactions.items) if item.get(field)]
    ids = processor.text_ids([interactions.items[row][field] for row in rows])
    return {row: text[:max_text_tokens] for row, text in zip(rows, ids, strict=True)}


def _text_to_sid(processor: LasarProcessor, instruction: list[int], texts: dict[int, list[int]], task: str) -> dict:
    region = [processor.latent_start_token_id, processor.latent_end_token_id]
    return _labelled([instruction + text + region for text in texts.values()], processor.answer_ids(list(texts)), task)


def _sid_to_text(processor: LasarProcessor, instruction: list[int], texts: dict[int, list[int]], task: str) -> dict:
    end = processor.tokenizer.eos_token_id
    if end is None:
        raise ValueError(f"task {task!r} needs a tokenizer with an end-of-text token: set `tokenizer.eos_token`.")
    prompts = [instruction + sid for sid in processor.answer_ids(list(texts))]
    return _labelled(prompts, [[*text, end] for text in texts.values()], task)


def _title_histories(
    split: Split, processor: LasarProcessor, instruction: list[int], texts: dict[int, list[int]]
) -> Dataset:
    separator = processor.text_ids(["; "])[0]
    region = [processor.latent_start_token_id, processor.latent_end_token_id]
    rows: dict[str, list] = {name: [] for name in _ROW}
    for sequence in split.train:
        titles = [texts[item] for item in sequence[:-1][-_TITLES_SHOWN:] if item in texts]
        if titles:
            shown = [token for title in titles for token in [*title, *separator]][: -len(separator)]
            row = _labelled([instruction + shown + region], [processor.answer_ids([sequence[-1]])[0]], "titles_to_sid")
            for name, values in row.items():
                rows[name] += values
    return Dataset.from_dict(rows, features=_ROW)


def _same_depths(anchors, depths: np.ndarray) -> None:
    differs = np.flatnonzero(anchors.depths != depths)
    if len(differs):
        row = differs[0]
        raise ValueError(f"sample {row} has depth {depths[row]}, but {anchors.depths[row]} anchors.")


def _same_length(anchors, samples: Dataset) -> None:
    if len(anchors) != len(samples):
        raise ValueError(f"`anchors` belong to {len(anchors)} samples, not to these {len(samples)}.")


def mix_examples(tables: Mapping[str, Dataset], weights: Mapping[str, float] | None = None, seed: int = 0) -> Dataset:
    """
    Mix tables of rows, such as the main task and the alignment tasks, by weights.

    Args:
        tables (`Mapping[str, Dataset]`):
            Rows by name; columns that not all tables have are left out.
        weights (`Mapping[str, float]`, *optional*):
            How often each row of a table is seen in a pass over the mix: `2` gives each row twice, `0.25` a quarter of
            the rows (drawn by `seed`), `1.5` each row once and half of them again, `0` none. A table without a weight
            has `1`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        `Dataset`: the rows of one table after those of another; trainers shuffle them anew in each epoch.

    Raises:
        ValueError: a weight of an unknown table, one that is negative or not finite, or no row left.
    """
    weights = dict.fromkeys(tables, 1.0) | dict(weights or {})
    parts = []
    for number, (name, weight) in enumerate(weights.items()):
        if name not in tables:
            raise ValueError(f"`weights` names {name!r}, which is no table: choose among {', '.join(tables)}.")
        if not 0 <= weight < np.inf:
            raise ValueError(f"the weight of {name!r} is {weight}, expected a number of 0 or more.")
        size = len(tables[name])
        whole, part = divmod(weight, 1)
        drawn = np.random.default_rng([seed, number]).permutation(size)[: round(part * size)]
        parts.append(tables[name].select(np.concatenate([np.tile(np.arange(size), int(whole)), np.sort(drawn)])))
    if not sum(map(len, parts)):
        raise ValueError("the mix has no rows: give a table with rows a weight above 0.")
    columns = [column for column in parts[0].column_names if all(column in part.column_names for part in parts)]
    return concatenate_datasets([part.select_columns(columns) for part in parts])


def stage1_examples(data: PreparedData, processor: LasarProcessor, rows: Sequence[str]) -> Dataset:
    """
    The rows of stage 1 that a recipe asks for, mixed.

    Args:
        data (`PreparedData`):
            What `recipes/prepare.py` left behind.
        processor (`LasarProcessor`):
            Token ids of histories and items.
        rows (`Sequence[str]`):
            Kinds of rows, each `name` or `name=weight` (see `mix_examples`): `next_item` (`sft_examples`), `history`
            (`history_examples`), `alignment` (`alignment_examples`) or single tasks of it (`ALIGNMENT_TASKS`).

    Returns:
        `Dataset`: `input_ids`, `labels`.

    Raises:
        ValueError: an unknown or repeated kind, a weight that is no number of 0 or more, or no row left.
    """
    align = partial(alignment_examples, data.interactions, data.split, processor)
    makers = {
        "next_item": lambda: sft_examples(data.samples["train"], processor),
        "history": lambda: history_examples(data.split, processor),
        "alignment": align,
        **{task: partial(align, [task]) for task in ALIGNMENT_TASKS},
    }
    weights = _row_weights(rows)
    unknown = sorted(set(weights) - set(makers))
    if unknown:
        raise ValueError(f"rows holds {unknown}: choose among {sorted(makers)}.")
    return mix_examples({name: makers[name]() for name in weights}, weights).select_columns(["input_ids", "labels"])


def _row_weights(rows: Sequence[str]) -> dict[str, float]:
    """Weight of each kind of row: `["next_item", "alignment=0.5"]` is 1 and 0.5."""
    weights = {}
    for entry in rows:
        name, sign, weight = entry.partition("=")
        if name in weights:
            raise ValueError(f"rows holds {name!r} twice: give it once, with a weight.")
        try:
            weights[name] = float(weight) if sign else 1.0
        except ValueError:
            raise ValueError(f"rows holds {entry!r}: expected a name, or name=weight with a number.") from None
    return weights
