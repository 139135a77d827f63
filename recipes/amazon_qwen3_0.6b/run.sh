#!/usr/bin/env bash
# All stages of LASAR on Amazon Beauty with Qwen3-0.6B, for GPUs. README.md in this folder names the download. From the
# repository root, with the folder of the download:
#
#     bash recipes/amazon_qwen3_0.6b/run.sh CollisionGenRec/data/Beauty
#     LAUNCH="accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml" bash recipes/…/run.sh …
#
# Each step resumes or is skipped if it is up to date, so the script can be run again at any time.
set -euo pipefail
SOURCE=${1:?usage: run.sh FOLDER (with Beauty.inter.json and Beauty.item.json)}
LAUNCH=${LAUNCH:-accelerate launch --config_file recipes/accelerate_configs/ddp.yaml}

# Semantic IDs from sentence embeddings, chains of thought and their segments -> outputs/beauty/data
python recipes/prepare.py --config recipes/amazon_qwen3_0.6b/prepare.yaml --source "$SOURCE"

# Stage 1: ground the Semantic IDs. The model generates items directly.
$LAUNCH recipes/sft.py --config recipes/amazon_qwen3_0.6b/stage1.yaml

# Stage 2: latent reasoning, aligned with the segments of the chains of thought.
$LAUNCH recipes/sft.py --config recipes/amazon_qwen3_0.6b/stage2.yaml

# Reinforcement learning of quality and depth.
$LAUNCH recipes/grpo.py --config recipes/amazon_qwen3_0.6b/grpo.yaml

# Give each checkpoint an item memory, whose weight is fitted on validation users.
python recipes/memory.py --config recipes/amazon_qwen3_0.6b/memory.yaml

# Rank the whole catalogue for every test user: baselines, and the checkpoints with and without their memory.
$LAUNCH recipes/eval.py --config recipes/amazon_qwen3_0.6b/eval.yaml
