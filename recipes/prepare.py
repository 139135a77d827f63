"""
Prepare a data set: read, split, embed, Semantic IDs, chains of thought, segments, tokenizer, samples, data card.

    python recipes/prepare.py --config recipes/toy/prepare.yaml

Your own interactions, a CSV file with three columns:

    python recipes/prepare.py --output_dir outputs/mine/data --tokenizer_size 2000 --source table --source_args \
        '{"interactions":"ratings.csv","user_column":"user","item_column":"item","time_column":"time"}'

The code is `lasar_hf/commands/prepare.py`.
"""

from lasar_hf.commands.prepare import run


if __name__ == "__main__":
    run()
