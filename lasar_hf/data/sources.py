"""Where interactions come from: the arguments of `recipes/prepare.py` that name a source, and the reading of each."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..arguments import read_json_object
from ..files import file_hash
from .interactions import Interactions, read_lcrec
from .readers import read_amazon, read_table
from .toy import toy_shop


AMAZON_2023 = "McAuley-Lab/Amazon-Reviews-2023"


@dataclass
class SourceArguments:
    """Which data to read, and how."""

    source: str = field(
        metadata={
            "help": "`toy`, `table` (your own files), `amazon2018`, `amazon2023`, or a folder with <Name>.inter.json "
            "and <Name>.item.json."
        }
    )
    interactions: list[str] | None = field(
        default=None,
        metadata={"help": "table, amazon2018 and amazon2023: files of interactions (.csv, .parquet, .jsonl, …)."},
    )
    items: list[str] | None = field(
        default=None, metadata={"help": "table, amazon2018 and amazon2023: files of the items' text, if any."}
    )
    category: str | None = field(
        default=None, metadata={"help": f"amazon2023 without files: category to fetch from {AMAZON_2023} on the Hub."}
    )
    revision: str = field(default="main", metadata={"help": "Revision of the Hub data set; a commit pins it."})
    user_column: str = field(default="user_id", metadata={"help": "table: column of the user."})
    item_column: str = field(default="item_id", metadata={"help": "table: column of the item, in both files."})
    time_column: str | None = field(
        default="timestamp", metadata={"help": "table: column of the time; empty when the rows are in order already."}
    )
    text_columns: dict | str | None = field(
        default=None, metadata={"help": 'table: columns of the text fields, such as {"title": "name"}.'}
    )
    k_core: int = field(default=5, metadata={"help": "table and amazon: fewest interactions of a user or item."})
    keep_repeats: bool = field(default=False, metadata={"help": "table: whether a user may take an item again."})
    toy_users: int = field(default=600, metadata={"help": "toy: users."})
    toy_items: int = field(default=192, metadata={"help": "toy: items."})

    def __post_init__(self):
        read_json_object(self, "text_columns")


def read_source(args: SourceArguments, seed: int = 0) -> Interactions:
    """
    Read the source that the arguments name.

    Args:
        args (`SourceArguments`):
            The arguments.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the toy shop.

    Raises:
        FileNotFoundError: `source` is neither a name nor a folder, or a file is missing.
        ValueError: arguments that the source does not have or lacks, and what its reader raises.
    """
    _check(args)
    if args.source == "toy":
        return toy_shop(args.toy_users, args.toy_items, seed)
    if args.source == "table":
        return read_table(
            args.interactions, args.items, user_column=args.user_column, item_column=args.item_column,
            time_column=args.time_column or None, text_columns=args.text_columns, k_core=args.k_core,
            keep_repeats=args.keep_repeats,
        )  # fmt: skip
    if args.source in ("amazon2018", "amazon2023"):
        reviews, metadata = (args.interactions, args.items) if args.interactions else _hub_files(args)
        return read_amazon(reviews, metadata, version=int(args.source[-4:]), k_core=args.k_core)
    return read_lcrec(args.source)


def source_settings(args: SourceArguments, seed: int = 0) -> dict[str, object]:
    """
    All that decides what `read_source` returns, ready for JSON: the arguments that the source uses, and a hash of each
    file. Files of the Hub are told by their revision.

    Raises:
        FileNotFoundError, ValueError: as `read_source`.
    """
    _check(args)
    if args.source == "toy":
        return {"source": "toy", "users": args.toy_users, "items": args.toy_items, "seed": seed}
    if args.source == "table":
        names = ("source", "user_column", "item_column", "time_column", "text_columns", "k_core", "keep_repeats")
        settings = {name: asdict(args)[name] for name in names}
    elif args.source in ("amazon2018", "amazon2023"):
        settings = {"source": args.source, "k_core": args.k_core}
        if not args.interactions:
            return settings | {"category": args.category, "revision": args.revision}
    else:
        files = sorted(path for end in ("inter", "item") for path in Path(args.source).glob(f"*.{end}.json"))
        return {"source": "lcrec", "files": {path.name: file_hash(path) for path in files}}
    hashes = {name: [file_hash(path) for path in getattr(args, name) or ()] for name in ("interactions", "items")}
    return settings | hashes


def _check(args: SourceArguments) -> None:
    """Refuse arguments that the source would pass over in silence, and a source that lacks one."""
    tables = args.source in ("table", "amazon2018", "amazon2023")
    if not tables and args.source != "toy" and not Path(args.source).is_dir():
        raise FileNotFoundError(
            f"source {args.source!r} is no folder: give toy, table, amazon2018, amazon2023, or the folder of "
            "an LC-Rec data set."
        )
    if not tables and (args.interactions or args.items):
        raise ValueError(f"`interactions` and `items` belong to table and amazon, not to source {args.source!r}.")
    if args.category is not None and (args.source != "amazon2023" or args.interactions):
        raise ValueError("`category` fetches amazon2023 from the Hub: leave it out with files or another source.")
    if tables and not args.interactions and (args.source != "amazon2023" or args.category is None):
        more = ", or `category` for the Hub" if args.source == "amazon2023" else ""
        raise ValueError(f"source {args.source!r} needs `interactions`: files of interactions{more}.")
    for path in (args.interactions or []) + (args.items or []):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: there is no such file.")


def _hub_files(args: SourceArguments) -> tuple[str, str]:
    """Reviews (5-core, ids and times only) and metadata of one category, from the cache or the Hub."""
    from huggingface_hub import hf_hub_download  # only this source needs the network

    names = (f"benchmark/5core/rating_only/{args.category}.csv", f"raw/meta_categories/meta_{args.category}.jsonl")
    return tuple(hf_hub_download(AMAZON_2023, name, repo_type="dataset", revision=args.revision) for name in names)
