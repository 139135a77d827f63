"""Reasoning supervision: teachers that write chains of thought, the leak check, segments and semantic anchors.

`OpenAITeacher` is imported from `lasar_hf.reasoning.openai_teacher`; it needs the `openai` package.
"""

from .anchors import AnchorStore, checkpoint_hash, encode_anchors
from .segments import Segmenter, segment
from .template_teacher import TemplateTeacher


__all__ = ["AnchorStore", "Segmenter", "TemplateTeacher", "checkpoint_hash", "encode_anchors", "segment"]
