"""LoRA for any backbone: which layers are adapted, which weights are trained in full, and how both are saved."""

import os

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from ..model.files_lasar import check_files
from ..model.modeling_lasar import LasarForGenerativeRec
from .model_config import LasarModelConfig


ADAPTER_FILES = "adapter_model*.safetensors"


def lasar_lora_config(
    model: LasarForGenerativeRec,
    r: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.05,
    target_modules: str | list[str] = "all-linear",
    **kwargs,
) -> LoraConfig:
    """
    LoRA configuration for `peft_config` of the trainers or for `peft.get_peft_model`.

    The backbone's linear layers get adapters of rank `r`. The depth policy head, the weights of
    `latent_input="normalized"` and the token rows of Semantic IDs and control tokens, in the embeddings and in a head
    that is not tied to them, are trained in full.

    Args:
        model ([`LasarForGenerativeRec`]):
            The model to adapt.
        target_modules (`str` or `list[str]`, *optional*, defaults to `"all-linear"`):
            Names of the backbone's layers to adapt, for example `["q_proj", "v_proj"]`.
        r, lora_alpha, lora_dropout, kwargs:
            As for [`~peft.LoraConfig`].
    """
    # 1. Names of the layers to adapt.
    parts = model.model.backbone.named_modules()
    linear = {name.split(".")[-1] for name, module in parts if isinstance(module, nn.Linear)}
    if target_modules == "all-linear":
        names = linear
    else:
        names = {target_modules} if isinstance(target_modules, str) else set(target_modules)
    if names - linear:
        raise ValueError(
            f"target_modules contains {sorted(names - linear)}; expected some of the backbone's linear layers "
            f"{sorted(linear)}."
        )
    # 2. Token rows to train, and the modules that contain them.
    token_ids = _new_token_ids(model)
    embeddings = model.get_input_embeddings()
    token_modules = [name for name, module in model.named_modules() if module is embeddings]
    if model.lm_head.weight is not embeddings.weight:
        token_modules.append("lm_head")
    modules = ["policy_head"] + ["latent_input"] * (model.config.latent_input == "normalized")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        # The path excludes the policy head, whose linear layers have the same names as those of some backbones.
        target_modules=rf"model\.backbone\..*\.({'|'.join(sorted(names))})",
        trainable_token_indices={name: list(token_ids) for name in token_modules},
        modules_to_save=modules,
        **kwargs,
    )


def _new_token_ids(model: LasarForGenerativeRec) -> list[int]:
    """Ids of the Semantic-ID and control tokens, whose rows `from_backbone` draws at random."""
    config = model.config
    control = {config.latent_start_token_id, config.latent_token_id, config.latent_end_token_id}
    return sorted(control | set(range(config.sid_token_offset, config.sid_token_offset + config.num_sid_tokens)))


def check_token_rows(lasar: LasarForGenerativeRec) -> None:
    """Refuse, with a `ValueError`, a model inside any wrappers whose rows of new tokens would stay as drawn."""
    for name, module in (("embeddings", lasar.get_input_embeddings()), ("head weights", lasar.lm_head)):
        is_trained = any(parameter.requires_grad for parameter in module.parameters())
        if isinstance(module, TrainableTokensWrapper):
            adapter = module.token_adapter
            is_trained &= set(_new_token_ids(lasar)) <= set(adapter.token_indices[adapter.active_adapters[0]])
        if not is_trained:
            raise ValueError(
                f"The {name} of Semantic-ID or control tokens, drawn at random by from_backbone, are frozen. Use "
                "peft_config=lasar_lora_config(model), which keeps trained rows too; load with is_trainable=True."
            )


def is_adapter(model: object) -> bool:
    """Whether the model is given as the folder of an adapter."""
    return isinstance(model, str) and os.path.exists(os.path.join(model, "adapter_config.json"))


def load_model(path: str, **kwargs) -> LasarForGenerativeRec | PeftModel:
    """The model of a checkpoint, for training; an adapter's folder gives a [`~peft.PeftModel`] that trains on."""
    kwargs = {"dtype": "float32"} | kwargs  # as in TRL
    if not is_adapter(path):
        return LasarForGenerativeRec.from_pretrained(path, **kwargs)
    check_files(path, ADAPTER_FILES)
    config = PeftConfig.from_pretrained(path)
    base = config.base_model_name_or_path
    if not base:  # as after stage 1
        folder = os.path.dirname(os.path.abspath(path))
        raise ValueError(f"The base model of the adapter in {path} was not saved. Start from the merged {folder}.")
    if config.revision:  # that of the base model; one in `kwargs` is of the adapter
        kwargs["revision"] = config.revision
    return PeftModel.from_pretrained(LasarForGenerativeRec.from_pretrained(base, **kwargs), path, is_trainable=True)


def lora_from_arguments(model: LasarForGenerativeRec | PeftModel, arguments: LasarModelConfig) -> LoraConfig | None:
    """[`lasar_lora_config`] with the arguments of a recipe; `None` without `use_peft`."""
    if not arguments.use_peft:
        return None
    if isinstance(model, PeftModel):
        raise ValueError("use_peft is True, but the model is an adapter, whose training goes on. Leave it out.")
    return lasar_lora_config(
        model,
        arguments.lora_r,
        arguments.lora_alpha,
        arguments.lora_dropout,
        arguments.lora_target_modules or "all-linear",
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
    )


def train_policy_head(lasar: LasarForGenerativeRec, trainable: bool) -> None:
    """
    Train or freeze the policy head of the model inside any wrappers. DDP waits for the gradient of every trainable
    parameter, so a head without a loss must be frozen. Refuses adapters that would not save a trained policy head.
    """
    head = lasar.model.policy_head
    if isinstance(head, ModulesToSaveWrapper):
        head = head.modules_to_save[head.active_adapters[0]]  # PEFT trains and saves a copy
    elif trainable and any(".lora_" in name for name, _ in lasar.named_parameters()):
        raise ValueError(
            "The policy head is trainable but this adapter would not save it. Use "
            "peft_config=lasar_lora_config(model), or add modules_to_save=['policy_head'] to peft_config."
        )
    head.requires_grad_(trainable)


@torch.no_grad()
def complete_reference(model: PeftModel) -> None:
    """
    Copy the token rows that TRL leaves out of its reference adapter: if the model comes with an adapter, TRL copies
    its parameters named `….default.…` to an adapter `ref`, but names of token rows end in `.default`.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name.endswith(".ref"):
            parameter.copy_(parameters[f"{name.removesuffix('.ref')}.default"])
