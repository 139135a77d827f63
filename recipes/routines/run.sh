#!/usr/bin/env bash
# A generated shop where reasoning is needed, no download. Its steps took 26 minutes on one busy CPU core. From the root:
#
#     bash recipes/routines/run.sh
#     LAUNCH="accelerate launch --cpu --num_processes 1" bash recipes/routines/run.sh  # without a GPU
set -euo pipefail
LAUNCH=${LAUNCH:-accelerate launch}

# Users whose next item lies 1 to 6 links ahead -> outputs/routines/data
python recipes/prepare.py --config recipes/routines/prepare.yaml

# Others, whose next item lies one link ahead, for stage 1. It has validation and test users of its own.
python recipes/prepare.py --source routines --source_args '{"num_users": 20000, "max_links": 1}' \
    --output_dir outputs/routines/one_link

# Stage 1: one link in one pass, what the items are called, and what a segment says.
$LAUNCH recipes/sft.py --config recipes/routines/stage1.yaml

# Stage 2: a latent step for each link, aligned with the segments of the chains of thought.
$LAUNCH recipes/sft.py --config recipes/routines/stage2.yaml

# Reinforcement learning of quality and depth.
$LAUNCH recipes/grpo.py --config recipes/routines/grpo.yaml

# Baseline: the chain of thought as text before the item, for as many updates as stage 2.
$LAUNCH recipes/sft.py --config recipes/routines/explicit.yaml

# Ablations: as many updates without latent steps, and without the anchors.
$LAUNCH recipes/sft.py --config recipes/routines/stage2.yaml --depth_source 0 --output_dir outputs/routines/direct
$LAUNCH recipes/sft.py --config recipes/routines/stage2.yaml --alignment none --output_dir outputs/routines/no_anchors

# A stage 2 that always takes 8 latent steps, since its teacher always writes 8 segments for the same users; then
# reinforcement learning, which drops the steps that do not help.
python recipes/prepare.py --source routines --source_args '{"min_segments": 8}' --output_dir outputs/routines/eight
$LAUNCH recipes/sft.py --config recipes/routines/stage2_eight.yaml
$LAUNCH recipes/grpo.py --config recipes/routines/grpo_eight.yaml

# Rank the whole catalogue for every test user. reproduce.py (see README.md) also reports the number of links.
$LAUNCH recipes/eval.py --config recipes/routines/eval.yaml
