"""The catalogue as an index: size and order of the trie, adding and removing items, allow and deny lists."""

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lasar_hf import SidCatalog
from lasar_hf.model.trie_lasar import ItemFilter, SidTrie
from tests.references import score_every_item
from tests.tiny import batch, row, tiny_catalog, tiny_model


def paths(trie: SidTrie) -> dict[tuple[int, ...], list[int]]:
    """Every Semantic ID a trie holds, in order, with its item indices."""
    prefixes = [((), 0)]
    for level in range(trie.num_levels):
        grown = []
        for prefix, node in prefixes:
            codes, child = trie.children(level, torch.tensor(node))
            grown += [((*prefix, c), n) for c, n in zip(codes.tolist(), child.tolist(), strict=True) if n >= 0]
        prefixes = grown
    return {prefix: [i for i in trie.items(torch.tensor(node)).tolist() if i >= 0] for prefix, node in prefixes}


def expected_paths(codes: torch.Tensor, indices=None) -> dict[tuple[int, ...], list[int]]:
    held = {}
    for i in range(len(codes)) if indices is None else indices:
        held.setdefault(tuple(codes[i].tolist()), []).append(i)
    return dict(sorted(held.items()))


def random_codes(data, levels: int = 3, codebook_size: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9999)))
    return torch.randint(0, codebook_size, (data.draw(st.integers(1, 40)), levels), generator=generator)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_trie_holds_collisions_gaps_and_wide_codes(data):
    """Also if a Semantic ID does not fit into one integer key, and for some of the items only."""
    codes = random_codes(data)
    scale = data.draw(st.sampled_from([1, 10_000, 2**24]))  # int16 codes, int32 codes, keys wider than 63 bits
    kept = data.draw(st.lists(st.booleans(), min_size=len(codes), max_size=len(codes)))
    indices = torch.tensor(kept).nonzero()[:, 0] if any(kept) else torch.arange(len(codes))
    trie = SidTrie(codes * scale, indices)
    found, expected = paths(trie), expected_paths(codes * scale, indices.tolist())
    assert list(found.items()) == list(expected.items())
    for level in range(trie.num_levels + 1):
        first = trie.first_position(level, torch.arange(trie.num_nodes[level] + 1))
        assert first[0] == 0 and first[-1] == len(indices) and (first.diff() > 0).all()
    assert trie.item_positions[trie.item_indices.long()].tolist() == list(range(len(indices)))


