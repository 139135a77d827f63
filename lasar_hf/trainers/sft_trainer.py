"""Stage 1 (Semantic-ID grounding) and stage 2 (latent reasoning with semantic anchors) on TRL's SFTTrainer.

The path of a batch:

1. `LasarDataCollator` pads the examples and adds the anchors of their samples.
2. `compute_loss` calls TRL's, which calls `model(..., labels=labels, fused_lm_head=True)`. `add_catalog_head` replaced
   this forward: it runs `LasarModel` (prompt, latent loop, answer) and scores the labels over the catalogue.
3. In the same pass a forward hook (`record_latent_states`) keeps the output of `LasarModel`, from which `compute_loss`
   reads the latent states and depth logits for the other losses.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..model.catalog_lasar import SidCatalog
from ..model.configuration_lasar import LasarConfig
from ..reasoning.anchors import AnchorStore
from .catalog_head import add_catalog_head, item_embeddings
from .depth_rows import DepthRows
from .lora import check_token_rows, is_adapter, load_model, train_policy_head
from .losses import alignment_loss
from .prefix_sampler import PrefixBatchSampler
from .sft_config import LasarSFTConfig
from .sharding import refuse_zero3
from .trainer_mixin import LasarTrainerMixin, as_sets, check_lengths, latent_metrics, split_processor, unwrap_lasar


@dataclass
class LasarDataCollator(DataCollatorForLanguageModeling):
    """
    Collator for stage 2. The only change w.r.t. TRL's [`DataCollatorForLanguageModeling`] is that the batch gets
    `anchors` `(B, max N, H)`, zero beyond the depth of an example, and a row for each depth of `depth_rows`;
    everything else is inherited.

    Args:
        anchors, latent_token_id ([`~lasar_hf.reasoning.AnchorStore`] and `int`, *optional*):
            Anchors of each sample, and the id of `<|latent|>` to count latent slots. Held-out examples, without a
            column `sample_index`, get no anchors.
        any_depth (`bool`, *optional*, defaults to `False`):
            Allow examples whose depth is not their number of anchors, see
            [`~lasar_hf.reasoning.AnchorStore.at_depth`].
        depth_rows ([`DepthRows`], *optional*):
            Train each example at several depths. The batch gets `loss_weights` and `is_own` `(B,)`.

    Examples with a column `neighbours` add `neighbours` `(B, R)`, padded with -1, and `neighbour_share` `(B,)`. Those
    with a column `depth` add `has_depth` `(B,)`, false where it is -1: the policy does not learn from them.
    """

    anchors: AnchorStore | None = field(default=None, kw_only=True)
    latent_token_id: int | None = field(default=None, kw_only=True)
    any_depth: bool = field(default=False, kw_only=True)
    depth_rows: DepthRows | None = field(default=None, kw_only=True)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if self.depth_rows is not None:
            examples = [row for example in examples for row in self.depth_rows.expand(example)]
        batch = super().torch_call(examples)
        if self.depth_rows is not None:
            batch["loss_weights"] = torch.tensor([row["loss_weight"] for row in examples])  # (B,)
            batch["is_own"] = torch.tensor([row["is_own"] for row in examples])  # (B,)
        if "depth" in examples[0]:
            batch["has_depth"] = torch.tensor([row["depth"] >= 0 for row in examples])  # (B,)
        if "neighbours" in examples[0]:
            rows = [torch.tensor(row["neighbours"], dtype=torch.long) for row in examples]
            batch["neighbours"] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)  # (B, R)
            batch["neighbour_share"] = torch.tensor([row.get("neighbour_share", 1.0) for row in examples])  # (B,)
        if self.anchors is not None and "sample_index" in examples[0]:
            vectors = [torch.as_tensor(self._anchors_of(example)) for example in examples]  # B × (N, H)
            batch["anchors"] = nn.utils.rnn.pad_sequence(vectors, batch_first=True)  # (B, max N, H)
        return batch

    def _anchors_of(self, example: dict[str, Any]) -> np.ndarray:
        if not example.get("is_own", True):
            return self.anchors[example["sample_index"]][:0]
        sample, slots = example["sample_index"], sum(token == self.latent_token_id for token in example["input_ids"])
        if self.any_depth:
            return self.anchors.at_depth(sample, slots)
        anchors = self.anchors[sample]
        if slots != len(anchors):
            raise ValueError(
                f"sample_index {sample}: the example has {slots} latent slots and the sample {len(anchors)} anchors. "
                "Make both from the same segments, or set anchors_at_any_depth."
            )
        return anchors


class LasarSFTTrainer(LasarTrainerMixin, SFTTrainer):
    r"""
    Trainer for the supervised stages of LASAR (arXiv 2605.10207).

    The only change w.r.t. [`~trl.SFTTrainer`] is the loss; everything else is inherited:

        L_SFT = L_CE + α · L_align + β · L_policy

    `L_CE` normalises SID tokens over the catalogue (or over the vocabulary, `sid_loss`), at the depth of the example
    or at several (`depth_weights`). `L_align` compares the latent
    states with the anchors, see [`~lasar_hf.trainers.alignment_loss`]. `L_policy` is the cross-entropy of the policy
    head with the number of latent slots of the example. Stage 1 has no latent slots and `policy_weight=0`. Plain text
    and examples whose column `depth` is -1 have no `L_policy`.

    Args:
        model (`str` or [`LasarForGenerativeRec`] or [`~peft.PeftModel`]):
            Model, or its path.
        args ([`LasarSFTConfig`]):
            Arguments.
        catalog ([`SidCatalog`], *optional*):
            The items, for `sid_loss="catalog"`. Defaults to the catalogue of `processing_class`.
        anchors ([`~lasar_hf.reasoning.AnchorStore`], *optional*):
            Semantic anchors of the training samples, which examples name in the column `sample_index`, for `L_align`.
        ranking_evaluator (`Callable` or `dict[str, Callable]`, *optional*):
            Called with the model once per evaluation, on every process, such as
            [`~lasar_hf.evaluation.RankingEvaluator`]; needs no `eval_dataset`. Its metrics are logged and can be
            `metric_for_best_model`. Those of a `dict`, one per named evaluation set, are named `eval_{name}_…`.
        train_dataset ([`~datasets.Dataset`]):
            Examples with `input_ids` and `labels`, see [`~lasar_hf.data.sft_examples`] and
            [`~lasar_hf.data.reasoning_examples`]. Evaluation examples without `sample_index` are held out: their
            `eval_loss` is `L_CE` alone.
        processing_class ([`LasarProcessor`] or [`~transformers.PreTrainedTokenizerBase`], *optional*):
            Saved with each checkpoint; a tokenizer with the catalogue. Defaults to that of the model's folder.
        kwargs:
            Passed to [`~trl.SFTTrainer`].

    Example:

    ```python
    >>> examples = sft_examples(data.samples["train"], processor)
    >>> args = LasarSFTConfig("outputs/stage1")
    >>> trainer = LasarSFTTrainer(model, args, train_dataset=examples, processing_class=processor)
    >>> trainer.train()
    ```
    """

    batch_sampler: PrefixBatchSampler | None = None  # with `max_tokens_per_batch`
    _drawn_at, _micro_batch = -1, 0  # step and micro-batch of the last draw of neighbours
    _tag_names = ["trl", "sft", "lasar"]
    _title, _description = "Supervised training", "Supervised training with `LasarSFTTrainer`."

    def __init__(
        self,
        model,
        args: LasarSFTConfig,
        catalog: SidCatalog | None = None,
        anchors: AnchorStore | None = None,
        ranking_evaluator: Callable[[nn.Module], dict[str, float]] | dict[str, Callable] | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        **kwargs,
    ):
        revision = (args.model_init_kwargs or {}).get("revision")
        self.processor, tokenizer, self.catalog = split_processor(model, processing_class, catalog, revision)
        if args.sid_loss == "catalog" and self.catalog is None:
            raise ValueError('sid_loss="catalog" needs the items. Pass catalog, or a LasarProcessor.')
        if args.alignment == "item_kl" and self.catalog is None:
            raise ValueError('alignment="item_kl" needs the items. Pass catalog, or a LasarProcessor.')
        if args.neighbour_targets > 0 and self.processor is None:
            raise ValueError("neighbour_targets needs the tokens of the items. Pass a LasarProcessor.")
        _check_arguments(args, train_dataset, eval_dataset, kwargs)
        model = load_model(model, **(args.model_init_kwargs or {})) if is_adapter(model) else model
        eval_dataset = self.set_ranking_evaluator(ranking_evaluator, eval_dataset)
        _check_best_metric(args, eval_dataset, self.ranking_names())
        refuse_zero3(model, args, kwargs.get("peft_config"))
        super().__init__(
            model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=tokenizer, **kwargs
        )
        lasar = unwrap_lasar(self.model)
        # As tokenised by TRL, or as given if TRL may have cut them.
        if args.max_length is None:
            train_dataset, eval_dataset = self.train_dataset, self.eval_dataset
        self.depth_rows, self.has_anchors = _depth_rows(args, lasar.config), anchors is not None
        for dataset in [*as_sets(train_dataset), *as_sets(eval_dataset)]:
            check_lengths(dataset, lasar.config, args.max_length, depth_rows=self.depth_rows)
        if isinstance(self.data_collator, DataCollatorForLanguageModeling):  # type: ignore[has-type]
            self.data_collator = LasarDataCollator(
                self.data_collator.pad_token_id,  # type: ignore[has-type]
                pad_to_multiple_of=self.data_collator.pad_to_multiple_of,  # type: ignore[has-type]
                anchors=anchors if args.alignment != "none" else None,
                latent_token_id=lasar.config.latent_token_id,
                any_depth=args.anchors_at_any_depth,
                depth_rows=self.depth_rows,
            )
        if args.sid_loss == "catalog":
            add_catalog_head(lasar, self.catalog)
        elif isinstance(lasar.lm_head, TrainableTokensWrapper):
            lasar.lm_head.bias = None  # TRL's head reads `bias`, which PEFT's wrapper does not have
        check_token_rows(lasar)
        train_policy_head(lasar, args.policy_weight > 0)
        self.record_latent_states(lasar)

    def loss_terms(self) -> dict[str, float]:
        """Weight of each term of the loss by its name, for the model card."""
        align = self.args.alignment_weight if self.has_anchors and self.args.alignment != "none" else 0.0
        over = "the catalogue" if self.args.sid_loss == "catalog" else "the vocabulary"
        return {
            f"cross-entropy (of Semantic IDs over {over})": 1.0, f"alignment ({self.args.alignment})": align,
            "depth policy": self.args.policy_weight,
        }  # fmt: skip

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        added = [name for name in ("sample_index", "neighbours", "depth") if name not in self._signature_columns]
        self._signature_columns = [*self._signature_columns, *added]

    def _get_train_sampler(self, train_dataset=None):
        """With `max_tokens_per_batch`, batches of users."""
        if self.args.max_tokens_per_batch is None:
            return super()._get_train_sampler(train_dataset)
        dataset = (self.train_dataset if train_dataset is None else train_dataset).with_format(None)
        config, sequences, path_lengths = unwrap_lasar(self.model).config, list(dataset["input_ids"]), None
        if self.depth_rows is not None:
            path_lengths = [self.depth_rows.path_length(ids, config.latent_start_token_id) for ids in sequences]
        self.batch_sampler = PrefixBatchSampler(
            sequences,
            config.latent_start_token_id,
            self.args.max_tokens_per_batch,
            self.args.world_size,
            self.args.process_index,
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
            path_lengths,
        )
        # Batches differ in their number of examples. Means over a step would weigh the examples of small batches more,
        # so sums are divided by the mean numbers of labels and of terms in a step.
        batches_per_step = self.args.world_size * self.args.gradient_accumulation_steps
        share = batches_per_step / (len(self.batch_sampler) * self.args.world_size)
        labels = share * sum(label != -100 for row in dataset["labels"] for label in row[1:])
        # Of all processes, or of one if the loss is averaged over them.
        self.labels_per_step = labels if self.args.average_tokens_across_devices else labels / self.args.world_size
        slots = np.array([ids.count(config.latent_token_id) for ids in sequences])
        has_depth = [config.latent_start_token_id in ids for ids in sequences]
        if "depth" in dataset.column_names:
            has_depth = [depth >= 0 for depth in dataset["depth"]]
        is_term = np.stack([slots > 0, (slots >= config.min_latent_steps) & has_depth])  # (2, examples)
        self.terms_per_step = share * torch.tensor(is_term.sum(axis=1))  # (2,)
        return self.batch_sampler

    def _get_num_items_in_batch(self, batch_samples, device):
        """Numbers of labels and, for the other losses, of terms in a step, over its micro-batches and processes."""
        if self.batch_sampler is not None:
            self._terms_of_step = self.terms_per_step.to(device)
            return torch.tensor(self.labels_per_step, device=device)
        self._terms_of_step = self._num_terms(batch_samples, device)
        if self.depth_rows is not None:
            return self._num_labels(batch_samples, device)
        return super()._get_num_items_in_batch(batch_samples, device)

    def _num_labels(self, batches: list[dict], device) -> torch.Tensor:
        """Labels of all processes; those of an example count once, at however many depths it is trained."""
        counts = [(batch["labels"][:, 1:] != -100).sum(dim=1) for batch in batches]  # of (B,)
        if self.depth_rows is not None:
            counts = [count * batch["loss_weights"] for count, batch in zip(counts, batches, strict=True)]
        total = torch.as_tensor(sum(count.sum() for count in counts), device=device)
        return self.accelerator.reduce(total, "sum") if self.args.average_tokens_across_devices else total

    def _num_terms(self, batches: list[dict], device) -> torch.Tensor:
        """Sequences of all processes with an alignment and with a policy loss, `(2,)`."""
        counts = [self._has_terms(batch).sum(dim=1).to(device) for batch in batches]  # of (2,)
        return self.accelerator.reduce(sum(counts, torch.zeros(2, device=device)), "sum")

    def _has_terms(self, batch: dict) -> torch.Tensor:
        """Which sequences have an alignment and which a policy loss, `(2, B)`."""
        config, ids = unwrap_lasar(self.model).config, batch["input_ids"]
        slots = (ids == config.latent_token_id).sum(dim=1)  # (B,)
        has_depth = batch.get("has_depth", (ids == config.latent_start_token_id).any(dim=1))  # plain text has none
        is_own = batch.get("is_own", torch.ones_like(has_depth))
        has_class = is_own & has_depth & (slots >= config.min_latent_steps)
        return torch.stack([is_own & (slots > 0) & ("anchors" in batch), has_class])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """`L_CE` of TRL, plus the terms that read the latent states of the same pass."""
        # 1. Cross-entropy of the next token; this runs the model. Without a number of labels, as in an evaluation, TRL
        # would divide by those of this process, at every depth.
        neighbours, share = inputs.pop("neighbours", None), inputs.pop("neighbour_share", None)
        if neighbours is not None and self.args.neighbour_targets > 0 and self.model.training:
            inputs = self._with_neighbours(inputs, neighbours, share)
        is_step = num_items_in_batch is not None
        if not is_step:
            num_items_in_batch = self._num_labels([inputs], inputs["labels"].device)
        has_terms = self._has_terms(inputs)  # (2, B)
        anchors, is_own, _ = (inputs.pop(name, None) for name in ("anchors", "is_own", "has_depth"))
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        output = self._outputs.pop()
        metrics = latent_metrics(output, unwrap_lasar(self.model).get_input_embeddings(), is_own)

        # 2. The other losses: sums over the terms of this batch, divided by the number of terms in the whole step. The
        # processes add up terms and metrics together, so a batch without such terms computes them too.
        if not self.model.training:  # held-out examples have neither anchors nor labels
            has_terms = has_terms & (anchors is not None)
        totals = self._terms_of_step if is_step else self.accelerator.reduce(has_terms.sum(dim=1), "sum")  # (2,)
        # DDP takes the mean of the processes.
        weights = torch.where(totals > 0, self.accelerator.num_processes / totals, 0)  # (2,)
        extra = output.depth_logits.new_zeros((), dtype=torch.float32)
        if self.args.alignment != "none":
            total, metrics["align_loss"] = self._alignment_term(output, anchors, has_terms[0])
            extra = extra + self.args.alignment_weight * weights[0] * total
        if self.args.policy_weight > 0:
            total, policy_metrics = self._policy_term(output, has_terms[1])
            metrics |= policy_metrics
            extra = extra + self.args.policy_weight * weights[1] * total
        self.log_means(metrics)

        # 3. The Trainer adds up the micro-batches of a step.
        loss, *outputs = result if return_outputs else [result]
        loss = loss + extra
        if not self.model.training:  # the same on every process, of which the Trainer may leave out some
            loss = self.accelerator.reduce(loss, "mean")
        return (loss, *outputs) if return_outputs else loss

    def _alignment_term(self, output, anchors: torch.Tensor | None, has_term: torch.Tensor):
        """Sum over the sequences of `L_align`, `h_1 … h_N` against the anchors `(B, max N, H)`, and its metric."""
        latents = output.latent_states[:, 1:]  # (B, max N, H); h_0 has no anchor
        steps = torch.arange(latents.shape[1], device=latents.device)  # (max N,)
        mask = (steps < output.latent_steps[:, None]) & has_term[:, None]  # (B, max N)
        anchors = torch.zeros_like(latents) if anchors is None else anchors
        # Rows at other depths may be deeper than those that have anchors.
        anchors = nn.functional.pad(anchors, (0, 0, 0, latents.shape[1] - anchors.shape[1]))
        total = self._alignment(latents, anchors, mask) * has_term.sum()
        return total, (total, has_term.sum())

    def _policy_term(self, output, has_term: torch.Tensor):
        """Sum over the sequences of `L_policy`, and its metrics. Class k means depth k + min_latent_steps."""
        # Sequences without a class are masked rather than left out, so that the head gets a gradient in every batch.
        classes = output.latent_steps - unwrap_lasar(self.model).config.min_latent_steps  # (B,)
        labels = torch.where(has_term, classes, -100)  # (B,)
        total = nn.functional.cross_entropy(
            output.depth_logits.float(), labels, reduction="sum", label_smoothing=self.args.policy_label_smoothing
        )
        is_correct, count = output.depth_logits.argmax(-1) == labels, has_term.sum()
        return total, {"policy_loss": (total, count), "depth_accuracy": (is_correct.sum(), count)}

    def _with_neighbours(self, inputs: dict, neighbours: torch.Tensor, share: torch.Tensor) -> dict:
        """
        The batch with drawn neighbours as the answers of some sequences. The draws depend on the seed, the step and
        the process alone, so that a resumed run draws the same.
        """
        step = self.state.global_step
        self._micro_batch = self._micro_batch + 1 if self._drawn_at == step else 0
        self._drawn_at = step
        rng = np.random.default_rng([self.args.seed, step, self._micro_batch, self.args.process_index])
        chance, place = (torch.tensor(part, device=share.device) for part in rng.random((2, len(share))))  # (B,)
        # 1. Which sequences with labels, and which of their neighbours.
        has_label = inputs["labels"] != -100  # (B, L)
        count = (neighbours >= 0).sum(dim=1)  # (B,)
        replaced = has_label.any(dim=1) & (count > 0) & (chance < self.args.neighbour_targets * share)  # (B,)
        items = neighbours[replaced, (place * count).long()[replaced]]  # (n,)
        # 2. Their tokens take the place of the labels, which are the target's tokens.
        answers = self.processor.sid_token_ids.to(items.device)[items].flatten()  # (n · M,)
        is_answer = has_label & replaced[:, None]  # (B, L)
        changed = {name: inputs[name].masked_scatter(is_answer, answers) for name in ("input_ids", "labels")}
        return inputs | changed

    def _alignment(self, latents: torch.Tensor, anchors: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.args.alignment != "item_kl":
            return alignment_loss(latents, anchors, mask, self.args.alignment)
        # Scores of all items instead of hidden states: (B, max N, I).
        items = item_embeddings(unwrap_lasar(self.model), self.catalog).to(latents.dtype)  # (I, H)
        return alignment_loss(latents @ items.T, anchors.to(items.dtype) @ items.T, mask, "kl")

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """TRL's losses, plus the metrics of `ranking_evaluator`, of examples that are checked as at the start."""
        for dataset in as_sets(eval_dataset):
            check_lengths(dataset, unwrap_lasar(self.model).config, self.args.max_length, depth_rows=self.depth_rows)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)


