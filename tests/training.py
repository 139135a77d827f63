"""Tiny examples and trainers for the tests of training."""

import zlib

import numpy as np
import torch
from datasets import Dataset

from lasar_hf import LasarGRPOConfig, LasarGRPOTrainer, LasarSFTConfig, LasarSFTTrainer
from tests.tiny import row, sid_ids, tiny_catalog, tiny_model


COMMON = dict(
    use_cpu=True,
    bf16=False,
    report_to="none",
    disable_tqdm=True,
    max_steps=2,
    logging_steps=1,
    save_strategy="no",
    learning_rate=1e-2,  # increased, so that two steps move every parameter measurably
)
DEPTHS = [1, 3, 2, 4, 1, 2]


def sft_setup(depths=DEPTHS, **model_kwargs):
    """Model, tokenizer, catalogue, one example per depth, and the anchors of those that have latent slots."""
    model, tokenizer = tiny_model(**model_kwargs)
    catalog = tiny_catalog()
    examples = []
    for i, depth in enumerate(depths):
        answer = sid_ids(model, catalog.codes[i])
        ids = row(model, 4 + i % 3, depth, answer, seed=i)
        examples.append({"input_ids": ids, "labels": [-100] * (len(ids) - 3) + answer, "sample_index": i})
    anchors = None
    if max(depths) > 0:
        vectors = np.random.default_rng(0).normal(size=(sum(depths), 16)).astype(np.float32)
        anchors = np.split(vectors, np.cumsum(depths)[:-1])  # anchors[i] is (N_i, H), as of an AnchorStore
    return model, tokenizer, catalog, Dataset.from_list(examples), anchors


def user_setup(num_users: int = 6):
    """As [`sft_setup`], for every prefix of random histories: users of one to six samples, of one to three steps."""
    model, tokenizer = tiny_model()
    catalog, config = tiny_catalog(), model.config
    generator = torch.Generator().manual_seed(0)
    examples, anchors = [], []
    for user in range(num_users):
        items = torch.randint(len(catalog), (user + 2,), generator=generator).tolist()
        codes = [sid_ids(model, catalog.codes[item]) for item in items]
        for j in range(1, len(items)):
            depth = 1 + (user + j) % 3
            prompt = [*sum(codes[:j], []), config.latent_start_token_id, *[config.latent_token_id] * depth]
            ids = [*prompt, config.latent_end_token_id, *codes[j]]
            labels = [-100] * (len(ids) - 3) + codes[j]
            examples.append({"input_ids": ids, "labels": labels, "sample_index": len(examples)})
            anchors.append(torch.randn(depth, 16, generator=generator).numpy())
    return model, tokenizer, catalog, Dataset.from_list(examples), anchors


def grpo_setup(**model_kwargs):
    """Model, tokenizer, catalogue and four examples with a terminal anchor."""
    model, tokenizer = tiny_model(**model_kwargs)
    texts = ["the red book", "the blue chair", "red chair", "blue item ."]
    anchor = np.linspace(-1, 1, 16).tolist()
    examples = [
        {"prompt": f"{text}<a_1><b_2><c_3><|latent_start|>", "target": i, "terminal_anchor": anchor}
        for i, text in enumerate(texts)
    ]
    return model, tokenizer, tiny_catalog(), Dataset.from_list(examples)


class FixedDraws(LasarGRPOTrainer):
    """Draws each group under a seed made of its prompt, so that draws do not depend on how they are split."""

    def draw_candidates(self, prompts, trainer):
        group_size, parts = self.num_generations, []
        for start in range(0, len(prompts), group_size):
            torch.manual_seed(zlib.crc32(prompts[start].encode()) + self.state.global_step)
            parts.append(super().draw_candidates(prompts[start : start + group_size], trainer))
        names = ("prompt_ids", "completion_ids", "items", "depth_log_prob")
        return {**{name: sum((part[name] for part in parts), []) for name in names}, "logprobs": None}


def sft_trainer(folder, depths=DEPTHS, model_kwargs=None, **kwargs):
    """A trainer of `sft_setup`; other keywords are arguments of the configuration."""
    model, tokenizer, catalog, examples, anchors = sft_setup(depths, **(model_kwargs or {}))
    args = LasarSFTConfig(str(folder), **{**COMMON, "per_device_train_batch_size": 3, **kwargs})
    return LasarSFTTrainer(model, args, catalog, anchors, train_dataset=examples, processing_class=tokenizer)


def grpo_trainer(folder, model_kwargs=None, reward_funcs=None, fixed_draws=False, **kwargs):
    """A trainer of `grpo_setup`; other keywords are arguments of the configuration."""
    model, tokenizer, catalog, examples = grpo_setup(**(model_kwargs or {}))
    args = LasarGRPOConfig(str(folder), **{**COMMON, "per_device_train_batch_size": 8, "num_generations": 4, **kwargs})
    return (FixedDraws if fixed_draws else LasarGRPOTrainer)(
        model, args, catalog, reward_funcs, train_dataset=examples, processing_class=tokenizer
    )


def first_code(completion_ids, **kwargs):
    """A reward that differs within every group, so that every step has a gradient."""
    return [float(ids[0] % 4) for ids in completion_ids]


def some_equal(completion_ids, target, **kwargs):
    """As [`first_code`], but the same for all candidates of the first prompt."""
    return [reward * (index > 0) for reward, index in zip(first_code(completion_ids), target, strict=True)]


def parameters(model):
    """A copy of each parameter."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(before, model):
    """Names of the parameters that differ from `before`."""
    return {name for name, parameter in model.named_parameters() if not before[name].equal(parameter)}
