"""Settings of all tests: no network, one thread, an empty cache of examples; and the optional real data."""

import os
import tempfile
from pathlib import Path


# Before any Hugging Face library or torch is imported; child processes inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
CACHE = tempfile.TemporaryDirectory()  # removed when Python ends
os.environ["HF_DATASETS_CACHE"] = CACHE.name

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.teacher_endpoint import endpoint, raw_endpoint  # noqa: E402, F401


torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real interaction data beside the repository. Tests that use it are skipped if it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository (real interaction data)")
    return folder