def _depth_rows(args: LasarSFTConfig, config: LasarConfig) -> DepthRows | None:
    if args.depth_weights is None:
        return None
    config.check_depth("The last depth of depth_weights", len(args.depth_weights) - 1)
    return DepthRows(args.depth_weights, config.latent_token_id, config.latent_end_token_id)


def _check_arguments(args: LasarSFTConfig, train_dataset: Any, eval_dataset: Any, kwargs: dict) -> None:
    """Refuse what would drop examples, parts of them or terms of the loss."""
    if args.packing or args.padding_free:
        raise ValueError("packing and padding_free are not supported: the latent loop needs one example per row.")
    if args.label_smoothing_factor > 0 or kwargs.get("compute_loss_func") is not None:
        raise ValueError("label_smoothing_factor and compute_loss_func must be unset: they drop the latent terms.")
    datasets = [*as_sets(train_dataset), *as_sets(eval_dataset)]
    if args.max_length is not None and not all(
        isinstance(dataset, Dataset) and "input_ids" in dataset.column_names for dataset in datasets
    ):
        raise ValueError(
            f"max_length is {args.max_length}, which would cut examples that are not tokenised yet. Leave it out, or "
            "pass a Dataset with input_ids."
        )
    if args.max_tokens_per_batch is not None and not isinstance(train_dataset, Dataset):
        raise ValueError(
            "max_tokens_per_batch needs a Dataset, since it groups the examples; train_dataset is a "
            f"{type(train_dataset).__name__}."
        )


def _check_best_metric(args: LasarSFTConfig, eval_dataset: Any, ranking_names: list[str] | None) -> None:
    """Refuse a `metric_for_best_model` that no evaluation returns; callables of a user may return any metric."""
    metric = args.metric_for_best_model
    if metric is None or ranking_names is None:
        return
    names = [f"{name}_loss" for name in eval_dataset] if isinstance(eval_dataset, dict) else ["loss"]
    names += ranking_names
    if eval_dataset:  # TRL and `compute_loss`
        names += ["mean_token_accuracy", "entropy", "depth_entropy"]
        if all("sample_index" in (dataset.column_names or ()) for dataset in as_sets(eval_dataset)):  # not held out
            names += ["align_loss"] if args.alignment != "none" else []
            names += ["policy_loss", "depth_accuracy"] if args.policy_weight > 0 else []
    if metric.removeprefix("eval_") not in names:
        raise ValueError(f"metric_for_best_model is {metric!r}; expected one of {', '.join(names)}.")
