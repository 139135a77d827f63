"""
Add items to the catalogue of a trained model: nothing is fitted again, and the old items keep their Semantic IDs.

    python recipes/add_items.py --items new.jsonl --data_dir outputs/toy/data --checkpoint outputs/toy/stage2

The items are embedded by their text as the prepared ones were (by their id where they have none) and get the nearest
Semantic IDs that are free; their codes say nothing of co-occurrence, which they have none of. Ids that the catalogue
has, removed ones too, are passed over: a second run does nothing. The catalogue is written beside the old one, and two
files then take their places; a run that is killed between them is finished by the next. `recommend.py` reads the
extended catalogue; to train on or evaluate later, which is done on the items of `data_dir`, extend a copy of the
checkpoint.
"""

import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from trl import TrlParser

from lasar_hf import SidCatalog
from lasar_hf.arguments import read_json_object
from lasar_hf.data.interactions import TEXT_FIELDS, item_fields
from lasar_hf.data.readers import check_text_columns, cleaned, without_markup
from lasar_hf.data.tables import id_text, read_batches
from lasar_hf.model.catalog_lasar import CATALOG_CONFIG_NAME, CATALOG_WEIGHTS_NAME
from lasar_hf.semantic_ids import ItemEncoder, ResidualKMeans, assign_new_items


logger = logging.getLogger(__name__)


@dataclass
class AddItemsArguments:
    """Which items to add to which catalogue."""

    items: list[str] = field(metadata={"help": "Files of the new items (.csv, .parquet, .jsonl, …)."})
    data_dir: str = field(metadata={"help": "Folder that recipes/prepare.py wrote, on which the model was trained."})
    checkpoint: str = field(metadata={"help": "Folder of the trained model, whose catalogue is extended."})
    item_column: str = field(default="item_id", metadata={"help": "Column of the item's id."})
    text_columns: dict | str | None = field(
        default=None,
        metadata={"help": 'Columns of the text, such as {"title": "name"}; those of the usual names if not given.'},
    )
    strip_markup: bool = field(
        default=False, metadata={"help": "Take HTML out of the text, as prepare.py does with Amazon's files."}
    )

    def __post_init__(self):
        read_json_object(self, "text_columns")
        check_text_columns(self.text_columns)


def read_items(args: AddItemsArguments) -> dict[str, dict[str, str]]:
    """From the id of each item of the files to its fields; the first row of an id counts."""
    columns = args.text_columns or {name: name for name in TEXT_FIELDS}
    needed, optional = (columns.values(), ()) if args.text_columns else ((), columns.values())
    clean = without_markup if args.strip_markup else str
    items = {}
    for path in args.items:
        for start, batch in read_batches(path, [args.item_column, *needed], [*optional]):
            for row, item_id in enumerate(map(id_text, batch[args.item_column])):
                if item_id is None:
                    raise ValueError(f"{path}: row {start + row} has no {args.item_column}.")
                if item_id not in items:
                    raw = {name: cleaned(batch[column][row], clean) for name, column in columns.items()}
                    items[item_id] = item_fields(raw) | {"item_id": item_id}
    return items


def load_quantizer(data_dir: Path) -> tuple[ItemEncoder, ResidualKMeans]:
    """How the prepared items got their codes. Raises where new items cannot get theirs so."""
    if not (data_dir / "catalog").is_dir():
        raise FileNotFoundError(f"{data_dir} holds no catalogue: give the folder that recipes/prepare.py wrote.")
    if not (data_dir / "quantizer").is_dir():
        raise ValueError(
            f"{data_dir} holds no quantizer, its Semantic IDs are a ready-made index: give the new items theirs by "
            "SidCatalog.add."
        )
    encoder = ItemEncoder.from_pretrained(data_dir / "item_encoder")
    if "text" not in json.loads((data_dir / "semantic_ids.json").read_text(encoding="utf-8"))["views"]:
        raise ValueError(
            f"The Semantic IDs in {data_dir} come from co-occurrence alone, which new items have none of: prepare the "
            "items with text."
        )
    return encoder, ResidualKMeans.from_pretrained(data_dir / "quantizer")


def check_extends(catalog: SidCatalog, folder: Path, base: SidCatalog, base_folder: Path) -> None:
    """Rows stand for ever: a catalogue that grew out of another begins with its rows."""
    rows = len(base)
    if catalog.item_ids[:rows] != base.item_ids or not catalog.codes[:rows].equal(base.codes):
        raise ValueError(
            f"The catalogue in {folder} does not continue the one in {base_folder}: name the data that the checkpoint "
            "was trained on."
        )


def extend(catalog: SidCatalog, items: dict[str, dict], encoder: ItemEncoder, quantizer: ResidualKMeans) -> SidCatalog:
    """The catalogue with the items, at the nearest Semantic IDs that no row has, hidden ones included."""
    vectors = encoder.encode(list(items.values()))
    nameless = sum(set(item) == {"item_id"} for item in items.values())
    if nameless:
        logger.warning(
            "%d of %d items have no text and are embedded by their id; text_columns names columns of other names.",
            nameless, len(items),
        )  # fmt: skip
    unknown = int((~vectors.any(axis=1)).sum())
    if unknown:
        logger.warning("%d of %d items have no word in common with the catalogue's.", unknown, len(items))
    known = quantizer.first_columns(vectors.shape[1])
    taken = np.unique(catalog.codes.numpy(), axis=0)  # hidden rows may have had theirs given away
    codes = assign_new_items(taken, known, vectors)
    moved = int((codes != known.encode(vectors)).any(axis=1).sum())
    logger.info("%d items added, %d of them beside the nearest Semantic ID, which was taken.", len(items), moved)
    return catalog.add(codes, list(items))


def write_catalog(catalog: SidCatalog, folder: Path) -> None:
    """Replace the catalogue of a folder. It is written beside first, so that nothing but two moves is left."""
    scratch = folder / ".catalog.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    catalog.save_pretrained(scratch)
    os.replace(scratch, folder / ".catalog")
    finish_writing(folder)


def finish_writing(folder: Path) -> None:
    """Move a catalogue that lies whole beside the old one to its place, or the rest of it."""
    for name in (CATALOG_WEIGHTS_NAME, CATALOG_CONFIG_NAME):
        if (folder / ".catalog" / name).exists():
            os.replace(folder / ".catalog" / name, folder / name)
    (folder / ".catalog").rmdir()


def recover(folder: Path) -> None:
    """After a run that was killed: finish it if one of the two files was moved, else forget what it wrote."""
    if (folder / ".catalog").is_dir():
        if (folder / ".catalog" / CATALOG_WEIGHTS_NAME).exists():  # the catalogue may have changed since
            shutil.rmtree(folder / ".catalog")
        else:
            finish_writing(folder)


def main(args: AddItemsArguments) -> None:
    """Add the items that the catalogue does not have."""
    data_dir, checkpoint = Path(args.data_dir), Path(args.checkpoint)
    recover(checkpoint)
    encoder, quantizer = load_quantizer(data_dir)
    items = read_items(args)
    catalog, base = SidCatalog.from_pretrained(checkpoint), data_dir / "catalog"
    check_extends(catalog, checkpoint, SidCatalog.from_pretrained(base), base)
    new = {item_id: item for item_id, item in items.items() if item_id not in catalog.index_of}
    if len(new) < len(items):
        logger.info("%d items passed over: the catalogue has them already.", len(items) - len(new))
    if new:
        write_catalog(extend(catalog, new, encoder, quantizer), checkpoint)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(*TrlParser((AddItemsArguments,)).parse_args_and_config())