def test_an_item_takes_at_most_24_bytes():
    codes = torch.randint(0, 256, (100_000, 4), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    trie = SidTrie(codes)
    assert trie.num_bytes / len(codes) <= 24
    assert all(tensor.dtype == torch.int16 for tensor in trie.child_code)
    moved = trie.to("meta")  # every tensor goes along
    assert moved.num_bytes == trie.num_bytes
    tensors = [moved.item_indices, moved.item_positions, moved.leaf_ptr, *moved.child_code, *moved.child_ptr]
    assert {tensor.device.type for tensor in tensors} == {"meta"} and trie.leaf_ptr.device.type == "cpu"


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_add_and_remove_keep_indices(data):
    codes = random_codes(data)
    ids = [f"item-{i}" for i in range(len(codes))]
    split = data.draw(st.integers(1, len(codes)))
    catalog = SidCatalog(codes[:split], ids[:split], allow_collisions=True)
    if split < len(codes):
        catalog = catalog.add(codes[split:], ids[split:])
    assert torch.equal(catalog.codes, codes.int()) and catalog.item_ids == ids
    gone = data.draw(st.sets(st.integers(0, len(codes) - 1), max_size=len(codes) - 1))
    smaller = catalog.remove([ids[i] for i in gone])
    kept = [i for i in range(len(codes)) if i not in gone]
    assert paths(catalog.trie("cpu")) == expected_paths(codes)  # the old one stays as it is
    assert paths(smaller.trie("cpu")) == expected_paths(codes, kept)
    assert (len(smaller), smaller.num_items) == (len(codes), len(kept))
    assert smaller.index_of == {item_id: i for i, item_id in enumerate(ids)}
    # A removed item returns to its row, with new codes; another one is appended.
    back = sorted(gone)[:1]
    again = smaller.add([[3, 3, 3]] * (len(back) + 1), [*[ids[i] for i in back], "another"])
    changed = torch.cat([codes, torch.full((1, 3), 3)])
    changed[back] = 3
    assert paths(again.trie("cpu")) == expected_paths(changed, sorted([*kept, *back, len(codes)]))
    assert again.item_ids == [*ids, "another"]


def accepts(catalog: SidCatalog, codebook_size: int) -> bool:
    try:
        catalog.check_matches(catalog.num_levels, codebook_size)
    except ValueError:
        return False
    return True


def assert_same_trie(got: SidTrie, expected: SidTrie):
    assert vars(got).keys() == vars(expected).keys()
    for name, value in vars(expected).items():
        other = getattr(got, name)
        if isinstance(value, torch.Tensor):
            value, other = [value], [other]
        if isinstance(value, list) and isinstance(value[0], torch.Tensor):
            assert all(torch.equal(one.long(), two.long()) for one, two in zip(value, other, strict=True))
        else:
            assert value == other, name


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_changes_equal_a_new_catalogue(data):
    """Any sequence of changes leaves the tensors that the constructor makes."""
    levels, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    scale = data.draw(st.sampled_from([1, 10_000, 2**24]))
    seeds = st.integers(0, 9999).map(lambda seed: torch.Generator().manual_seed(seed))

    def draw(count: int) -> torch.Tensor:
        return scale * torch.randint(0, size, (count, levels), generator=data.draw(seeds))

    count = data.draw(st.integers(1, 12))
    catalog = SidCatalog(draw(count), [str(i) for i in range(count)], allow_collisions=True)
    for _ in range(data.draw(st.integers(1, 4))):
        held = [item_id for item_id, gone in zip(catalog.item_ids, catalog.removed.tolist(), strict=True) if not gone]
        if data.draw(st.booleans()):
            catalog = catalog.remove(data.draw(st.permutations(held))[1 : 1 + data.draw(st.integers(0, 8))])
        else:  # some come back, with other codes, among some that are new
            back = [item_id for item_id in catalog.item_ids if item_id not in held][: data.draw(st.integers(0, 3))]
            new = [str(len(catalog) + i) for i in range(data.draw(st.integers(not back, 8)))]
            ids = data.draw(st.permutations(back + new))
            catalog = catalog.add(draw(len(ids)), ids)
        new = SidCatalog(catalog.codes, catalog.item_ids, True, catalog.removed)
        assert_same_trie(catalog.trie("cpu"), new.trie("cpu"))
        assert (catalog.num_items, catalog.index_of) == (new.num_items, new.index_of)
        for size_limit in (1, size, 10_000 * size, 2**24 * size):
            assert accepts(catalog, size_limit) == accepts(new, size_limit)


def test_changes_build_no_new_trie(monkeypatch):
    catalog = tiny_catalog()
    codes = catalog.codes[3:4]
    for name in ("SidTrie.__init__", "SidCatalog.__init__"):
        monkeypatch.setattr(f"lasar_hf.model.catalog_lasar.{name}", lambda *args: pytest.fail("built again"))
    changed = catalog.remove(["item-3", "item-5"]).add(codes, ["new"])
    assert (changed.num_items, len(changed), catalog.num_items) == (19, 21, 20)


def test_a_wide_code_can_come_later():
    catalog = SidCatalog([[0, 1], [2, 3]], ["a", "b"]).add([[2, 70_000], [1, 0]], ["c", "d"])
    assert paths(catalog.trie("cpu")) == {(0, 1): [0], (1, 0): [3], (2, 3): [1], (2, 70_000): [2]}
    with pytest.raises(ValueError, match="'c' .index 2. .* codebook_size is 4"):
        catalog.check_matches(2, 4)


def test_removed_items_leave_no_trace():
    model, _ = tiny_model()
    catalog = tiny_catalog(num_items=12)
    kept = [i for i in range(12) if i not in (2, 7)]
    fresh = SidCatalog(catalog.codes[kept], [catalog.item_ids[i] for i in kept])
    inputs = batch([row(model, 5, 0), row(model, 7, 0, seed=1)])
    smaller = model.recommend(**inputs, catalog=catalog.remove(["item-2", "item-7"]), top_k=12)
    expected = model.recommend(**inputs, catalog=fresh, top_k=12)
    assert smaller.items[:, :10].tolist() == [[kept[i] for i in items] for items in expected.items[:, :10].tolist()]
    assert torch.equal(smaller.scores, expected.scores) and (smaller.items[:, 10:] == -1).all()


def test_round_trip_with_removed_items(tmp_path):
    catalog = tiny_catalog().remove(["item-3"])
    catalog.save_pretrained(tmp_path)
    loaded = SidCatalog.from_pretrained(tmp_path)
    assert torch.equal(loaded.removed, catalog.removed) and loaded.num_items == 19
    assert paths(loaded.trie("cpu")) == paths(catalog.trie("cpu"))
    assert loaded.add(catalog.codes[3:4], ["item-3"]).num_items == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.add([[0, 0, 9]], ["item-1"]), "item 'item-1'"),
        (lambda c: c.add([[0, 0, 9], [0, 1, 9]], ["x", "x"]), "item_ids has 'x'"),
        (lambda c: c.add([[0, 0]], ["x"]), "codes have 2 levels"),
        (lambda c: c.add(c.codes[4:5], ["x"]), "'item-4' and 'x' share the Semantic ID"),
        (lambda c: c.remove(["nothing"]), "no item 'nothing'"),
        (lambda c: c.remove(["item-1"]).remove(["item-1"]), "no item 'item-1'"),
        (lambda c: c.remove(c.item_ids), "item_ids"),
        (lambda c: SidCatalog([[0.5, 1.0]], ["x"]), "codes are"),
        (lambda c: SidCatalog([[0, 2**31]], ["x"]), "codes are"),
        (lambda c: SidCatalog(torch.tensor([[1j, 1]]), ["x"]), "codes are torch.complex64"),
        (lambda c: SidCatalog(np.array([[0, 1]], dtype=np.uint64), ["x"]), "codes are torch.uint64"),
        (lambda c: SidCatalog([[True, False]], ["x"]), "codes are torch.bool"),
        (lambda c: SidCatalog([[0, 1], [0, 2]], ["x", "y\ud800"]), r"item_ids has 'y\\ud800'"),
        (lambda c: SidCatalog([[0, 1]], ["x"], titles=["\udfff"]), r"titles has '\\udfff'"),
        (lambda c: c.add([[0, 0, 9]], ["\ud800"]), "item_ids has"),
        (lambda c: SidCatalog([[0, 1]], ["x"], removed=torch.tensor([True, False])), "removed has shape"),
    ],
)
def test_bad_changes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change(tiny_catalog())


