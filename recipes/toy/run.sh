#!/usr/bin/env bash
# All stages of LASAR on a generated shop: a few minutes on two CPU cores, no download. From the repository root:
#
#     bash recipes/toy/run.sh
#     LAUNCH="accelerate launch --cpu --num_processes 1" bash recipes/toy/run.sh  # without a GPU
#
# Each step resumes or is skipped if it is up to date, so the script can be run again at any time.
set -euo pipefail
LAUNCH=${LAUNCH:-accelerate launch}

# Users, items, Semantic IDs, a teacher's chains of thought, their segments and a tokenizer -> outputs/toy/data
python recipes/prepare.py --config recipes/toy/prepare.yaml

# Stage 1: ground the Semantic IDs. The model generates items directly.
$LAUNCH recipes/sft.py --config recipes/toy/stage1.yaml

# Stage 2: latent reasoning, aligned with the segments of the chains of thought.
$LAUNCH recipes/sft.py --config recipes/toy/stage2.yaml

# Reinforcement learning of quality and depth.
$LAUNCH recipes/grpo.py --config recipes/toy/grpo.yaml

# Give each checkpoint an item memory, whose weight is fitted on validation users.
python recipes/memory.py --config recipes/toy/memory.yaml

# Rank the whole catalogue for every test user: baselines, and the checkpoints with and without their memory.
$LAUNCH recipes/eval.py --config recipes/toy/eval.yaml
