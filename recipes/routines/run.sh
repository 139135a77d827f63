#!/usr/bin/env bash
# A generated shop where reasoning is needed: a few minutes on one CPU core, no download. From the repository root:
#
#     bash recipes/routines/run.sh
#     LAUNCH="accelerate launch --cpu --num_processes 1" bash recipes/routines/run.sh  # without a GPU
set -euo pipefail
LAUNCH=${LAUNCH:-accelerate launch}
OUT=outputs/routines

# Users whose next item lies 1 to 6 links ahead -> data, and others whose next item lies one link ahead -> one_link
[ -e $OUT/data/prepared.json ] || python recipes/routines/prepare.py --config recipes/routines/prepare.yaml
[ -e $OUT/one_link/prepared.json ] || python recipes/routines/prepare.py --config recipes/routines/prepare.yaml \
    --output_dir $OUT/one_link --max_links 1 --num_users 20000

# Stage 1: one link in one pass, what the items are called, and what a segment says.
$LAUNCH recipes/sft.py --config recipes/routines/stage1.yaml

# Stage 2: a latent step for each link, aligned with the segments of the chains of thought.
$LAUNCH recipes/sft.py --config recipes/routines/stage2.yaml

# Reinforcement learning of quality and depth.
$LAUNCH recipes/grpo.py --config recipes/routines/grpo.yaml

# Rank the whole catalogue for every test user, then exact match by number of links.
$LAUNCH recipes/eval.py --config recipes/routines/eval.yaml
python recipes/routines/by_links.py direct=$OUT/stage1@0 LASAR-SFT=$OUT/stage2 LASAR-RL=$OUT/grpo
