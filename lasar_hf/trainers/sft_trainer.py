"""Stage 1 (SID grounding) and stage 2 (latent reasoning with semantic anchors) on TRL's SFTTrainer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from trl import SFTTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..model.catalog_lasar import SidCatalog
from ..reasoning.anchors import AnchorStore
from .catalog_head import add_catalog_head
from .latent_states import LatentStateRecorder, latent_metrics, unwrap_lasar
from .lora import refuse_zero3, train_policy_head
from .losses import alignment_loss
from .model_card import save_model_card
from .sft_config import LasarSFTConfig
from .sharding import run_with_gathered_weights


@dataclass
class LasarDataCollator(DataCollatorForLanguageModeling):
    """
    TRL's collator, which adds the semantic anchors of each row's sample.

    Args:
        anchors ([`~lasar_hf.data.AnchorStore`], *optional*):
            Anchors by sample; rows then carry a column `sample`. The batch gets `anchors` `(B, max N, H)`, zero
            beyond a row's depth.
        latent_token_id (`int`, *optional*):
            Id of `<|latent|>`, to check that a row has as many latent slots as its sample has anchors.
    """

    anchors: AnchorStore | None = field(default=None, kw_only=True)
    latent_token_id: int | None = field(default=None, kw_only=True)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        if self.anchors is not None and "sample" in examples[0]:  # held-out rows have no chain of thought
            vectors = [self._anchors_of(example) for example in examples]
            batch["anchors"] = nn.utils.rnn.pad_sequence(vectors, batch_first=True)
        return batch

    def _anchors_of(self, example: dict[str, Any]) -> torch.Tensor:
        """Anchors `(N, H)` of a row's sample."""
        vectors = torch.as_tensor(self.anchors[example["sample"]])
        slots = sum(token == self.latent_token_id for token in example["input_ids"])
        if slots != len(vectors):
            raise ValueError(
                f"A row of sample {example['sample']} has {slots} latent slots, but the sample has {len(vectors)} "
                "anchors: make rows and anchors from the same segments."
            )
        return vectors


