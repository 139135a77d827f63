"""
Write the generated shop where reasoning is needed.

    python recipes/routines/prepare.py --config recipes/routines/prepare.yaml
"""

from dataclasses import asdict, dataclass, field

from trl import TrlParser

from lasar_hf.data import write_routines


@dataclass
class RoutinesArguments:
    """How many users to write."""

    output_dir: str = field(metadata={"help": "Folder to write."})
    num_users: int = field(default=12_000, metadata={"help": "Training users."})
    validation_users: int = field(default=500, metadata={"help": "Validation users."})
    test_users: int = field(default=1200, metadata={"help": "Test users."})
    max_links: int = field(default=6, metadata={"help": "Largest number of links from the last item to the next."})
    seed: int = field(default=0, metadata={"help": "Seed of the random numbers."})


def main(args: RoutinesArguments) -> None:
    """Write the folder that the other recipes read as `data_dir`."""
    arguments = asdict(args)
    write_routines(arguments.pop("output_dir"), **arguments)


if __name__ == "__main__":
    main(*TrlParser(RoutinesArguments).parse_args_and_config())
