"""
Recommend for a table of histories, in shards that several processes share. A second run completes a first one.

    accelerate launch recipes/recommend.py --config recipes/scientific/recommend.yaml
    torchrun --nproc_per_node 2 recipes/recommend.py --config recipes/scientific/recommend.yaml

The code is `lasar_hf/commands/recommend.py`.
"""

from lasar_hf.commands.recommend import run


if __name__ == "__main__":
    run()