class LasarSFTTrainer(SFTTrainer):
    r"""
    Supervised training of LASAR. It differs from [`~trl.SFTTrainer`] in the loss; the rest is inherited:

        L_SFT = L_CE + α · L_align + β · L_policy        (METHOD.md 4)

    `L_CE` at SID positions is normalised over the catalogue (or the vocabulary, `sid_loss`). `L_align` compares the
    latent states with the anchors given, `L_policy` teaches the policy head the depth a row was unrolled to. Both read
    the pass that made `L_CE`. Stage 1 is the case without latent slots and with `policy_weight=0`.

    Args:
        model (`str` or [`LasarForGenerativeRec`] or [`~peft.PeftModel`]):
            Model, or the path of one.
        args ([`LasarSFTConfig`]):
            Arguments.
        catalog ([`SidCatalog`], *optional*):
            The items; needed for `sid_loss="catalog"`.
        anchors ([`~lasar_hf.data.AnchorStore`], *optional*):
            Semantic anchors of the training samples; rows carry their number in a column `sample`. Without anchors
            there is no alignment loss.
        ranking_evaluator (`Callable`, *optional*):
            Called with the model at each evaluation; what it returns is logged and can name the best checkpoint, as
            `metric_for_best_model="eval_NDCG@10"`. See [`~lasar_hf.evaluation.RankingEvaluator`]. Every process
            calls it.
        train_dataset ([`~datasets.Dataset`]):
            Examples with `input_ids` and `labels`, see [`~lasar_hf.data.sft_examples`] and
            [`~lasar_hf.data.reasoning_examples`].
        kwargs:
            Passed to [`~trl.SFTTrainer`].

    Raises:
        `ValueError`: if `sid_loss="catalog"` and there is no catalogue, or packing or padding-free batches are asked
        for (a latent region needs its own row).
    """

    _tag_names = ["trl", "sft", "lasar"]
    _name = "LASAR SFT"

    def __init__(
        self,
        model,
        args: LasarSFTConfig,
        catalog: SidCatalog | None = None,
        anchors: AnchorStore | None = None,
        ranking_evaluator: Callable[[nn.Module], dict[str, float]] | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        **kwargs,
    ):
        if args.sid_loss == "catalog" and catalog is None:
            raise ValueError('sid_loss="catalog" needs the items: pass catalog=SidCatalog(codes, item_ids).')
        if args.packing or args.padding_free:
            raise ValueError("LASAR cuts each row at its latent region: set packing=False and padding_free=False.")
        if args.label_smoothing_factor > 0 or kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "Smoothed labels and loss functions of your own are computed in a pass without the latent losses: set "
                "label_smoothing_factor=0 and leave compute_loss_func out."
            )
        refuse_zero3(model, args, kwargs.get("peft_config"))
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        lasar = unwrap_lasar(self.model)
        self.catalog = catalog
        self.ranking_evaluator = ranking_evaluator
        if isinstance(self.data_collator, DataCollatorForLanguageModeling):
            self.data_collator = LasarDataCollator(
                self.data_collator.pad_token_id,
                pad_to_multiple_of=self.data_collator.pad_to_multiple_of,
                anchors=anchors if args.alignment != "none" else None,
                latent_token_id=lasar.config.latent_token_id,
            )
        if args.sid_loss == "catalog":
            add_catalog_head(lasar, catalog)
        elif isinstance(lasar.lm_head, TrainableTokensWrapper):
            lasar.lm_head.bias = None  # TRL's head reads it, and PEFT's wrapper passes the weight on alone
        train_policy_head(lasar, args.policy_weight > 0)
        self._recorder = LatentStateRecorder(lasar.model)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "sample" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "sample"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """`L_CE` of TRL, then the terms that read the latent states of the same pass."""
        anchors = inputs.pop("anchors", None)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        extra = self._latent_losses(self._recorder.pop(), anchors)
        # As TRL does with auxiliary losses: without it the Trainer would count them once for each accumulation step.
        if num_items_in_batch is not None:
            extra = extra / self.current_gradient_accumulation_steps
        return (result[0] + extra, result[1]) if return_outputs else result + extra

    def _latent_losses(self, output, anchors: torch.Tensor | None) -> torch.Tensor:
        loss = output.depth_logits.new_zeros((), dtype=torch.float32)
        metrics = latent_metrics(output, unwrap_lasar(self.model).get_input_embeddings())
        if anchors is not None:
            latents = output.latent_states[:, 1:]
            mask = torch.arange(latents.shape[1], device=latents.device) < output.latent_steps[:, None]
            align = alignment_loss(latents, anchors, mask, self.args.alignment)
            metrics["align_loss"] = align.detach()
            loss = loss + self.args.alignment_weight * align
        if self.args.policy_weight > 0:
            # A row without latent steps has no class; its term is masked, so that the head always gets a gradient.
            labels = torch.where(output.latent_steps > 0, output.latent_steps - 1, -100)
            rows = nn.functional.cross_entropy(output.depth_logits.float(), labels, reduction="sum")
            policy = rows / (labels >= 0).sum().clamp(min=1)
            hits = (output.depth_logits.argmax(-1) == labels).sum() / (labels >= 0).sum().clamp(min=1)
            metrics["policy_loss"], metrics["depth_accuracy"] = policy.detach(), hits
            loss = loss + self.args.policy_weight * policy
        self._record(metrics)
        return loss

    def _record(self, metrics: dict[str, torch.Tensor]) -> None:
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            value = self.accelerator.gather(value.detach().float()).mean().item()
            self._metrics[mode][name].append(value)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The losses of TRL, then the ranking metrics of `ranking_evaluator`."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.ranking_evaluator is not None:
            ranking = {f"{metric_key_prefix}_{name}": value for name, value in self._rank().items()}
            self.log(dict(ranking))
            metrics |= ranking
        return metrics

    def _rank(self) -> dict[str, float]:
        """What `ranking_evaluator` finds, on whole weights."""
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            return run_with_gathered_weights(model, partial(self.ranking_evaluator, unwrap_lasar(model)))

    def _save(self, output_dir=None, state_dict=None):
        """The catalogue belongs beside the weights: a checkpoint alone can recommend."""
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.catalog is not None:
            self.catalog.save_pretrained(output_dir or self.args.output_dir)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """Write the card from this package: TRL's template is found inside the trl package only."""
        save_model_card(self, model_name, [*self._tag_names, *(tags or [])], "Supervised training of LASAR.")