def draw_lists(data, size: int, num_items: int):
    one = st.none() | st.sets(st.integers(0, num_items - 1))
    lists = data.draw(st.none() | st.lists(one, min_size=size, max_size=size))
    return lists and [None if chosen is None else torch.tensor(sorted(chosen, reverse=True)) for chosen in lists]


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_lists_equal_scoring_every_item_and_filtering(data):
    """Scores stay those of the whole catalogue, with collisions, removed items and both lists in one batch."""
    model, _ = tiny_model(seed=data.draw(st.integers(0, 3)))
    codes = random_codes(data)[:20]
    num_items, size = len(codes), data.draw(st.integers(1, 3))
    whole = SidCatalog(codes, [f"item-{i}" for i in range(num_items)], allow_collisions=True)
    catalog = whole.remove(["item-0"]) if num_items > 1 and data.draw(st.booleans()) else whole
    allow, deny = draw_lists(data, size, num_items), draw_lists(data, size, num_items)
    prompts = [row(model, 4 + i, 0, seed=i) for i in range(size)]
    recommended = model.recommend(
        **batch(prompts),
        catalog=catalog,
        top_k=num_items,
        num_beams=64,
        latent_steps=1,
        allow=allow,
        deny=deny,
        allow_empty=True,
    )
    kept = [i for i in range(num_items) if not catalog.removed[i]]
    alive = SidCatalog(codes[kept], kept, allow_collisions=True)
    for i, prompt in enumerate(prompts):
        scores = torch.full((num_items,), -torch.inf, dtype=torch.double)
        scores[kept] = score_every_item(model, prompt, 1, alive).double()
        permitted = set(kept) if allow is None or allow[i] is None else set(kept) & set(allow[i].tolist())
        permitted -= set() if deny is None or deny[i] is None else set(deny[i].tolist())
        order = sorted(permitted, key=lambda item: (-round(scores[item].item(), 5), item))
        assert recommended.items[i].tolist() == order + [-1] * (num_items - len(order))
        torch.testing.assert_close(recommended.scores[i, : len(order)].double(), scores[order], atol=2e-5, rtol=2e-5)
        assert (recommended.scores[i, len(order) :] == -torch.inf).all()


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_no_beam_is_spent_on_a_dead_prefix(data):
    """One beam finds an allowed item, however unlikely, and `k` beams find `k`."""
    model, _ = tiny_model(seed=data.draw(st.integers(0, 3)))
    catalog = tiny_catalog(num_items=30, seed=data.draw(st.integers(0, 99)))
    inputs = batch([row(model, 5, 0), row(model, 6, 0, seed=1)])
    everything = model.recommend(**inputs, catalog=catalog, top_k=30, num_beams=64).items
    worst = everything[:, -3:]
    allowed = model.recommend(**inputs, catalog=catalog, top_k=3, num_beams=3, allow=list(worst))
    assert torch.equal(allowed.items, worst)
    denied = model.recommend(**inputs, catalog=catalog, top_k=3, num_beams=3, deny=list(everything[:, :-3]))
    assert torch.equal(denied.items, worst)
    single = model.recommend(**inputs, catalog=catalog, top_k=1, num_beams=1, allow=[worst[0, -1:], None])
    assert single.items[0, 0] == worst[0, -1]
    assert single.items[1, 0] == model.recommend(**inputs, catalog=catalog, top_k=1, num_beams=1).items[1, 0]


