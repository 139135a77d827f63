#!/usr/bin/env bash
# All stages of LASAR on Amazon Beauty with Qwen3-0.6B. README.md in this folder names the download, the memory and the time.
# From the repository root, with the folder of the download:
#
#     bash recipes/amazon_qwen3_0.6b/run.sh CollisionGenRec/data/Beauty           # 8 GPUs
#     CARDS=1 bash recipes/amazon_qwen3_0.6b/run.sh CollisionGenRec/data/Beauty   # one GPU of 24 GB
#
# Each step resumes or is skipped if it is up to date, so the script can be run again at any time.
set -euo pipefail
SOURCE=${1:?usage: run.sh FOLDER (with Beauty.inter.json and Beauty.item.json)}
CARDS=${CARDS:-8}

# Both variants take the same number of examples per step: 512 in SFT, 1,024 candidates in GRPO.
if [ "$CARDS" = 1 ]; then
    LAUNCH="accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml"
    SFT="--per_device_train_batch_size 64 --gradient_accumulation_steps 8 --gradient_checkpointing true"
    GRPO="--per_device_train_batch_size 64 --gradient_accumulation_steps 16 --gradient_checkpointing true"
else
    LAUNCH="accelerate launch --config_file recipes/accelerate_configs/ddp.yaml --num_processes $CARDS"
    SFT="" GRPO=""
fi

# Semantic IDs from sentence embeddings, chains of thought and their segments -> outputs/beauty/data. Before it, start the
# teacher (or add --teacher template, which needs no model):
#     vllm serve Qwen/Qwen3-30B-A3B-Instruct-2507 --port 8000 --max-model-len 8192
python recipes/prepare.py --config recipes/amazon_qwen3_0.6b/prepare.yaml --source "$SOURCE"

# Stage 1: ground the Semantic IDs. The model generates items directly.
$LAUNCH recipes/sft.py --config recipes/amazon_qwen3_0.6b/stage1.yaml $SFT

# Stage 2: latent reasoning, aligned with the segments of the chains of thought.
$LAUNCH recipes/sft.py --config recipes/amazon_qwen3_0.6b/stage2.yaml $SFT

# Reinforcement learning of quality and depth.
$LAUNCH recipes/grpo.py --config recipes/amazon_qwen3_0.6b/grpo.yaml $GRPO

# Give each checkpoint an item memory, whose weight is fitted on validation users.
python recipes/memory.py --config recipes/amazon_qwen3_0.6b/memory.yaml

# Rank the whole catalogue for every test user: baselines, and the checkpoints with and without their memory.
$LAUNCH recipes/eval.py --config recipes/amazon_qwen3_0.6b/eval.yaml
