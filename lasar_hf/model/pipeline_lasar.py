"""The pipeline of a checkpoint: `pipeline("generative-recommendation", model=id, trust_remote_code=True)`."""

import os
from collections.abc import Iterable

from transformers import Pipeline

from .recommender_lasar import Recommender, is_history


class GenerativeRecommendationPipeline(Pipeline):
    """
    Recommends items of the checkpoint's catalogue.

    Input is the history of one user, a list of item ids or titles, or a list of histories. Output is the dictionary of
    [`Recommender.recommend`], or a list of them; its other arguments, such as `top_k`, can be given here or for each
    call. The checkpoint's item memory is used, if it has one.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> recommend = pipeline("generative-recommendation", model="outputs/quickstart/model", trust_remote_code=True)
    >>> recommend(["item-0", "item-1", "item-2"], top_k=1)
    {'items': [{'item_id': 'item-3', 'title': 'Marble Canyon Almanac, Volume Four', 'score': -0.055}],
     'latent_steps': 2}
    ```
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.recommender = Recommender(self.model, self.processor, self.model.memory)

    def __call__(self, histories: Iterable, **options) -> dict | list[dict]:
        """One history or several. `options` as for [`Recommender.recommend`]."""
        if isinstance(histories, str) or not isinstance(histories, Iterable):
            raise ValueError(f"The history is {histories!r}; expected a list of item ids or titles.")
        histories = list(histories)
        is_one = is_history(histories)
        options = self._forward_params | options
        results = self.recommender.recommend([histories] if is_one else histories, **options)
        return results[0] if is_one else results

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save the checkpoint, as [`Recommender.save_pretrained`]. The base class would leave parts out."""
        self.recommender.save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Upload the checkpoint, as [`Recommender.push_to_hub`]."""
        return self.recommender.push_to_hub(repo_id, **kwargs)

    # The base class asks for these parts of a call. They do the same for one history.

    def _sanitize_parameters(self, **options):
        return {}, options, {}

    def preprocess(self, history):
        return {"history": history}

    def _forward(self, inputs, **options):
        return self.recommender.recommend([inputs["history"]], **options)[0]

    def postprocess(self, result):
        return result


__all__ = ["GenerativeRecommendationPipeline"]