def test_a_denied_twin_vanishes_and_the_other_stays():
    model, _ = tiny_model()
    catalog = SidCatalog([[0, 1, 2], [3, 0, 0], [0, 1, 2]], ["a", "b", "c"], allow_collisions=True)
    inputs = batch([row(model, 5, 0)])
    assert sorted(model.recommend(**inputs, catalog=catalog, top_k=3, deny=[[0]]).items[0].tolist()) == [-1, 1, 2]
    assert sorted(model.recommend(**inputs, catalog=catalog, top_k=3, allow=[[2]]).items[0].tolist()) == [-1, -1, 2]


def test_a_prompt_without_any_item():
    model, _ = tiny_model()
    catalog, inputs = tiny_catalog(), batch([row(model, 5, 0), row(model, 6, 0, seed=1)])
    everything = torch.arange(20)
    for lists in (
        dict(allow=[None, []]),
        dict(deny=[None, everything]),
        dict(allow=[None, [1, 2]], deny=[None, [2, 1]]),
    ):
        with pytest.raises(ValueError, match="prompt 1"):
            model.recommend(**inputs, catalog=catalog, **lists)
        empty = model.recommend(**inputs, catalog=catalog, **lists, top_k=4, allow_empty=True)
        assert (empty.items[1] == -1).all() and (empty.scores[1] == -torch.inf).all()
        assert torch.equal(empty.items[0], model.recommend(**inputs, catalog=catalog, top_k=4).items[0])


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (dict(allow=[[1]]), "allow has 1 lists"),
        (dict(deny=[None, [3, 20]]), "deny list of prompt 1 .* 0 … 19"),
        (dict(allow=[[-1], None]), "allow list of prompt 0"),
        (dict(deny=torch.zeros(2, 3, 1)), "deny list of prompt 0"),
    ],
)
def test_bad_lists_are_refused(lists, message):
    with pytest.raises(ValueError, match=message):
        ItemFilter.from_lists(tiny_catalog().trie("cpu"), 2, **lists)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.int8, np.int64])
def test_codes_of_any_integer_type(kind):
    assert SidCatalog(np.array([[0, 1], [2, 3]], dtype=kind), ["a", "b"]).codes.tolist() == [[0, 1], [2, 3]]


def test_an_interrupted_save_leaves_no_catalogue(tmp_path, monkeypatch):
    """New codes beside old item ids would recommend other items without a word."""
    tiny_catalog(seed=0).save_pretrained(tmp_path)
    replace, calls = os.replace, []

    def killed_at_the_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        tiny_catalog(seed=1).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="sid_catalog.json"):
        SidCatalog.from_pretrained(tmp_path)


