"""The model card of a run. TRL looks up templates inside its own package, so a subclass elsewhere cannot use them."""

import os

from huggingface_hub import ModelCard, ModelCardData

from ..files import atomic_file


WITH_PROCESSOR = """from transformers import AutoModel, AutoProcessor

processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
history = processor.catalog.item_ids[:3]
output = model.recommend(**processor([history]), catalog=processor.catalog)
print(processor.decode_recommendations(output)[0])"""

WITH_TOKENIZER = """from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}", trust_remote_code=True)"""


def save_model_card(trainer, model_name: str | None, tags: list[str], description: str) -> None:
    """Write `README.md` to the trainer's `output_dir`, with metadata, usage and the main arguments of the run."""
    if not trainer.is_world_process_zero():
        return
    name = model_name or os.path.basename(os.path.normpath(trainer.args.output_dir))
    data = ModelCardData(library_name="transformers", tags=sorted(tags), pipeline_tag="text-generation")
    usage = (WITH_TOKENIZER if trainer.processor is None else WITH_PROCESSOR).format(name=name)
    arguments = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "seed")
    rows = "\n".join(f"| {argument} | {getattr(trainer.args, argument)} |" for argument in arguments)
    text = f"""---
{data.to_yaml()}
---

# {name}

{description}

```python
{usage}
```

| argument | value |
|---|---|
{rows}
"""
    with atomic_file(os.path.join(trainer.args.output_dir, "README.md")) as temporary:
        ModelCard(text).save(temporary)
