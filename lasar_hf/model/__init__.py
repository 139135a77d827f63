"""The model. This folder travels with a checkpoint as flat remote code: it imports torch, transformers and itself."""