def test_a_catalogue_keeps_its_codes():
    """Changing the array it was made of has no effect."""
    codes, removed = np.array([[0, 0], [1, 1], [2, 2]], dtype=np.int32), torch.tensor([False, False, True])
    catalog = SidCatalog(codes, ["a", "b", "c"], removed=removed)
    codes[0], removed[0] = 3, True
    assert catalog.codes.tolist() == [[0, 0], [1, 1], [2, 2]] and catalog.removed.tolist() == [False, False, True]


def test_each_device_has_its_copy():
    catalog = tiny_catalog()
    cpu, meta = catalog.trie("cpu"), catalog.trie("meta")
    assert meta.item_indices.is_meta
    assert catalog.trie("cpu") is cpu
    assert catalog.trie("meta") is meta


@pytest.mark.parametrize("wrong", [[True] * 20, [7.9], ["item-3"], torch.zeros(20, dtype=torch.bool)])
@pytest.mark.parametrize("name", ["allow", "deny"])
def test_lists_contain_item_indices(name, wrong):
    """A mask or ids would mean other items."""
    with pytest.raises(ValueError, match=f"{name} list of prompt 1"):
        ItemFilter.from_lists(tiny_catalog().trie("cpu"), 2, **{name: [None, wrong]})


TITLES = ["Apple", None, "Chair"]


def titled_catalog(**kwargs) -> SidCatalog:
    return SidCatalog([[0, 1], [0, 2], [3, 0]], ["a", "b", "c"], **kwargs)


def test_titles_survive_a_round_trip(tmp_path):
    titled_catalog(titles=["Apple", "", "Chair"]).save_pretrained(tmp_path)
    assert SidCatalog.from_pretrained(tmp_path).titles == TITLES  # an empty title becomes None


def test_added_titles_join_the_old_ones():
    catalog = titled_catalog(titles=TITLES).remove(["a"])
    added = catalog.add([[1, 1], [0, 1]], ["d", "a"], titles=["Desk", "Green apple"])
    assert added.titles == ["Green apple", None, "Chair", "Desk"]
    assert catalog.titles == TITLES


def test_items_added_without_titles():
    catalog = titled_catalog(titles=TITLES).remove(["a"])
    assert catalog.add([[1, 1], [0, 1]], ["d", "a"]).titles == ["Apple", None, "Chair", None]


def test_titles_added_to_a_catalogue_without_any():
    assert titled_catalog().add([[1, 1]], ["d"], titles=["Desk"]).titles == [None, None, None, "Desk"]
    assert titled_catalog().add([[1, 1]], ["d"]).titles is None


@pytest.mark.parametrize("titles", [["Apple"], ["Apple", 3, "Chair"], ["Apple", float("nan"), "Chair"]])
def test_bad_titles_are_refused(titles):
    with pytest.raises(ValueError, match="titles"):
        titled_catalog(titles=titles)
    with pytest.raises(ValueError, match="titles"):
        titled_catalog().add([[1, 1], [1, 2], [1, 3]], ["d", "e", "f"], titles=titles)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key != "item_ids"}),
        lambda text: json.dumps(json.loads(text) | {"num_levels": 3}),
        lambda text: json.dumps(json.loads(text) | {"item_ids": ["a"]}),
    ],
)
def test_damaged_json_names_its_file(tmp_path, damage):
    titled_catalog().save_pretrained(tmp_path)
    path = tmp_path / "sid_catalog.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match="sid_catalog.json"):
        SidCatalog.from_pretrained(tmp_path)


def test_damaged_codes_name_their_file(tmp_path):
    titled_catalog().save_pretrained(tmp_path)
    path = tmp_path / "sid_catalog.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="sid_catalog.safetensors"):
        SidCatalog.from_pretrained(tmp_path)


def test_a_saved_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *args: (events.append("fsync"), fsync(*args)))
    monkeypatch.setattr(os, "replace", lambda *args: (events.append("replace"), replace(*args)))
    tiny_catalog().save_pretrained(tmp_path)
    assert events == ["fsync", "replace"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sid_catalog.json", "sid_catalog.safetensors"]
