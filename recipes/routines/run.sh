#!/usr/bin/env bash
# A generated shop where reasoning is needed: a few minutes on one CPU core, no download. From the repository root:
#
#     bash recipes/routines/run.sh
#     LAUNCH="accelerate launch --cpu --num_processes 1" bash recipes/routines/run.sh  # without a GPU
set -euo pipefail
LAUNCH=${LAUNCH:-accelerate launch}

# Users whose next item lies 1 to 6 links ahead -> outputs/routines/data
python recipes/prepare.py --config recipes/routines/prepare.yaml

# Others, whose next item lies one link ahead, for stage 1. Validation and test users are the same.
python recipes/prepare.py --source routines --source_args '{"num_users": 20000, "max_links": 1}' \
    --output_dir outputs/routines/one_link

# Stage 1: one link in one pass, what the items are called, and what a segment says.
$LAUNCH recipes/sft.py --config recipes/routines/stage1.yaml

# Stage 2: a latent step for each link, aligned with the segments of the chains of thought.
$LAUNCH recipes/sft.py --config recipes/routines/stage2.yaml

# Reinforcement learning of quality and depth.
$LAUNCH recipes/grpo.py --config recipes/routines/grpo.yaml

# Rank the whole catalogue for every test user, then exact match by number of links.
$LAUNCH recipes/eval.py --config recipes/routines/eval.yaml
python recipes/routines/by_links.py "direct=outputs/routines/stage1@0" "2 latent steps=outputs/routines/stage2@2" \
    "4 latent steps=outputs/routines/stage2@4" "LASAR-SFT (policy)=outputs/routines/stage2" \
    "LASAR-RL (policy)=outputs/routines/grpo"
