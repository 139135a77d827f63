"""The layers of the package: each module imports from its own folder or from layers below it."""

import ast
import sys
from pathlib import Path

import pytest


PACKAGE = Path(__file__).resolve().parents[1] / "lasar_hf"

# From bottom to top. A name is a folder or a file of the package.
LAYERS = [
    ["model"],
    ["files", "arguments", "terminal"],
    ["locks", "steps"],
    ["processes"],
    ["data"],
    ["semantic_ids"],
    ["onednn"],
    ["reasoning"],
    ["evaluation"],
    ["card"],
    ["trainers"],
    ["__init__"],  # the public names
    ["serving"],
    ["commands"],
    ["__main__"],
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}

# This folder is copied next to the weights of every checkpoint. What transformers itself needs may be imported.
MODEL_DEPENDENCIES = {"torch", "transformers", "safetensors", "numpy", "huggingface_hub"}
# Imported in a `try`, where transformers does not ask for it when it loads the code of a checkpoint.
OPTIONAL_DEPENDENCIES = {"matplotlib"}

MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 600


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Absolute names of all imported modules, relative imports resolved, wherever in the file they are."""
    package = ["lasar_hf", *path.relative_to(PACKAGE).parts[:-1]]
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            # `from . import x` imports the module x.
            names += [f"{base}.{alias.name}" for alias in node.names] if node.module is None else [base]
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    layer = layer_of(path)
    assert layer in HEIGHT, f"add {layer} to LAYERS"
    for name in imports(path):
        if name.split(".")[0] != "lasar_hf":
            continue
        part = name.split(".")[1]
        imported = part if part in HEIGHT else "__init__"
        assert imported == layer or HEIGHT[imported] < HEIGHT[layer], f"imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").glob("*.py")), ids=lambda path: path.name)
def test_model_folder_stands_alone(path):
    for name in imports(path):
        root = name.split(".")[0]
        is_own = name.startswith("lasar_hf.model.") and name.count(".") == 2
        allowed = MODEL_DEPENDENCIES | OPTIONAL_DEPENDENCIES | sys.stdlib_module_names
        assert is_own or root in allowed, f"imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
