"""Running `recipes/prepare.py` in tests: the recipe as a module, small settings, and the files of a folder."""

from pathlib import Path

from transformers import AutoTokenizer

from lasar_hf import LasarProcessor
from lasar_hf.commands import prepare as recipe
from lasar_hf.data import PreparedData
from lasar_hf.model.configuration_lasar import CONTROL_TOKENS, sid_tokens


RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "prepare.py"
SMALL = {"codebook_size": 8, "text_dim": 8, "collaborative_dim": 4, "max_latent_steps": 4, "tokenizer_size": 300}
SHOP = {"num_users": 30, "num_items": 48}
ALL = ["interactions", "embeddings", "semantic_ids", "chains", "segments", "tokenizer", "samples", "card"]


def run(folder: Path, source: str | Path = "toy", source_args: dict | None = None, **arguments: object) -> list[str]:
    """Prepare; returns the names of the steps that ran."""
    if source == "toy" and source_args is None:
        source_args = SHOP
    arguments = SMALL | {"output_dir": str(folder), "source": str(source), "source_args": source_args} | arguments
    return recipe.prepare(recipe.PrepareArguments(**arguments))


def files(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def processor_of(folder: Path, data: PreparedData, max_history: int = 50) -> LasarProcessor:
    """The processor that training would use, with the fitted tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokens = [*CONTROL_TOKENS, *sid_tokens(data.catalog.num_levels, data.codebook_size)]
    tokenizer.add_special_tokens({"extra_special_tokens": tokens})
    return LasarProcessor(tokenizer, data.catalog, max_history=max_history)
