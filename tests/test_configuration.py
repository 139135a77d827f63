"""The configuration: which values are refused, and by which name."""

import pytest
from transformers import Qwen3Config

from lasar_hf import LasarConfig, LasarForGenerativeRec


IDS = {
    "sid_token_offset": 8, "latent_start_token_id": 5, "latent_token_id": 6, "latent_end_token_id": 7,
}  # fmt: skip


def config(**changes) -> LasarConfig:
    """A configuration of 20 tokens, of which the last twelve are Semantic IDs."""
    backbone = Qwen3Config(vocab_size=20, hidden_size=8, num_hidden_layers=1)
    return LasarConfig(**{"backbone_config": backbone, "num_sid_levels": 3, "codebook_size": 4, **IDS} | changes)


def test_ids_may_fill_the_vocabulary():
    assert config().sid_token_id(2, 3) == 19


@pytest.mark.parametrize(
    "changes",
    [
        {"num_sid_levels": 0}, {"num_sid_levels": 27}, {"num_sid_levels": "3"}, {"num_sid_levels": True},
        {"codebook_size": "4"}, {"codebook_size": 4.0}, {"codebook_size": None}, {"codebook_size": 0},
        {"max_latent_steps": 0}, {"max_latent_steps": 2.5}, {"max_latent_steps": None},
        {"min_latent_steps": 2}, {"min_latent_steps": True}, {"min_latent_steps": None},
        {"sid_token_offset": 9}, {"sid_token_offset": -1}, {"sid_token_offset": "8"}, {"sid_token_offset": 10**6},
        {"latent_start_token_id": 20}, {"latent_token_id": 6.0}, {"latent_end_token_id": -1},
        {"latent_token_id": 5}, {"latent_end_token_id": 5}, {"latent_end_token_id": 19},
        {"latent_input": "cooked"}, {"latent_input": None}, {"exclude_history": "no"}, {"exclude_history": 1},
    ],
)  # fmt: skip
def test_bad_values_are_named(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        config(**changes)


@pytest.mark.parametrize("name", ["max_latent_step", "codebok_size", "sid_token_ofset", "exlude_history"])
def test_a_misspelt_name_is_refused(name):
    with pytest.raises(ValueError, match=f"no {name}. Did you mean"):
        config(**{name: 1})


def test_other_names_of_transformers_are_kept():
    kept = {"decoder_start_token_id": 3, "num_labels": 4, "tokenizer_class": "any", "own_note": "kept"}
    made = config(**kept)
    assert made.num_labels == 4 and made.own_note == "kept"
    assert LasarConfig.from_dict(made.to_dict()).to_dict() == made.to_dict()


def test_a_bad_value_in_a_file_names_the_file(tmp_path):
    config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"codebook_size": 4', '"codebook_size": "4"'))
    with pytest.raises(ValueError, match=r"config\.json of .* codebook_size is '4'"):
        LasarConfig.from_pretrained(tmp_path)


def test_a_model_needs_the_ids_of_its_tokens():
    with pytest.raises(ValueError, match="latent_token_id is not set"):
        LasarForGenerativeRec(config(latent_token_id=None))
