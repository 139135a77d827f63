"""The card that a trainer leaves beside its checkpoints. TRL's own template is found inside the trl package only."""

import os

from huggingface_hub import ModelCard, ModelCardData


def save_model_card(trainer, model_name: str | None, tags: list[str], description: str) -> None:
    """
    Write `README.md` with metadata, usage and the arguments the run was started with.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer, of which the output folder and the arguments are read.
        model_name (`str`, *optional*):
            Name of the model; the output folder's if not given.
        tags (`list[str]`):
            Tags for the Hub.
        description (`str`):
            One sentence on how the model was trained.
    """
    if not trainer.is_world_process_zero():
        return
    name = model_name or os.path.basename(os.path.normpath(trainer.args.output_dir))
    data = ModelCardData(library_name="transformers", tags=sorted(tags), pipeline_tag="text-generation")
    arguments = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "seed")
    rows = "\n".join(f"| {argument} | {getattr(trainer.args, argument)} |" for argument in arguments)
    text = f"""---
{data.to_yaml()}
---

# {name}

{description}

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
```

| argument | value |
|---|---|
{rows}
"""
    path = os.path.join(trainer.args.output_dir, "README.md")
    os.makedirs(trainer.args.output_dir, exist_ok=True)
    ModelCard(text).save(path + ".tmp")
    os.replace(path + ".tmp", path)
