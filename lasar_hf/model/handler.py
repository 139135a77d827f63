"""Entry point of Hugging Face Inference Endpoints. It needs torch and transformers only.

It is saved with every checkpoint. A request is

    {"inputs": ["item-0", "item-1"], "parameters": {"top_k": 3}}

with the item ids or titles of one user, oldest first, or a list of such histories. The answer is that of the
checkpoint's pipeline.
"""

import torch
from transformers import pipeline


class EndpointHandler:
    """
    Recommends with the checkpoint of a folder.

    Args:
        path (`str`):
            Folder of the model repository.
    """

    def __init__(self, path: str = ""):
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        # The code of the repository that this file is part of.
        self.recommend = pipeline(
            "generative-recommendation", model=path or ".", trust_remote_code=True, device=device
        )

    def __call__(self, data: dict) -> dict | list[dict]:
        """
        Answer a request.

        Raises:
            `ValueError`: if there are no `inputs`, or as for [`Recommender.recommend`]. The endpoint answers with
            its text.
        """
        if not isinstance(data.get("inputs"), list):
            raise ValueError('Expected {"inputs": [item ids or titles, oldest first], "parameters": {}}.')
        return self.recommend(data["inputs"], **(data.get("parameters") or {}))
