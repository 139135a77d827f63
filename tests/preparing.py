"""Running `recipes/prepare.py` in tests: the recipe as a module, small settings, and what its folder holds."""

import importlib.util
from pathlib import Path
from types import ModuleType

from transformers import AutoTokenizer

from lasar_hf.data import LasarProcessor, PreparedData, SourceArguments
from lasar_hf.model.configuration_lasar import CONTROL_TOKENS, sid_tokens


RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "prepare.py"
SMALL = {"codebook_size": 8, "text_dim": 8, "collaborative_dim": 4, "max_latent_steps": 4, "tokenizer_size": 300}
ALL = ["interactions", "split", "embeddings", "semantic_ids", "chains", "segments", "tokenizer", "samples", "card"]


def load_recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe = load_recipe()


def run(folder: Path, source: str | Path = "toy", **arguments: object) -> list[str]:
    """Prepare; returns the names of the steps that ran."""
    names = set(SourceArguments.__dataclass_fields__)
    if source == "toy":
        arguments = {"toy_users": 30, "toy_items": 48} | arguments
    from_source = {name: value for name, value in arguments.items() if name in names}
    rest = SMALL | {name: value for name, value in arguments.items() if name not in names}
    return recipe.prepare(
        recipe.PrepareArguments(output_dir=str(folder), **rest), SourceArguments(str(source), **from_source)
    )


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, to the byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def processor_of(folder: Path, data: PreparedData, max_history: int = 50) -> LasarProcessor:
    """The processor that training would use, with the fitted tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokens = [*CONTROL_TOKENS, *sid_tokens(data.codes.shape[1], data.codebook_size)]
    tokenizer.add_special_tokens({"extra_special_tokens": tokens})
    return LasarProcessor(tokenizer, data.codes, max_history=max_history)
