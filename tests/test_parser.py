"""The parser of the scripts: its help, near names, and YAML files."""

from dataclasses import dataclass, field

import pytest

from lasar_hf import LasarSFTConfig
from lasar_hf.commands.parser import ScriptParser
from lasar_hf.commands.sft import SFTScriptArguments
from lasar_hf.trainers import LasarModelConfig


@dataclass
class ShopArguments:
    """Arguments of a test."""

    data_dir: str = field(metadata={"help": "Folder of the data."})
    num_beams: int = field(default=3, metadata={"help": "Width of the search."})


def parse(*arguments: str) -> ShopArguments:
    return ScriptParser((ShopArguments,)).parse_args_and_config(arguments)[0]


def help_of(capsys, option: str) -> str:
    parser = ScriptParser((SFTScriptArguments, LasarSFTConfig, LasarModelConfig), "What it does.\n\nMore.")
    with pytest.raises(SystemExit):
        parser.parse_args_and_config([option])
    return capsys.readouterr().out


def test_help_shows_the_own_options_first(capsys):
    text = help_of(capsys, "--help")
    assert "What it does." in text and "More." not in text
    assert text.index("--data_dir") < text.index("--alignment_weight") < text.index("--learning_rate")
    assert "--fsdp" not in text
    assert len(text.splitlines()) < 250


def test_help_all_shows_the_options_of_transformers(capsys):
    text = help_of(capsys, "--help-all")
    assert all(option in text for option in ("--data_dir", "--fsdp", "--alignment_weight"))


def test_the_command_line_wins_over_the_file(tmp_path):
    file = tmp_path / "shop.yaml"
    file.write_text("data_dir: data\nnum_beams: 4\n")
    assert parse("--config", str(file)) == ShopArguments("data", 4)
    assert parse("--config", str(file), "--num-beams", "5") == ShopArguments("data", 5)


@pytest.mark.parametrize("option", ["--num_beems", "--num-beems", "--num_beems=4"])
def test_a_mistyped_option_names_the_near_one(option):
    with pytest.raises(ValueError, match=r"no option 'num.beems' \(did you mean 'num_beams'\?\)"):
        parse("--data_dir", "data", option)


def test_a_mistyped_key_of_the_file_names_the_near_one(tmp_path):
    file = tmp_path / "shop.yaml"
    file.write_text("data_dir: data\nnum_beans: 4\nzzz: 1\n")
    with pytest.raises(ValueError, match=r"'num_beans' \(did you mean 'num_beams'\?\), 'zzz'\."):
        parse("--config", str(file))


def test_a_word_without_an_option_is_refused():
    with pytest.raises(ValueError, match="'shop', which belongs to no option"):
        parse("shop", "--data_dir", "data")
