"""A checkpoint that stands alone: its catalogue, recommender, explanation and pipeline."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import pipeline

from lasar_hf import LasarForGenerativeRec, LasarProcessor, Recommender, SidCatalog
from lasar_hf.model.configuration_lasar import sid_token
from lasar_hf.model.explain_lasar import _principal_plane, nearest_items
from lasar_hf.trainers import lasar_lora_config
from tests.tiny import ring_memory, tiny_backbone, tiny_catalog, tiny_model, tiny_tokenizer


def titled_catalog(**kwargs) -> SidCatalog:
    catalog = tiny_catalog(**kwargs)
    titles = [f"Book  {number}" for number in range(len(catalog))]
    titles[3:5] = ["Twin", "twin"]
    return SidCatalog(catalog.codes, catalog.item_ids, titles=titles)


@pytest.fixture
def recommender() -> Recommender:
    model, tokenizer = tiny_model()
    return Recommender(model, LasarProcessor(tokenizer, titled_catalog(), max_history=3))


def ids(result: dict) -> list[str]:
    return [item["item_id"] for item in result["items"]]


def test_a_loaded_model_has_the_catalogue_of_its_folder(recommender, tmp_path):
    recommender.model.save_pretrained(tmp_path)
    model = LasarForGenerativeRec.from_pretrained(tmp_path)
    assert model.catalog.item_ids == recommender.catalog.item_ids
    assert model.catalog.titles == recommender.catalog.titles
    inputs = recommender.processor([["item-1", "item-2"]])
    expected = recommender.model.recommend(**inputs, catalog=recommender.catalog, top_k=5)
    assert model.recommend(**inputs, top_k=5).items.equal(expected.items)


def test_model_and_processor_share_the_catalogue_until_its_files_change(recommender, tmp_path):
    recommender.save_pretrained(tmp_path)
    model = LasarForGenerativeRec.from_pretrained(tmp_path)
    assert LasarProcessor.from_pretrained(tmp_path).catalog is model.catalog
    recommender.catalog.remove(["item-3"]).save_pretrained(tmp_path)
    assert LasarProcessor.from_pretrained(tmp_path).catalog.num_items == 19
    assert model.catalog.num_items == 20


def test_a_checkpoint_without_a_catalogue_loads(tmp_path):
    model, _ = tiny_model()
    model.save_pretrained(tmp_path)
    model = LasarForGenerativeRec.from_pretrained(tmp_path)
    assert model.catalog is None
    with pytest.raises(ValueError, match="no catalog"):
        model.recommend(torch.tensor([[model.config.latent_start_token_id]]))


def test_a_foreign_catalogue_is_refused(recommender, tmp_path):
    recommender.save_pretrained(tmp_path)
    tiny_catalog(num_sid_levels=2, num_items=5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="levels"):
        LasarForGenerativeRec.from_pretrained(tmp_path)


def test_pickled_weights_are_refused(recommender, tmp_path):
    recommender.save_pretrained(tmp_path)
    torch.save(recommender.model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        LasarForGenerativeRec.from_pretrained(tmp_path)


def test_damaged_weights_are_named(recommender, tmp_path):
    recommender.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is not the file that was saved"):
        Recommender.from_pretrained(tmp_path)


def test_excluding_the_history_leaves_out_the_items_of_the_prompt(recommender):
    inputs = recommender.processor([["item-1", "item-2"], ["item-7"]])
    plain = recommender.model.recommend(**inputs, top_k=20)
    without = recommender.model.recommend(**inputs, top_k=20, exclude_history=True)
    for row, own in enumerate([{1, 2}, {7}]):
        kept = [item for item in plain.items[row].tolist() if item not in own]
        assert [item for item in without.items[row].tolist() if item >= 0] == kept
    denied = recommender.model.recommend(**inputs, top_k=20, exclude_history=True, deny=[None, torch.tensor([8])])
    assert not {7, 8} & set(denied.items[1].tolist())
    recommender.model.config.exclude_history = True
    with pytest.raises(ValueError, match="exclude_history"):
        recommender.model.recommend(**inputs, exclude_history=False)


def test_histories_of_ids_and_titles_give_the_models_list(recommender):
    histories = [["item-1", "item-2"], ["  BOOK 1", "book 2"], ["item-5"]]
    results = recommender.recommend(histories, top_k=4)
    output = recommender.model.recommend(
        **recommender.processor([["item-1", "item-2"], ["item-5"]]), catalog=recommender.catalog, top_k=4
    )
    first, last = recommender.processor.decode_recommendations(output)
    assert results[0]["items"] == results[1]["items"]
    assert ids(results[0]) == [item["item_id"] for item in first]
    assert ids(results[2]) == [item["item_id"] for item in last]
    assert results[2]["latent_steps"] == output.latent_steps[1].item()
    scores = [item["score"] for item in results[0]["items"]]
    torch.testing.assert_close(torch.tensor(scores), output.scores[0], atol=1e-5, rtol=0)


def test_batches_give_the_results_in_order(recommender):
    histories = [[f"item-{number}"] * (1 + number % 3) for number in range(7)]
    one_by_one = [recommender.recommend([history])[0] for history in histories]
    batched = recommender.recommend(histories, batch_size=2)
    assert [ids(result) for result in batched] == [ids(result) for result in one_by_one]


def test_the_whole_history_is_left_out_also_what_the_prompt_does_not_show(recommender):
    history = [f"item-{number}" for number in range(6)]  # the prompt shows three
    (result,) = recommender.recommend([history], top_k=20, exclude_history=True)
    assert not set(history) & set(ids(result))
    assert len(result["items"]) == 14
    recommender.model.config.exclude_history = True
    assert not set(history) & set(ids(recommender.recommend([history], top_k=20)[0]))
    with pytest.raises(ValueError, match="exclude_history"):
        recommender.recommend([history], exclude_history=False)


def test_allow_and_deny(recommender):
    histories = [["item-1"], ["item-2"]]
    allow, deny = [["item-7", "Book 9"], None], [["item-7"], ["item-8"]]
    allowed, other = recommender.recommend(histories, allow=allow, deny=deny)
    assert ids(allowed) == ["item-9"]
    assert "item-8" not in ids(other)
    nothing, everything = recommender.recommend(histories, top_k=20, allow=[[], None])
    assert ids(nothing) == [] and len(ids(everything)) == 20


def test_the_width_of_the_search_is_that_asked_for(recommender):
    histories = [[f"item-{number}"] for number in range(20)]
    narrow = [ids(result) for result in recommender.recommend(histories, top_k=1, num_beams=1)]
    output = recommender.model.recommend(**recommender.processor(histories), top_k=1, num_beams=1)
    assert narrow == [[recommender.catalog.item_ids[item]] for item in output.items[:, 0].tolist()]
    assert narrow != [ids(result) for result in recommender.recommend(histories, top_k=1)]


def test_the_memory_is_mixed_in_and_saved(recommender, tmp_path):
    alone = recommender.recommend([["item-1"]])[0]
    recommender.memory = ring_memory(recommender.catalog)
    mixed = recommender.recommend([["item-1"]])[0]
    assert ids(mixed)[0] == "item-2"
    recommender.card = "# A card\n"
    recommender.save_pretrained(tmp_path)
    loaded = Recommender.from_pretrained(tmp_path, device="cpu")
    assert loaded.recommend([["item-1"]]) == [mixed]
    assert loaded.card == "# A card\n"
    loaded.memory = None
    assert ids(loaded.recommend([["item-1"]])[0]) == ids(alone)
    loaded.save_pretrained(tmp_path)
    assert Recommender.from_pretrained(tmp_path, device="cpu").memory is None


def test_the_memory_of_another_catalogue_is_refused(recommender, tmp_path):
    foreign = SidCatalog(recommender.catalog.codes, [f"other-{number}" for number in range(20)])
    with pytest.raises(ValueError, match="another catalogue"):
        recommender.memory = ring_memory(foreign)
    recommender.save_pretrained(tmp_path)
    ring_memory(foreign).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another catalogue"):
        LasarForGenerativeRec.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "history, message",
    [
        (["item-1", "item-77"], "item-77"),
        (["book 7 again"], "no item"),
        (["book"], "Titles that contain it: 'Book  0', 'Book  1', 'Book  2'"),
        (["Twin"], "2 items have the title 'Twin'. Use an item id: 'item-3', 'item-4'"),
        (["<a_1><b_2><c_3>"], "Semantic ID"),
        (["<a_300>"], "Semantic ID"),
        ([], "empty"),
        ([" "], "no item ' '. Use an item id"),
        ([" <a_300> "], "Semantic ID"),
        ("item-1", "expected a list"),
        (None, "The history is None; expected a list"),
    ],
)
def test_bad_histories_are_named(recommender, history, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        recommender.recommend([history])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"histories": ["item-1", "item-2"]}, "histories is one history"),
        ({"histories": [1, 2]}, "histories is one history"),
        ({"histories": None}, "histories is one history or no list"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"unknown_items": "ignore"}, "unknown_items is 'ignore'"),
        ({"allow": ["item-7"]}, r"allow is \['item-7'\]; expected a list of items, or None, for each"),
        ({"deny": [["item-7"], None]}, "deny has 2 lists"),
        ({"deny": [["item-77"]], "unknown_items": "skip"}, "no item 'item-77'"),
    ],
)
def test_bad_arguments_are_named(recommender, options, message):
    with pytest.raises(ValueError, match=message):
        recommender.recommend(**{"histories": [["item-1"]]} | options)


def test_histories_may_be_any_iterable(recommender):
    expected = recommender.recommend([["item-1", "item-2"], ["item-5"]])
    assert recommender.recommend(tuple(history) for history in (["item-1", "item-2"], ["item-5"])) == expected
    assert recommender.recommend([]) == []


def test_ids_that_are_numbers_come_before_titles_that_are(recommender):
    codes = recommender.catalog.codes
    catalog = SidCatalog(codes, range(20), titles=[str((item + 1) % 20) for item in range(20)])
    numbered = Recommender(recommender.model, LasarProcessor(recommender.processor.tokenizer, catalog))
    assert [numbered.item_index(item) for item in (4, "4", torch.tensor([4]).numpy()[0])] == [4, 4, 4]


def test_titles_are_matched_without_case_spaces_and_composition(recommender):
    titles = ["Café", "STRASSE  12", "ﬁsh\u00a0book", *[None] * 17]
    catalog = SidCatalog(recommender.catalog.codes, recommender.catalog.item_ids, titles=titles)
    recommender = Recommender(recommender.model, LasarProcessor(recommender.processor.tokenizer, catalog))
    written = ("cafe\u0301", "Straße 12", "FISH BOOK", "cafe")
    assert [recommender.item_index(title) for title in written] == [0, 1, 2, None]


def test_unknown_items_can_be_left_out(recommender):
    results = recommender.recommend([["item-0", "gone"], ["gone"], []], unknown_items="skip")
    assert ids(results[0]) == ids(recommender.recommend([["item-0"]])[0]) != []
    assert results[1] == results[2] == {"items": [], "latent_steps": None}
    with pytest.raises(ValueError, match="Semantic ID"):
        recommender.recommend([["item-1", "<a_1>"]], unknown_items="skip")


def test_explanation_has_the_list_of_every_depth(recommender, tmp_path):
    explanation = recommender.explain(["item-1", "item-2"], top_k=4)
    for depth, items in enumerate(explanation.by_depth):
        expected = recommender.recommend([["item-1", "item-2"]], top_k=4, latent_steps=depth)[0]["items"]
        assert [item["item_id"] for item in items] == [item["item_id"] for item in expected]
    (chosen,) = recommender.recommend([["item-1", "item-2"]])
    assert explanation.latent_steps == chosen["latent_steps"]
    assert list(explanation.depth_probabilities) == [1, 2, 3, 4]
    assert math.isclose(sum(explanation.depth_probabilities.values()), 1, abs_tol=1e-5)
    assert len(explanation.path) == len(explanation.nearest_items) == len(explanation.by_depth) == 5
    total = sum(math.exp(item["score"]) for item in explanation.by_depth[explanation.latent_steps])
    assert math.isclose(explanation.beam_tree["probability"], total, rel_tol=1e-5)
    explanation.plot(tmp_path / "explanation.png")
    assert (tmp_path / "explanation.png").stat().st_size > 1000


def test_explanation_leaves_out_the_history_and_removed_items_and_mixes_the_memory(recommender):
    catalog, tokenizer = recommender.catalog.remove(["item-9", "item-4"]), recommender.processor.tokenizer
    recommender = Recommender(recommender.model, LasarProcessor(tokenizer, catalog, max_history=3))
    recommender.memory = ring_memory(catalog)
    recommender.model.config.exclude_history = True
    history = [f"item-{number}" for number in range(6)]  # the prompt shows three
    explanation = recommender.explain(history, top_k=20)
    assert [item["title"] for item in explanation.history] == [catalog.titles[number] for number in range(6)]
    (expected,) = recommender.recommend([history], top_k=20)
    chosen = explanation.by_depth[explanation.latent_steps]
    assert [item["item_id"] for item in chosen] == ids(expected)
    assert [item["score"] for item in chosen] == pytest.approx([item["score"] for item in expected["items"]], abs=1e-4)
    left = {f"item-{number}" for number in range(6, 20)} - {"item-9"}
    assert all({item["item_id"] for item in items} == left for items in explanation.by_depth)
    assert all({item["item_id"] for item in items} == left | set(history) - {"item-4"}
               for items in explanation.nearest_items)  # fmt: skip


def test_items_that_share_a_semantic_id_have_its_probability_once(recommender):
    codes = recommender.catalog.codes.clone()
    codes[4:6] = codes[3]
    catalog = SidCatalog(codes, recommender.catalog.item_ids, allow_collisions=True)
    recommender = Recommender(recommender.model, LasarProcessor(recommender.processor.tokenizer, catalog))
    tree = recommender.explain(["item-3"], top_k=20).beam_tree
    assert math.isclose(tree["probability"], 1, abs_tol=1e-5)
    node = tree
    for level, code in enumerate(codes[3].tolist()):
        (node,) = [child for child in node["children"] if child["token"] == sid_token(level, code)]
    assert node["item_ids"] == ["item-3", "item-4", "item-5"]


def test_explanation_of_the_only_item_and_of_an_empty_list(recommender, tmp_path):
    catalog = SidCatalog([[0, 1, 2]], ["only"])
    recommender = Recommender(recommender.model, LasarProcessor(recommender.processor.tokenizer, catalog))
    assert recommender.explain(["only"]).beam_tree["probability"] == pytest.approx(1)
    recommender.model.config.exclude_history = True
    explanation = recommender.explain(["only"])
    assert explanation.by_depth == [[]] * 5 and explanation.beam_tree["children"] == []
    explanation.plot(tmp_path / "explanation.png")


def test_explanation_of_a_policy_that_may_choose_no_step():
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    model = LasarForGenerativeRec.from_backbone(
        tiny_backbone(), tokenizer, 3, 4, max_latent_steps=1, min_latent_steps=0
    ).eval()
    explanation = Recommender(model, LasarProcessor(tokenizer, titled_catalog())).explain(["item-1"])
    assert list(explanation.depth_probabilities) == [0, 1]
    assert len(explanation.path) == len(explanation.by_depth) == 2


def test_the_path_keeps_the_distances_of_states_in_a_plane(recommender):
    directions = torch.linalg.qr(torch.randn(16, 2, generator=torch.Generator().manual_seed(0))).Q
    states = torch.tensor([[0.0, 0], [4, 0], [4, 1], [9, 3]]) @ directions.T + 7
    path = torch.tensor(_principal_plane(states))
    torch.testing.assert_close(torch.cdist(path, path), torch.cdist(states, states), atol=1e-4, rtol=0)
    assert path[:, 0].var() > path[:, 1].var()


def test_a_model_with_an_adapter_is_explained(recommender):
    before = recommender.explain(["item-1"])
    adapted = get_peft_model(recommender.model, lasar_lora_config(recommender.model, r=4))
    explanation = Recommender(adapted, recommender.processor).explain(["item-1"])
    assert explanation.latent_steps == before.latent_steps


def test_the_nearest_item_of_a_state_that_is_made_of_its_codes(recommender):
    model, catalog = recommender.model, recommender.catalog
    token_ids = recommender.processor.sid_token_ids[6]
    rows = model.lm_head.weight[token_ids].detach()
    state = torch.nn.functional.normalize(rows, dim=-1).sum(dim=0)
    (nearest,) = nearest_items(model, catalog, state[None], 1)
    cosines = torch.nn.functional.cosine_similarity(state[None], rows)
    assert nearest[0]["item_id"] == "item-6"
    assert math.isclose(nearest[0]["similarity"], cosines.mean().item(), abs_tol=1e-5)


def test_a_pipeline_needs_consent_to_run_the_code_of_the_checkpoint(recommender, tmp_path):
    recommender.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        pipeline("generative-recommendation", model=str(tmp_path))


VISITOR = """
import json, sys
sys.modules["lasar_hf"] = None  # importing it fails
from transformers import AutoModel, AutoProcessor, pipeline
path, histories = sys.argv[1], json.loads(sys.argv[2])
model = AutoModel.from_pretrained(path, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
output = model.recommend(**processor(histories[:1]), memory=model.memory, top_k=3)
recommend = pipeline("generative-recommendation", model=path, trust_remote_code=True, device="cpu", top_k=3)
recommend.save_pretrained("saved")
again = pipeline("generative-recommendation", model="saved", trust_remote_code=True, device="cpu", top_k=3)
results = {
    "model": processor.decode_recommendations(output)[0], "one": recommend(histories[0]),
    "two": recommend((history for history in histories), top_k=2), "again": again(histories[0]),
    "parts": recommend.run_single(histories[0], {}, {"top_k": 3}, {}),
}
print(json.dumps(results))
"""


def test_a_visitor_without_the_package_gets_the_same_lists(recommender, tmp_path):
    recommender.memory = ring_memory(recommender.catalog)
    recommender.save_pretrained(tmp_path / "model")
    histories = [["item-1", "item-2"], ["item-4"]]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", VISITOR, str(tmp_path / "model"), json.dumps(histories)], cwd=tmp_path,
        env=environment, text=True, capture_output=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    (expected,) = recommender.recommend(histories[:1], top_k=3)
    assert results["model"] == expected["items"]
    assert results["one"] == results["parts"] == results["again"] == expected
    assert results["two"] == recommender.recommend(histories, top_k=2)


# ---------------------------------------------------------------------------------------------------------------------
# Parts that do not belong together


def change_json(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["model.policy_head.out_proj.weight", "model.backbone.layers.1.mlp.up_proj.weight"])
def test_missing_weights_are_refused(recommender, tmp_path, name):
    recommender.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lack {name}"):
        Recommender.from_pretrained(tmp_path)


@pytest.mark.parametrize("layers, problem", [(1, "in excess"), (3, "lack")])
def test_another_number_of_layers_is_refused(recommender, tmp_path, layers, problem):
    recommender.save_pretrained(tmp_path)
    backbone = json.loads((tmp_path / "config.json").read_text())["backbone_config"]
    kinds = {"layer_types": ["full_attention"] * layers}
    change_json(tmp_path / "config.json", backbone_config=backbone | kinds | {"num_hidden_layers": layers})
    with pytest.raises(ValueError, match=problem):
        Recommender.from_pretrained(tmp_path)


def test_another_shape_is_refused(recommender, tmp_path):
    recommender.save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", max_latent_steps=3)
    with pytest.raises(ValueError, match="in another shape, model.policy_head.out_proj"):
        Recommender.from_pretrained(tmp_path)


def test_loading_info_is_returned_if_asked_for(recommender, tmp_path):
    recommender.save_pretrained(tmp_path)
    model, info = LasarForGenerativeRec.from_pretrained(tmp_path, output_loading_info=True)
    assert model.catalog is not None and not info["missing_keys"]


@pytest.mark.parametrize(
    "field", ["sid_token_offset", "latent_start_token_id", "latent_token_id", "latent_end_token_id"]
)
def test_a_tokenizer_of_another_model_is_refused(recommender, tmp_path, field):
    recommender.save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", **{field: getattr(recommender.model.config, field) - 1})
    with pytest.raises(ValueError, match=field):
        Recommender.from_pretrained(tmp_path)
