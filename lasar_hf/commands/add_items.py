"""
Add items to the catalogue of a trained model. Nothing is fitted again, and existing items keep their Semantic IDs.

New items are embedded by their text, or by their id if they have none, and get the nearest free Semantic IDs. Items
that the catalogue already has, including removed ones, are skipped. `recommend.py` reads the extended catalogue.
Training and evaluation use the items of `data_dir`, so extend a copy of the checkpoint if you need it for these later.
"""

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..arguments import read_json_object
from ..data import read_items
from ..files import read_json
from ..locks import locked
from ..model.catalog_lasar import SidCatalog
from ..semantic_ids import ItemEncoder, Quantizer, assign_new_items, load_quantizer
from ..steps import check_outputs
from .parser import ScriptParser


logger = logging.getLogger(__name__)

COPY = ".new_catalog"  # folder in the checkpoint that exists while its catalogue is written


@dataclass
class AddItemsArguments:
    """Arguments for adding items."""

    items: list[str] = field(metadata={"help": "Files of the new items (.csv, .parquet, .jsonl, …)."})
    data_dir: str = field(metadata={"help": "Folder written by recipes/prepare.py, used to train the model."})
    checkpoint: str = field(metadata={"help": "Folder of the trained model, whose catalogue is extended."})
    item_column: str = field(default="item_id", metadata={"help": "Column of the item ids."})
    text_columns: dict | str | None = field(
        default=None,
        metadata={"help": 'Text columns if their names differ from the fields, such as {"title": "name"}.'},
    )
    strip_markup: bool = field(
        default=False, metadata={"help": "Remove HTML from the text, as prepare.py does for Amazon's files."}
    )

    def __post_init__(self):
        read_json_object(self, "text_columns")


def load_encoder(data_dir: Path) -> tuple[ItemEncoder, Quantizer]:
    """The item encoder and the quantizer of the prepared data."""
    if not (data_dir / "catalog").is_dir():
        raise FileNotFoundError(f"{data_dir / 'catalog'} not found; data_dir must be written by recipes/prepare.py.")
    if not (data_dir / "quantizer").is_dir():
        raise ValueError(
            f"{data_dir} has no quantizer because its Semantic IDs are a ready-made index; add the new items with "
            "SidCatalog.add."
        )
    encoder = ItemEncoder.from_pretrained(data_dir / "item_encoder")
    if "text" not in read_json(data_dir / "semantic_ids.json")["views"]:
        raise ValueError(
            f"The Semantic IDs in {data_dir} come from co-occurrence alone, which new items do not have; prepare the "
            "data from items with text."
        )
    return encoder, load_quantizer(data_dir)


def load_catalog(checkpoint: Path) -> SidCatalog:
    """The catalogue of the checkpoint. If a run was killed while writing it, finish from the copy and tidy up."""
    try:
        catalog = SidCatalog.from_pretrained(checkpoint)
    except FileNotFoundError:
        if not (checkpoint / COPY).is_dir():
            raise
        catalog = SidCatalog.from_pretrained(checkpoint / COPY)
        catalog.save_pretrained(checkpoint)
    shutil.rmtree(checkpoint / COPY, ignore_errors=True)
    return catalog


def write_catalog(catalog: SidCatalog, checkpoint: Path) -> None:
    """Write a copy first, so that there is a complete catalogue at any moment."""
    catalog.save_pretrained(checkpoint / COPY)
    catalog.save_pretrained(checkpoint)
    shutil.rmtree(checkpoint / COPY)


def extend(catalog: SidCatalog, items: dict[str, dict], encoder: ItemEncoder, quantizer: Quantizer) -> SidCatalog:
    """The catalogue with the new items."""
    # 1. Embed the items.
    vectors = encoder.encode([item | {"item_id": item_id} for item_id, item in items.items()])  # (N, D)
    if without_text := sum(not item for item in items.values()):
        logger.warning(
            "%d of %d items have no text and are embedded by their id; set text_columns if the text is in columns of "
            "other names.", without_text, len(items),
        )  # fmt: skip
    if unknown := int((~vectors.any(axis=1)).sum()):
        logger.warning("%d of %d items have no word in common with the catalogue's.", unknown, len(items))
    # 2. Assign free Semantic IDs. Those of removed items are not free.
    quantizer = quantizer.first_columns(vectors.shape[1])
    codes = assign_new_items(np.unique(catalog.codes.numpy(), axis=0), quantizer, vectors)  # (N, M)
    moved = int((codes != quantizer.encode(vectors)).any(axis=1).sum())
    logger.info("%d items added; for %d of them the nearest Semantic ID was not free.", len(items), moved)
    return catalog.add(codes, list(items), [item.get("title") for item in items.values()])


def main(args: AddItemsArguments) -> None:
    """Add the items that the catalogue does not have."""
    if not Path(args.checkpoint).is_dir():
        raise FileNotFoundError(f"checkpoint is {args.checkpoint}, which is not a folder.")
    with locked(args.checkpoint):
        extend_checkpoint(args)


def extend_checkpoint(args: AddItemsArguments) -> None:
    """Extend the catalogue of a checkpoint to which no other command writes."""
    data_dir, checkpoint = Path(args.data_dir), Path(args.checkpoint)
    check_outputs(data_dir, ("catalog", "item_encoder", "quantizer", "semantic_ids.json"))
    encoder, quantizer = load_encoder(data_dir)
    items = read_items(args.items, args.item_column, args.text_columns, args.strip_markup)  # type: ignore[arg-type]
    catalog, base = load_catalog(checkpoint), SidCatalog.from_pretrained(data_dir / "catalog")
    if catalog.item_ids[: len(base)] != base.item_ids or not catalog.codes[: len(base)].equal(base.codes):
        raise ValueError(
            f"The catalogue in {checkpoint} does not extend the one in {data_dir}; pass the data_dir of its training."
        )
    new_items = {item_id: item for item_id, item in items.items() if item_id not in catalog.index_of}
    if len(new_items) < len(items):
        logger.info("%d items skipped; the catalogue already has them.", len(items) - len(new_items))
    if new_items:
        write_catalog(extend(catalog, new_items, encoder, quantizer), checkpoint)


def run() -> None:
    """Run the command with the arguments of the command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(*ScriptParser((AddItemsArguments,), __doc__).parse_args_and_config())


if __name__ == "__main__":
    run()
