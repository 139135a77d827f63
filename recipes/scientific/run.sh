#!/usr/bin/env bash
# All stages of LASAR on Amazon Industrial and Scientific, a backbone of 1.5 M parameters from scratch: about 40 minutes
# on a CPU. README.md in this folder names the download. From the repository root, with the folder of the download:
#
#     bash recipes/scientific/run.sh CollisionGenRec/data/Scientific
#     LAUNCH="accelerate launch --cpu --num_processes 1" bash recipes/scientific/run.sh …  # without a GPU
#
# Each step resumes or is skipped if it is up to date, so the script can be run again at any time.
set -euo pipefail
SOURCE=${1:?usage: run.sh FOLDER (with Scientific.inter.json and Scientific.item.json)}
LAUNCH=${LAUNCH:-accelerate launch}

# Semantic IDs, a teacher's chains of thought, their segments and a tokenizer -> outputs/scientific/data
python recipes/prepare.py --config recipes/scientific/prepare.yaml --source "$SOURCE"

# Stage 1: ground the Semantic IDs. The model generates items directly.
$LAUNCH recipes/sft.py --config recipes/scientific/stage1.yaml

# Stage 2: latent reasoning, aligned with the segments of the chains of thought.
$LAUNCH recipes/sft.py --config recipes/scientific/stage2.yaml

# Reinforcement learning of quality and depth.
$LAUNCH recipes/grpo.py --config recipes/scientific/grpo.yaml

# Give each checkpoint an item memory, whose weight is fitted on validation users.
python recipes/memory.py --config recipes/scientific/memory.yaml

# Rank the whole catalogue for every test user: baselines, and the checkpoints with and without their memory.
$LAUNCH recipes/eval.py --config recipes/scientific/eval.yaml
