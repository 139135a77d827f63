"""LoRA for any backbone: what to adapt, what to train whole, and saving it for the next stage."""

import os

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import Trainer, TrainingArguments

from ..model.modeling_lasar import LasarForGenerativeRec
from .model_config import LasarModelConfig


def lasar_lora_config(
    model: LasarForGenerativeRec,
    r: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.05,
    target_modules: str | list[str] = "all-linear",
    **kwargs,
) -> LoraConfig:
    """
    LoRA that leaves nothing out that LASAR has to learn.

    Adapters of rank `r` stand on the backbone's linear layers. The rows of the Semantic-ID and control tokens are
    trained whole, in the embeddings and in a head that is not tied to them; so is the depth policy head.

    Args:
        model ([`LasarForGenerativeRec`]):
            The model to adapt.
        r (`int`, *optional*, defaults to `16`):
            Rank of the adapters.
        lora_alpha (`int`, *optional*, defaults to `32`):
            Adapters are scaled by `lora_alpha / r`.
        lora_dropout (`float`, *optional*, defaults to `0.05`):
            Dropout before the adapters.
        target_modules (`str` or `list[str]`, *optional*, defaults to `"all-linear"`):
            Names of the backbone's layers to adapt, `["q_proj", "v_proj"]` for instance.
        kwargs:
            Passed to [`~peft.LoraConfig`].

    Returns:
        [`~peft.LoraConfig`]: for `peft_config` of the trainers or for `peft.get_peft_model`.

    Raises:
        `ValueError`: if the backbone has no linear layer of a name given.
    """
    parts = model.model.backbone.named_modules()
    linear = {name.split(".")[-1] for name, part in parts if isinstance(part, nn.Linear)}
    if target_modules == "all-linear":
        names = linear
    else:
        names = {target_modules} if isinstance(target_modules, str) else set(target_modules)
    if names - linear:
        raise ValueError(
            f"target_modules holds {sorted(names - linear)}, but the backbone's linear layers are {sorted(linear)}."
        )
    config = model.config
    control = {config.latent_start_token_id, config.latent_token_id, config.latent_end_token_id}
    sid = range(config.sid_token_offset, config.sid_token_offset + config.num_sid_tokens)
    rows = sorted(control | set(sid))
    embeddings = model.get_input_embeddings()
    tables = [name for name, part in model.named_modules() if part is embeddings]
    if model.lm_head.weight is not embeddings.weight:
        tables.append("lm_head")
    return LoraConfig(
        task_type="CAUSAL_LM", r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
        # The policy head has linear layers too, and in some backbones of the same names.
        target_modules=rf"model\.backbone\..*\.({'|'.join(sorted(names))})",
        trainable_token_indices={table: list(rows) for table in tables}, modules_to_save=["policy_head"], **kwargs,
    )


def lora_from_arguments(model: LasarForGenerativeRec, arguments: LasarModelConfig) -> LoraConfig | None:
    """
    [`lasar_lora_config`] with the recipe's `use_peft`, `lora_r`, `lora_alpha`, `lora_dropout`, `lora_target_modules`,
    `use_rslora` and `use_dora`.

    Args:
        model ([`LasarForGenerativeRec`]):
            The model to adapt.
        arguments ([`LasarModelConfig`]):
            The recipe's arguments.

    Returns:
        [`~peft.LoraConfig`], or `None` without `use_peft`.
    """
    if not arguments.use_peft:
        return None
    return lasar_lora_config(
        model, arguments.lora_r, arguments.lora_alpha, arguments.lora_dropout,
        arguments.lora_target_modules or "all-linear", use_rslora=arguments.use_rslora, use_dora=arguments.use_dora,
    )


def train_policy_head(lasar: LasarForGenerativeRec, trainable: bool) -> None:
    """
    Let the policy head learn, or freeze it: DDP waits for the gradient of every parameter that wants one.

    Args:
        lasar ([`LasarForGenerativeRec`]):
            The model, inside its wrappers.
        trainable (`bool`):
            Whether the loss gives it a gradient.

    Raises:
        `ValueError`: if the model is adapted and the adapter would not save the policy head.
    """
    head = lasar.model.policy_head
    if isinstance(head, ModulesToSaveWrapper):
        head = head.modules_to_save[head.active_adapters[0]]  # PEFT trains, and saves, a copy
    elif trainable and any(".lora_" in name for name, _ in lasar.named_parameters()):
        raise ValueError(
            "The policy head is to learn, but the adapter would not save it: use "
            "peft_config=lasar_lora_config(model), or add modules_to_save=['policy_head'] to your own."
        )
    head.requires_grad_(trainable)


@torch.no_grad()
def complete_reference(model: PeftModel) -> None:
    """
    Give TRL's reference adapter the token rows that it leaves out.

    For an adapter that was trained before, TRL keeps a frozen copy `ref` as the reference. It copies parameters with
    `.default.` in their name, but the name of trainable token rows ends there.

    Args:
        model ([`~peft.PeftModel`]):
            The policy; without an adapter `ref` nothing happens.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name.endswith(".ref"):
            parameter.copy_(parameters[f"{name.removesuffix('.ref')}.default"])


def save_trained(trainer: Trainer) -> None:
    """
    Save model, tokenizer and catalogue to `output_dir`, whole, so that the next stage can start from them.

    After training with LoRA that is the merged model, and the adapter by itself goes to `output_dir/adapter`.

    Args:
        trainer ([`LasarSFTTrainer`] or [`LasarGRPOTrainer`]):
            The trainer, after training; an adapted model is merged by this.
    """
    folder = trainer.args.output_dir
    if not isinstance(trainer.model, PeftModel):
        trainer.save_model(folder)
        return
    trainer.save_model(os.path.join(folder, "adapter"))
    if trainer.is_world_process_zero():
        trainer.model.merge_and_unload().save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        if trainer.catalog is not None:
            trainer.catalog.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()


def refuse_zero3(model: object, args: TrainingArguments, peft_config: PeftConfig | None) -> None:
    """
    Refuse to train an adapter under ZeRO-3.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            What the trainer was given.
        args ([`~transformers.TrainingArguments`]):
            Its arguments.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter to put on the model.

    Raises:
        `ValueError`: if there is an adapter and ZeRO-3.
    """
    is_adapted = peft_config is not None or isinstance(model, PeftModel)
    if is_adapted and args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        raise ValueError(
            "LoRA under ZeRO-3 needs reentrant checkpointing, in which the latent loop would be wrong: use "
            "recipes/accelerate_configs/zero2.yaml."
        )
