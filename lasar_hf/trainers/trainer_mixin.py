"""What both trainers share: the latent states of a pass, logged metrics, checkpoints and the model card."""

import copy
import os
from collections import deque
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import AutoProcessor, PreTrainedTokenizerBase, Trainer
from trl.models import unwrap_model_for_generation

from ..card import CardFacts, find_card, hub_name, model_card, save_card, training_text
from ..model.base_lasar import LasarModelOutput
from ..model.configuration_lasar import LasarConfig
from ..model.files_lasar import write_checksums
from ..model.modeling_lasar import LasarForGenerativeRec
from ..model.processing_lasar import LasarProcessor
from .hub import ADAPTER, commit_operations
from .lora import ADAPTER_FILES
from .losses import depth_entropy
from .resume import FREE, LENGTH, seal_checkpoint


# A sum over the local batch and the number of its terms.
SumAndCount = tuple[torch.Tensor, torch.Tensor | int]


def unwrap_lasar(model: nn.Module) -> nn.Module:
    """The [`LasarForGenerativeRec`] inside a PEFT wrapper, or the model itself without one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def split_processor(
    model, processing_class: PreTrainedTokenizerBase | LasarProcessor | None, catalog, revision: str | None = None
):
    """
    The processor (or `None`), the tokenizer for TRL and the catalogue (or `None`) from a trainer's arguments. By
    default they are those in the model's folder, or of a `revision` of its repository. TRL would treat any processor
    as that of a vision model. Refuses a catalogue that differs from the processor's.
    """
    if processing_class is None:
        folder = model if isinstance(model, str) else unwrap_lasar(model).config._name_or_path
        try:
            processing_class = AutoProcessor.from_pretrained(folder, revision=revision)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"processing_class is missing, and the model's folder {folder!r} has none. Pass a LasarProcessor or "
                "tokenizer."
            ) from error
    if not isinstance(processing_class, LasarProcessor):
        return None, processing_class, catalog
    saved = processing_class.catalog
    if catalog is not None and not (
        catalog.item_ids == saved.item_ids
        and torch.equal(catalog.codes, saved.codes)
        and torch.equal(catalog.removed, saved.removed)
    ):
        raise ValueError(
            "catalog differs from the catalogue of processing_class, which would be saved with the checkpoint. Leave "
            "catalog out, or create the LasarProcessor with it."
        )
    return processing_class, processing_class.tokenizer, saved


def as_sets(dataset: Any) -> list:
    """One data set (or none), or several by name, as a list."""
    return list(dataset.values()) if isinstance(dataset, dict) else [] if dataset is None else [dataset]


def check_lengths(
    dataset: object, config: LasarConfig, max_length: int | None = None, tokenizer=None, depth_rows=None
) -> None:
    """
    Refuse examples (with a tokenizer, prompts of GRPO; with `depth_rows`, their deepest rows) that are too long for
    training or the backbone to read.
    """
    column, added = ("prompt", config.max_latent_steps + 1 + config.num_sid_levels) if tokenizer else ("input_ids", 0)
    if not isinstance(dataset, Dataset) or column not in dataset.column_names:  # streamed, or without tokens
        return
    examples = dataset.with_format(None)[column]
    if tokenizer:
        examples = (tokenizer(text, add_special_tokens=False).input_ids for text in examples)
    sizes = [(len(ids) + added, ids.count(config.latent_token_id)) for ids in examples]
    if depth_rows is not None:
        deepest = [depth_rows.depths(ids)[-1] for ids in examples]
        sizes = [(size + depth - own, depth) for (size, own), depth in zip(sizes, deepest, strict=True)]
    positions = getattr(config.backbone_config, "max_position_embeddings", None)  # some backbones have no limit
    limits = {"max_length": max_length, "max_position_embeddings": positions}
    for name, limit in {**limits, "max_latent_steps": config.max_latent_steps}.items():
        size, index = max((size[name == "max_latent_steps"], i) for i, size in enumerate(sizes or [(0, 0)]))
        if limit is not None and size > limit:
            what, remedy = "tokens", "a smaller max_history in the LasarProcessor"
            if name == "max_latent_steps":
                what, remedy = "latent slots", "fewer segments per sample, or a model with more latent steps"
            raise ValueError(
                f"Example {index} is the longest with {size} {what}, but {name} is {limit}. Use {remedy}."
            )


@torch.no_grad()
def latent_metrics(
    output: LasarModelOutput, embedding: nn.Embedding, is_own: torch.Tensor | None = None
) -> dict[str, SumAndCount]:
    """
    Metrics of the latent reasoning: `mean_depth` (steps), `depth_entropy` (nats), `latent_norm_ratio`, the norm of
    `h_0 … h_{N-1}` relative to that of the input embeddings, which grows when a latent loop diverges, and
    `latent_cosine`, that of successive states, which is 1 when steps repeat one another. ZeRO-3 leaves the embeddings
    empty after the forward; then the ratio has no terms. `is_own` `(B,)` selects sequences.
    """
    steps, entropy = output.latent_steps, depth_entropy(output.depth_logits)  # (B,)
    is_own = torch.ones_like(steps, dtype=torch.bool) if is_own is None else is_own
    # Slot t follows the state h_{t-1}, for t = 1 … N.
    before, after = output.latent_states[:, :-1].float(), output.latent_states[:, 1:].float()  # (B, max N, H)
    is_step = (torch.arange(before.shape[1], device=steps.device) < steps[:, None]) & is_own[:, None]  # (B, max N)
    norms = embedding.weight[:1024].float().norm(dim=-1)
    if isinstance(norms, DTensor):  # FSDP2 may shard the weight again after the forward
        norms = norms.full_tensor()
    has_norm = is_step & (embedding.weight.numel() > 0)
    cosine = nn.functional.cosine_similarity(before, after, dim=-1)  # (B, max N)
    return {
        "mean_depth": ((steps * is_own).sum(), is_own.sum()),
        "depth_entropy": ((entropy * is_own).sum(), is_own.sum()),
        "latent_norm_ratio": (before[has_norm].norm(dim=-1).sum() / norms.mean(), has_norm.sum()),
        "latent_cosine": ((cosine * is_step).sum(), is_step.sum()),
    }


class LasarTrainerMixin(Trainer):
    """
    Methods of both trainers, which set `processor`, `catalog`, `_tag_names`, `_title` and `_description` and have
    `loss_terms`.
    """

    card_facts = CardFacts()  # what the caller knows of the run, for the model card

    def record_latent_states(self, lasar: LasarForGenerativeRec) -> None:
        """
        Keep the output of the base model's last forward, from which the extra losses read the latent states. The
        model gets the catalogue of the training, with which it is saved.
        """
        lasar.catalog = self.catalog
        self._outputs: deque[LasarModelOutput] = deque(
            maxlen=1
        )  # `pop` releases the output, so that its autograd graph can be freed
        lasar.model.register_forward_hook(lambda module, args, output: self._outputs.append(output))

    def on_gathered_weights(self, function: Callable[[LasarForGenerativeRec], Any]) -> Any:
        """
        Call a function that uses the model other than through its forward. ZeRO-3 gathers all weights for it, FSDP2
        those of the root's forward (embeddings and head). Every process must call it.
        """
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            call = partial(function, unwrap_lasar(model))
            if not isinstance(model, FSDPModule):
                return call()
            model._gathered = call
            register_fsdp_forward_method(model, "_gathered")
            try:
                return model._gathered()
            finally:
                del model._gathered

    def set_ranking_evaluator(self, ranking_evaluator: Callable | dict | None, eval_dataset: Any) -> Any:
        """
        Keep the ranking evaluators by the prefix of their metrics. Returns the evaluation set for the Trainer: that of
        the user, or `{}` if there is only an evaluator, since the Trainer refuses `None`.
        """
        named = ranking_evaluator if isinstance(ranking_evaluator, dict) else {"": ranking_evaluator}
        self.evaluators = {f"{name}_" if name else "": part for name, part in named.items() if part is not None}
        return {} if eval_dataset is None and self.evaluators else eval_dataset

    def ranking_names(self) -> list[str] | None:
        """Names of the metrics of the ranking evaluators; `None` if one is a callable that may return any."""
        if not all(hasattr(evaluator, "metric_names") for evaluator in self.evaluators.values()):
            return None
        return [f"{prefix}{name}" for prefix, part in self.evaluators.items() for name in part.metric_names]

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """TRL's evaluation, plus the metrics of `ranking_evaluator`."""
        # The Trainer calls this method again for each named set, which must not rank.
        evaluators, self.evaluators = self.evaluators, {}
        try:
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self.evaluators = evaluators
        for prefix, evaluator in evaluators.items():
            values = self.on_gathered_weights(evaluator)
            ranking = {f"{metric_key_prefix}_{prefix}{name}": value for name, value in values.items()}
            self.log(dict(ranking))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, ranking)
            metrics |= ranking
        return metrics

    def _run_epoch(self, *args, **kwargs):
        """An epoch of training; nothing if the run is complete, where the Trainer would take another step."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def log_means(self, metrics: dict[str, SumAndCount]) -> None:
        """
        Add means over the batches of all processes to TRL's log; a mean of no terms is left out.

        Every process must pass the same names, also with a count of 0: the processes add up their values together.
        """
        values = [value for pair in metrics.values() for value in pair]
        options = {"dtype": torch.float32, "device": self.accelerator.device}
        local = torch.stack([torch.as_tensor(value, **options).detach() for value in values])  # (2 · metrics,)
        sums = self.accelerator.reduce(local, "sum").view(-1, 2).tolist()
        mode = "train" if self.model.training else "eval"
        for name, (total, count) in zip(metrics, sums, strict=True):
            if count > 0:
                self._metrics[mode][name].append(total / count)

    def save_processor(self, folder: str) -> None:
        """Save the processor or, if the trainer has a tokenizer only, the catalogue."""
        part = self.catalog if self.processor is None else self.processor
        if part is not None:
            part.save_pretrained(folder)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            if isinstance(self.model, PeftModel):  # a whole model writes its own
                write_checksums(folder, ADAPTER_FILES)
            self.save_processor(folder)

    def _save_rng_state(self, output_dir):
        """Save the last part that every process writes; then the files are complete, and the main one hashes them."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal_checkpoint(output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save a checkpoint that the next stage, evaluation and serving load, and push it if `push_to_hub` is set.

        With LoRA the weights are merged, and the adapter alone is saved to `adapter/`. The model in memory keeps its
        adapter. Checkpoints of a running training (`_internal_call`) have the adapter only.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        self.save_complete(output_dir or self.args.output_dir)
        if self.args.push_to_hub:
            self.upload("Model save")

    def save_complete(self, folder: str) -> None:
        """Save what [`~LasarTrainerMixin.save_model`] saves, without pushing it."""
        if isinstance(self.model, PeftModel):
            super().save_model(os.path.join(folder, ADAPTER), _internal_call=True)
            if self.is_world_process_zero():
                merged = copy.deepcopy(self.model).merge_and_unload()
                merged.save_pretrained(folder)
                self.processing_class.save_pretrained(folder)
                self.save_processor(folder)
            self.accelerator.wait_for_everyone()
        else:
            super().save_model(folder, _internal_call=True)
        if os.path.abspath(folder) == os.path.abspath(self.args.output_dir):
            self.create_model_card()

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """
        Save the model to `output_dir` and upload it with its code, prompt format, catalogue and card; with LoRA, the
        merged weights and the adapter. Arguments as for [`~transformers.Trainer.push_to_hub`].
        """
        self.save_complete(self.args.output_dir)
        if kwargs:
            self.create_model_card(**kwargs)
        return self.upload(commit_message, blocking, token, revision, private)

    def upload(
        self,
        commit_message: str,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ):
        """Upload the files of `output_dir` that are shared, in one commit, from the main process."""
        if not self.is_world_process_zero():
            return None
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        return HfApi(token=token).create_commit(
            self.hub_model_id,
            commit_operations(self.args.output_dir),
            commit_message=commit_message,
            revision=revision or self.args.hub_revision,
            run_as_future=not blocking,
        )

    @cached_property
    def start_card(self) -> ModelCard | None:
        """The card of the checkpoint that the run began with, if that is a recommender with a card."""
        name = self.card_facts.start or unwrap_lasar(self.model).config._name_or_path
        card = find_card(name, self.card_facts.revision)
        return card if card is not None and "lasar" in (card.data.tags or ()) else None

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """
        Write `README.md`, see [`~lasar_hf.card.model_card`], from this run, `card_facts` and the card of the
        checkpoint that it began with. TRL's own method looks for templates inside TRL.

        Args:
            model_name (`str`, *optional*):
                Name of the model. Defaults to the name of `output_dir`. With `push_to_hub` it is the id on the Hub.
            dataset_name (`str` or `list[str]`, *optional*):
                Hub ids of the data sets, or another name. Defaults to `args.dataset`.
            tags (`str` or `list[str]`, *optional*):
                More tags.
        """
        if not self.is_world_process_zero():
            return
        facts, config = self.card_facts, unwrap_lasar(self.accelerator.unwrap_model(self.model)).config
        base_model = hub_name(facts.start or config._name_or_path)
        if base_model is None and self.start_card is None:
            base_model = hub_name(config.backbone_config._name_or_path)
        datasets, tags = ([part] if isinstance(part, str) else part or [] for part in (dataset_name, tags))
        stage = training_text(
            self._description,
            self.args,
            self.state,
            self.loss_terms(),
            [name for name in self.args.to_dict() if name not in (*FREE, *LENGTH)],
            facts,
            self.accelerator.num_processes,
            isinstance(self.model, PeftModel),
        )
        name = self.hub_model_id or model_name or os.path.basename(os.path.abspath(self.args.output_dir))
        card = model_card(
            name,
            config,
            self.catalog,
            self.processor,
            facts.data_card,
            ", ".join(datasets) or self.args.dataset,
            self.args.license,
            base_model,
            [name for name in datasets if hub_name(name)],
            [*self._tag_names, *tags],
            {facts.title or self._title: stage},
            self.start_card,
        )
        save_card(card, self.args.output_dir)
