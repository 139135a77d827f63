"""Reasoning supervision: teachers that write chains of thought, the leak check, segments and semantic anchors."""

from .anchor_encoding import encode_anchors
from .anchors import AnchorStore, checkpoint_hash
from .segments import Segmenter, segment, tfidf_embedder
from .template_teacher import TemplateTeacher


__all__ = [
    "AnchorStore",
    "Segmenter",
    "TemplateTeacher",
    "checkpoint_hash",
    "encode_anchors",
    "segment",
    "tfidf_embedder",
]
