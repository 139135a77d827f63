"""What a checkpoint has beside its weights: the catalogue, and the code of pipeline and recommender."""

import os
from contextlib import nullcontext

from safetensors import SafetensorError
from transformers import PreTrainedModel

from .catalog_lasar import SidCatalog
from .files_lasar import checked_files, write_checksums
from .memory_lasar import ItemMemory


# Files of a model, whose checksums are saved with it.
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model*.safetensors.index.json")

# Arguments of `from_pretrained` that say where files come from; they hold for every part of a checkpoint.
HUB_ARGUMENTS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token", "_commit_hash",
)  # fmt: skip


def hub_arguments(kwargs: dict) -> dict:
    """Those of the arguments of a `from_pretrained` that say where files come from."""
    return {name: value for name, value in kwargs.items() if name in HUB_ARGUMENTS}


# Arguments of `save_pretrained` that are for `push_to_hub`, and those that are for both.
PUSH_ARGUMENTS = ("commit_message", "commit_description", "create_pr", "private", "repo_id", "revision")
SHARED_ARGUMENTS = ("max_shard_size", "token")


def push_arguments(save_directory: str | os.PathLike, kwargs: dict) -> dict:
    """
    The arguments of `push_to_hub` among those of a `save_pretrained`, from which those that only pushing needs are
    removed. `repo_id` defaults to the name of the folder.
    """
    hub = {"repo_id": os.path.basename(os.path.abspath(save_directory))}
    hub |= {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if name in kwargs}
    return hub | {name: kwargs[name] for name in SHARED_ARGUMENTS if name in kwargs}


def check_complete(name: str | os.PathLike | None, info: dict) -> None:
    """Refuse, with a `ValueError`, weights that do not fit the configuration; otherwise some would be random."""
    problems = {
        "missing_keys": "lack", "unexpected_keys": "have, in excess,", "mismatched_keys": "have, in another shape,",
    }  # fmt: skip
    for part, problem in problems.items():
        names = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info[part])
        if names:
            raise ValueError(
                f"The weights of {name} {problem} {', '.join(names[:3])}{' …' if names[3:] else ''}. config.json does "
                "not belong to these weights, or a file is incomplete. Save or download the checkpoint again."
            )


class CheckpointMixin(PreTrainedModel):
    """
    Loads a model together with its catalogue and item memory, and saves it with its catalogue.

    Attributes:
        catalog ([`SidCatalog`], *optional*):
            The items of the checkpoint, `None` if it has none. `recommend` uses them by default.
        memory ([`ItemMemory`], *optional*):
            The memory of the checkpoint, `None` if it has none. Its weight in the mixture was fitted to the weights
            of the checkpoint, so a model that is trained further is saved without it.
    """

    catalog: SidCatalog | None = None
    memory: ItemMemory | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        Load a model and, from the same folder or repository, its catalogue and memory. Arguments as for
        [`~transformers.PreTrainedModel.from_pretrained`]; `use_safetensors` defaults to `True`, so that
        pickled weights, which can run code, are refused.

        Raises:
            `ValueError`: if a file is not the one that was saved, weights are missing, in excess or of another shape,
            the configuration lacks token ids, the catalogue is damaged or has other levels or codes than the model,
            or the memory is that of another catalogue.
        """
        kwargs.setdefault("use_safetensors", True)
        hub, name = hub_arguments(kwargs), pretrained_model_name_or_path
        wants_info = kwargs.pop("output_loading_info", False)
        # Other shapes are collected, and refused below by their names.
        options = kwargs | {"output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            with checked_files(name, *MODEL_FILES, **hub) if name is not None else nullcontext():
                model, info = super().from_pretrained(name, *model_args, **options)
                check_complete(name, info)
        except SafetensorError as error:
            raise ValueError(f"The weights of {name} are damaged ({error}). Save or download them again.") from error
        if name is not None:
            model.catalog = SidCatalog.find(name, **hub)
        if model.catalog is not None:
            model.catalog.check_matches(model.config.num_sid_levels, model.config.codebook_size)
            model.memory = ItemMemory.find(name, **hub)
        if model.memory is not None:
            model.memory.check_matches(model.catalog)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory, is_main_process: bool = True, push_to_hub: bool = False, **kwargs):
        """
        Save weights, configuration, their checksums, code and catalogue. Arguments as for
        [`~transformers.PreTrainedModel.save_pretrained`]. Prompt format and memory are saved by their own objects, or
        all together by [`Recommender.save_pretrained`].
        """
        # Relative imports of this file are the code that travels with a checkpoint.
        from .handler import EndpointHandler  # noqa: F401
        from .pipeline_lasar import GenerativeRecommendationPipeline  # noqa: F401

        hub = push_arguments(save_directory, kwargs)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            write_checksums(save_directory, *MODEL_FILES)
            if self.catalog is not None:
                self.catalog.save_pretrained(save_directory)
        if push_to_hub and is_main_process:
            # The base class would upload the files that it wrote itself, without the catalogue.
            self.push_to_hub(**hub)


__all__ = ["CheckpointMixin"]
