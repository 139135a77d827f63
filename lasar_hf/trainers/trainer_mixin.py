"""What both trainers share: the processor beside TRL's tokenizer, metrics, checkpoints and the model card."""

import torch
from transformers import PreTrainedTokenizerBase

from ..model.catalog_lasar import SidCatalog
from ..model.processing_lasar import LasarProcessor
from .model_card import save_model_card


def split_processor(
    processing_class: PreTrainedTokenizerBase | LasarProcessor | None, catalog: SidCatalog | None
) -> tuple[LasarProcessor | None, PreTrainedTokenizerBase | None, SidCatalog | None]:
    """
    The processor, the tokenizer for TRL and the catalogue, each `None` if it was not given. TRL would treat any
    processor as that of a vision model. The arguments are those of a trainer.

    Raises:
        `ValueError`: if `catalog` is not the processor's catalogue.
    """
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


class LasarTrainerMixin:
    """Methods of both trainers, which set `processor`, `catalog`, `_tag_names` and `_description`."""

    def log_means(self, metrics: dict[str, torch.Tensor]) -> None:
        """Add scalars to TRL's log, averaged over the processes; their names must be the same on all of them."""
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            self._metrics[mode][name].append(self.accelerator.gather(value.detach().float()).mean().item())

    def save_processor(self, folder: str) -> None:
        """Save the processor, or the catalogue alone beside a tokenizer, so that the folder is enough to recommend."""
        part = self.catalog if self.processor is None else self.processor
        if part is not None:
            part.save_pretrained(folder)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.save_processor(output_dir or self.args.output_dir)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """Write the card of this package."""
        save_model_card(self, model_name, [*self._tag_names, *(tags or [])], self._description)
