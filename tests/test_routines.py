"""The routines: circles are new for every user, the chain follows the links, and the depth follows from the cue."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lasar_hf import LasarForGenerativeRec, LasarProcessor
from lasar_hf.data import PreparedData, chain_end_examples, reasoning_examples, stage1_examples, write_routines
from lasar_hf.data.routines import MAX_LINKS, PRODUCTS, SEGMENT, links
from lasar_hf.evaluation import recommend_samples
from lasar_hf.evaluation.study import links_of_depths_table
from lasar_hf.files import read_json
from tests.preparing import files, processor_of, run
from tests.recipes import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routines")
    write_routines(folder, 60, 20, 30)
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return PreparedData.load(folder)


def follow(data: PreparedData, history: list[int]) -> list[str]:
    """The products that a history leads to, read from the titles."""
    titles = data.items["title"]
    after = dict(titles[item].split(", then ") for item in history[:-2])
    products = [titles[history[-1]]]
    for _ in range(links(history)):
        products.append(after[products[-1]])
    return products


def test_targets_lie_as_many_routines_ahead_as_the_cue_says(data):
    titles, numbers = data.items["title"], set()
    for table in data.samples.values():
        for sample in table:
            history = sample["history"]
            assert titles[history[-2]] == f"{('One', 'Two', 'Three', 'Four', 'Five', 'Six')[links(history) - 1]} ahead"
            assert titles[sample["target"]] == follow(data, history)[-1]
            assert len(history) == len(PRODUCTS) + 2 and sample["target"] not in history
            numbers.add(links(history))
    assert numbers == set(range(1, MAX_LINKS + 1))


def test_segments_name_the_links(data):
    for sample in data.samples["train"]:
        products = follow(data, sample["history"])
        links = zip(sample["segments"], products, products[1:], strict=False)
        assert all(text.endswith(f": {one} {other}") for text, one, other in links)
        assert len(sample["segments"]) == len(products) - 1
        assert sample["chain_of_thought"] == " ".join(sample["segments"])


def test_a_teacher_that_goes_on_repeats_the_last_segment(data, tmp_path):
    write_routines(tmp_path, 60, 20, 30, min_segments=5)
    longer = PreparedData.load(tmp_path).samples["train"]
    assert longer["history"] == data.samples["train"]["history"]
    for segments, texts in zip(data.samples["train"]["segments"], longer["segments"], strict=True):
        assert texts[: len(segments)] == segments and set(texts[len(segments) :]) <= {segments[-1]}
        assert len(texts) == max(5, len(segments))


def test_no_two_users_have_the_same_routines(data):
    histories = [history for table in data.samples.values() for history in table["history"]]
    assert len({frozenset(history[:-2]) for history in histories}) == len(histories) == 110
    assert [len(part) for part in data.samples.values()] == [60, 20, 30]


def test_held_out_users_are_not_in_the_training_part(data):
    lengths = np.array([[len(row) for row in data.users[part]] for part in ("train", "validation", "test")])
    assert (lengths.sum(axis=0) == len(PRODUCTS) + 3).all() and ((lengths > 0).sum(axis=0) == 1).all()
    assert data.exclude_history and data.repeat_rate == 0


def test_a_chain_end_is_the_anchors_text_and_then_the_target(folder, data):
    processor, train = processor_of(folder, data), data.samples["train"]
    examples = chain_end_examples(train, processor)
    assert len(examples) == len(train)
    for example, sample in zip(examples, train, strict=True):
        answer = processor.answer_ids([sample["target"]])[0]
        assert example["input_ids"] == processor.text_ids(sample["segments"][-1:])[0] + answer
        assert [label for label in example["labels"] if label != -100] == answer
    assert len(stage1_examples(data, processor, ["next_item", "chain_end=0.5"])) == 90


def test_a_product_is_one_token_and_ends_its_segment(folder, data):
    processor = processor_of(folder, data)
    ends = {processor.text_ids([SEGMENT.format(one="Tea", other=name)])[0][-1] for name in PRODUCTS}
    assert len(ends) == len(PRODUCTS)


def test_depth_labels_follow_the_cue(folder, data):
    train = data.samples["train"]
    depths = [len(segments) for segments in train["segments"]]
    assert depths == [links(history) for history in train["history"]]
    assert reasoning_examples(train, processor_of(folder, data), depths)["depth"] == depths


def test_equal_seeds_give_equal_folders(tmp_path):
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        write_routines(tmp_path / name, 20, 5, 5, seed=seed)
    one, same, other = (files(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same and one != other


def test_users_of_validation_and_test_are_new_to_a_folder_with_fewer_links(data, tmp_path):
    write_routines(tmp_path, 90, 20, 30, max_links=1)
    one_link = PreparedData.load(tmp_path)
    data.check_catalog(one_link.catalog, "one_link")
    assert {links(history) for history in one_link.samples["train"]["history"]} == {1}
    circles = {part: {frozenset(row[:-2]) for row in data.samples[part]["history"]} for part in data.samples}
    for part, table in one_link.samples.items():
        others = {frozenset(row[:-2]) for row in table["history"]}
        assert others == circles[part] if part != "train" else not others & (circles["validation"] | circles["test"])


@pytest.mark.parametrize(
    "arguments", [{"num_users": 0}, {"test_users": "30"}, {"max_links": 0}, {"max_links": 7}, {"seed": 0.5}]
)
def test_impossible_sizes_are_refused(arguments, tmp_path):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        write_routines(tmp_path, **arguments)


@pytest.mark.parametrize("source", ["routines", "toy"])
def test_unknown_source_args_are_named(source, tmp_path):
    with pytest.raises(ValueError, match="num_shops.*its arguments are num_users"):
        run(tmp_path, source, {"num_shops": 3})


def test_the_recipe_writes_the_folder(tmp_path):
    arguments = {"num_users": 5, "validation_users": 2, "test_users": 3}
    run(tmp_path, "routines", arguments)
    data, card = PreparedData.load(tmp_path), read_json(tmp_path / "data_card.json")
    assert [len(part) for part in data.samples.values()] == [5, 2, 3]
    assert card["arguments"]["source_args"] == arguments and card["counts"]["train_samples"] == 5
    assert card["counts"]["mean_depth"] == np.mean([len(segments) for segments in data.samples["train"]["segments"]])
    assert card["data"]["repeat_rate"] == 0 and card["data"]["exclude_history"] and card["data"]["users"] == 10


def test_another_sentence_writes_the_folder_again(tmp_path, monkeypatch):
    arguments = {"num_users": 5, "validation_users": 2, "test_users": 3}
    run(tmp_path, "routines", arguments)
    sentence = "after {one} comes {other}"
    monkeypatch.setattr("lasar_hf.data.routines.SEGMENT", sentence)
    monkeypatch.setattr("lasar_hf.commands.prepare.SEGMENT", sentence)
    run(tmp_path, "routines", arguments)
    assert PreparedData.load(tmp_path).samples["train"]["segments"][0][0].startswith("after ")


def test_a_table_shows_who_is_right_at_a_fixed_depth(tmp_path):
    write_routines(tmp_path, 5, 40, 5)
    samples = PreparedData.load(tmp_path).samples["validation"]
    needed = np.array([links(history) for history in samples["history"]])
    # At depth 2 users with two links get their item, and nobody else does.
    items, users = np.where(needed == 2, samples["target"], -1)[:, None], np.arange(0, 40, 2)
    results = SimpleNamespace(
        data=SimpleNamespace(samples={"validation": samples}),
        sweep_lists=lambda row: (users, {"2": items[users]}),
    )
    cells = ["1.000" if number == 2 else "0.000" for number in sorted(set(needed[users].tolist()))]
    assert f"| depth 2 | {' | '.join(cells)} |" in links_of_depths_table(results, "latent")


def test_tables_behind_links_are_hashed(tmp_path):
    hashes = []
    for name, min_segments in (("one", 1), ("other", 4)):
        write_routines(tmp_path / name, 30, 5, 5, min_segments=min_segments)
        (tmp_path / name / "samples").rename(tmp_path / f"disk-{name}")
        (tmp_path / name / "samples").symlink_to(tmp_path / f"disk-{name}")
        hashes.append(PreparedData.file_hashes(tmp_path / name))
    assert {name for name in hashes[0] if hashes[0][name] != hashes[1][name]} == {
        "samples/train/data-00000-of-00001.arrow"
    }


@pytest.mark.slow
def test_latent_steps_follow_the_links_of_new_users(tmp_path, monkeypatch):
    """The recipe's stages 1 and 2: one pass follows one link, as many latent steps as links follow all."""
    monkeypatch.chdir(tmp_path)
    run(Path("outputs/routines/data"), "routines")
    run(Path("outputs/routines/one_link"), "routines", {"num_users": 20_000, "max_links": 1})
    for stage in ("stage1", "stage2"):
        script, config = ROOT / "recipes/sft.py", ROOT / f"recipes/routines/{stage}.yaml"
        subprocess.run([sys.executable, script, "--config", config, "--use_cpu", "true"], check=True)
    samples = PreparedData.load("outputs/routines/data").samples["test"]
    needed, exact, agree = np.array([links(history) for history in samples["history"]]), {}, {}
    for stage, depth in (("stage1", 0), ("stage2", None)):
        path = f"outputs/routines/{stage}"
        model, processor = LasarForGenerativeRec.from_pretrained(path), LasarProcessor.from_pretrained(path)
        output = recommend_samples(model, samples, processor, 10, 10, depth)
        hits = output.items[:, 0] == np.array(samples["target"])
        exact[stage] = [hits[needed == number].mean() for number in range(1, MAX_LINKS + 1)]
        agree[stage] = (output.latent_steps == needed).mean()
    assert min(exact["stage2"]) >= 0.95 and agree["stage2"] >= 0.95
    assert exact["stage1"][0] >= 0.95 and max(exact["stage1"][2:]) <= 0.5
