"""
Add items to the catalogue of a trained model. Nothing is fitted again, and existing items keep their Semantic IDs.

    python recipes/add_items.py --items new.jsonl --data_dir outputs/toy/data --checkpoint outputs/toy/stage2

The code is `lasar_hf/commands/add_items.py`.
"""

from lasar_hf.commands.add_items import run


if __name__ == "__main__":
    run()
