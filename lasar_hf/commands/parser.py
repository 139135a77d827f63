"""The parser of all scripts: TRL's, with the project's own options first and near names for mistyped ones."""

import argparse
import inspect
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from trl import TrlParser

from ..arguments import near_name


# Options of TRL and transformers that most runs set.
USUAL = (
    "model_name_or_path", "output_dir", "learning_rate", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "eval_strategy", "eval_steps", "save_steps", "bf16",
    "report_to", "push_to_hub", "hub_model_id", "use_peft", "seed",
)  # fmt: skip


class ScriptParser(TrlParser):
    """
    [`~trl.TrlParser`] with a help that can be read: `--help` shows the options that the dataclasses define themselves
    and the usual ones of a trainer, `--help-all` also the others that they inherit from TRL and transformers.

    Args:
        dataclass_types (`Iterable[type]`):
            Dataclasses of the arguments.
        description (`str`, *optional*):
            Text whose first paragraph stands above the options.
    """

    def __init__(self, dataclass_types: Iterable[type], description: str | None = None):
        types = list(dataclass_types)
        first_paragraph = (description or "").strip().split("\n\n")[0]
        usage = "%(prog)s [--config FILE.yaml] [--option VALUE ...] | --help | --help-all"
        super().__init__(types, description=first_paragraph, usage=usage)
        self.own = {name for part in types for name in own_fields(part)}
        self.names = [field.name for part in types for field in fields(part) if field.init]
        self.add_argument("--help-all", action="help", help="show all options, also TRL's and transformers'")

    def parse_args_and_config(self, args: Sequence[str] | None = None, **kwargs: Any) -> tuple:
        """
        The arguments of a command line and of the YAML file that `--config` names.

        Raises:
            `ValueError`: if there is no such option, with the name of a near one.
        """
        args = list(sys.argv[1:] if args is None else args)
        if "--help-all" not in args:
            self.hide_inherited()
        *arguments, from_file, from_line = super().parse_args_and_config(
            args, return_remaining_strings=True, separate_remaining_strings=True, **kwargs
        )
        unknown = from_file[::2] + [arg.partition("=")[0] for arg in from_line if arg.startswith("--")]
        if unknown:
            names = [name.removeprefix("--") for name in unknown]
            near = [f"{name!r}{near_name(name.replace('-', '_'), [*self.names, 'config'])}" for name in names]
            raise ValueError(f"There is no option {', '.join(near)}. --help lists the options.")
        if from_line:
            raise ValueError(f"The command line has {' '.join(from_line)!r}, which belongs to no option.")
        return tuple(arguments)

    def hide_inherited(self) -> None:
        """Leave out of the help what is neither the project's own nor usual; the own options come first."""
        for action in self._actions:
            if action.dest not in (*self.own, *USUAL, "help", argparse.SUPPRESS):
                action.help = argparse.SUPPRESS
        self._optionals._group_actions.sort(key=lambda action: action.dest not in self.own)


def own_fields(dataclass_type: type) -> list[str]:
    """Fields that a dataclass or one of its bases outside TRL and transformers defines."""
    libraries = "trl", "transformers"
    bases = [base for base in dataclass_type.__mro__ if base.__module__.split(".")[0] not in libraries]
    defined = {name for base in bases for name in inspect.get_annotations(base)}
    return [field.name for field in fields(dataclass_type) if field.name in defined]
