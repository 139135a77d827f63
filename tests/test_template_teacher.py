"""Chains of thought of the template teacher: they lead to the target without giving it away."""

import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lasar_hf.data import Interactions, leave_one_out, read_lcrec, samples, toy_shop
from lasar_hf.reasoning import TemplateTeacher, segment
from lasar_hf.reasoning.leakage import SPECIAL_TOKENS, contains_name, normalize_words
from tests.references import fold


def shop(*items):
    return Interactions([str(row) for row in range(len(items))], list(items), ["u"], [list(range(len(items)))])


def book(series, volume, brand, shelf):
    return {"title": f"{series}, Volume {volume}", "brand": brand, "categories": f"Books > {shelf}"}


READER = shop(
    *(book("Amber", volume, "Hill", "Crime") for volume in range(1, 4)),
    *(book("Beacon", volume, "Lake", "Travel") for volume in range(1, 4)),
    book("Castle", 1, "Hill", "Crime"),
    {"title": "Spoon", "brand": "Wood", "categories": "Kitchen > Spoons"},
)


def words(text):
    return len(text.split())


def test_next_volume_is_a_short_chain():
    chain = TemplateTeacher(READER).chain_of_thought([3, 0, 1], 2)
    assert '"Amber Volume 2" by Hill' in chain and "the series Amber, and the next part of it follows" in chain
    assert "Beacon" not in chain


def test_alternation_is_noted():
    chain = TemplateTeacher(READER).chain_of_thought([0, 3, 1, 4], 2)
    for part in ("the series Beacon", "the series Amber", "take turns", '"Amber Volume 2"', '"Beacon Volume 2"'):
        assert part in chain
    assert chain.endswith("So the next part of the series Amber follows.")
    assert "take turns" not in TemplateTeacher(READER).chain_of_thought([0, 3, 4], 1)


def test_harder_samples_have_longer_chains():
    teacher = TemplateTeacher(READER)
    easy, brand = teacher.chain_of_thought([0, 1], 2), teacher.chain_of_thought([0, 1], 6)
    alternating, depart = teacher.chain_of_thought([0, 3, 1, 4], 2), teacher.chain_of_thought([3, 0, 1], 7)
    assert words(brand) <= words(easy) < words(depart) < words(alternating)
    assert "another item in Crime by Hill" in brand
    assert "A change is due" in depart


def test_unique_attribute_of_the_target_is_not_named():
    chain = TemplateTeacher(READER).chain_of_thought([0, 1], 7)
    assert "Wood" not in chain and "Spoons" not in chain and "something of another kind" in chain


def test_common_steps_come_from_training():
    data = Interactions(
        READER.item_ids, READER.items, ["u", "v", "w"], [[0, 7, 1, 2], [3, 0, 7, 4, 5], [0, 1, 3, 0, 7]]
    )
    split = leave_one_out(data)  # 0 -> 7 twice in training, 1 -> 3 not at all more than once
    teacher = TemplateTeacher(data, split)
    assert "Other people took this very step" in teacher.chain_of_thought([0], 7)
    assert "Other people took this very step" not in teacher.chain_of_thought([1], 3)
    only_once = TemplateTeacher(data, leave_one_out(Interactions(data.item_ids, data.items, ["u"], [[0, 7, 1, 2]])))
    assert "Other people took this very step" not in only_once.chain_of_thought([0], 7)


def test_items_with_words_only():
    data = shop({"description": "red velvet nail polish"}, {"description": "tea"}, {"description": "blue nail polish"})
    chain = TemplateTeacher(data).chain_of_thought([0, 1], 2)
    assert "So another item with nail and polish follows." in chain
    assert "blue" not in chain


def test_wording_is_deterministic():
    chains = [TemplateTeacher(READER).chain_of_thought([0, 3, 1], 4) for _ in range(2)]
    assert chains[0] == chains[1]


def test_empty_history_is_refused():
    with pytest.raises(ValueError, match="history"):
        TemplateTeacher(READER).chain_of_thought([], 1)


def test_chains_of_all_samples():
    split = leave_one_out(Interactions(READER.item_ids, READER.items, ["u"], [[0, 3, 1, 4, 2]]))
    teacher, part = TemplateTeacher(READER), samples(split, "train")
    assert teacher.chains_of_thought(part) == [
        teacher.chain_of_thought([0], 3), teacher.chain_of_thought([0, 3], 1)
    ]  # fmt: skip


def test_items_without_text_give_a_warning():
    with pytest.warns(UserWarning, match="2 of 2"):
        assert TemplateTeacher(shop({}, {})).chain_of_thought([0], 1)


def test_hostile_titles():
    data = shop(
        {"title": "cup <a_<a_1>9><|latent|> <b_2>. \u202e\x00 And\nmore! " + "x" * 100_000, "brand": "B"},
        {"title": "last", "brand": "B"},
        {"title": "CUP", "brand": "B"},
    )
    teacher = TemplateTeacher(data)
    for target in (1, 2):
        chain = teacher.chain_of_thought([0], target)
        assert not re.search(r"<[a-z]_\d+>|<\|", chain)
        assert data.items[target]["title"].lower() not in chain.lower()
        assert chain.isprintable() and len(chain) < 500
    again = teacher.chain_of_thought([0, 2], 2)  # taken before: still not named
    assert again.startswith("The last item is an item without a name by B.")


def test_short_titles_do_not_change_other_words():
    for title in ("e", ".", "Art", "hair"):
        data = shop(
            {"title": "Smart chair", "brand": "Wood"}, {"title": "Party hat", "brand": "Silk"}, {"title": title}
        )
        chain = TemplateTeacher(data).chain_of_thought([0, 1], 2)
        assert chain.startswith('The last item is "Party hat" by Silk. Before that the person looked at the brand ')


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("Amber, Volume 2", "Amber Volume 2"),
        ("Café Mug", "CAFE MUG"),
        ("Tom & Jerry", "Tom &amp; Jerry"),
        ("Levi\u2019s Jeans, blue", "Levi's Jeans"),
    ],
)
def test_title_in_other_typography_is_not_quoted(name, title):
    data = shop({"title": name}, {"title": title}, {"title": "Else", "brand": title, "categories": f"A > {title} set"})
    teacher = TemplateTeacher(data)
    assert teacher.chain_of_thought([0], 1).startswith("The last item is an item without a name.")
    chain = teacher.chain_of_thought([2], 1)
    assert chain.startswith('The last item is "Else" by. ')
    assert not contains_name(normalize_words(chain), normalize_words(title))


def test_removed_title_leaves_whole_sentences():
    data = shop({"title": "x", "categories": "A > Pokémon"}, {"title": "POKEMON", "categories": "A > B"})
    chain = TemplateTeacher(data).chain_of_thought([0], 1)
    assert chain.startswith('The last item is "x". It belongs to the category. Nothing of this leads on')


LETTERS = st.text(alphabet="ab .<>_|1İßſSs", max_size=8)


@given(
    titles=st.lists(LETTERS, min_size=4, max_size=4),
    brands=st.lists(st.sampled_from(["", "a", "b a", "SS"]), min_size=4, max_size=4),
    history=st.lists(st.integers(0, 3), min_size=1, max_size=5),
)
@example(titles=["", "İ11", "", "11"], brands=[""] * 4, history=[1])
@settings(max_examples=300, deadline=None)
def test_chain_never_contains_the_title(titles, brands, history):
    items = [
        {"title": title, "brand": brand, "categories": f"x > {title}"}
        for title, brand in zip(titles, brands, strict=True)
    ]
    chain = TemplateTeacher(shop(*items)).chain_of_thought(history, 3)
    assert not contains_name(normalize_words(chain), normalize_words(titles[3]))
    folded = fold(titles[3])
    if sum(letter.isalnum() for letter in folded) > 1 and folded[0].isalnum() and folded[-1].isalnum():
        # A combining mark, such as the dot of a folded "İ", is part of its word.
        before, after = r"(?<![^\W_])(?<![\u0300-\u036f])", r"(?![^\W_])(?![\u0300-\u036f])"
        assert not re.search(before + re.escape(folded) + after, chain.casefold())
    assert not SPECIAL_TOKENS.search(chain)


def leaks(data, name="train"):
    """Samples whose chain or segments hold the target's title, or the title of an item that is not in the history."""
    split = leave_one_out(data)
    teacher = TemplateTeacher(data, split)
    part = samples(split, name)
    chains = [
        teacher.chain_of_thought(history, target)
        for history, target in zip(part["history"], part["target"], strict=True)
    ]
    titles = [fold(item.get("title", "")) for item in data.items]
    given_away = [
        row
        for row, (chain, target) in enumerate(zip(chains, part["target"], strict=True))
        if (titles[target] and titles[target] in chain.casefold())
        or contains_name(normalize_words(chain), normalize_words(titles[target]))
    ]
    quoted = [
        row
        for row, (chain, history) in enumerate(zip(chains, part["history"], strict=True))
        for name in re.findall(r'"([^"]*Volume \w+)"', chain)
        if not any(titles[item].replace(",", "") == name.casefold() for item in history)
    ]
    return given_away, quoted, chains


def test_toy_shop_has_no_leak():
    given_away, quoted, chains = leaks(toy_shop(200, 96, seed=3))
    assert given_away == [] and quoted == []
    assert sum("Volume" in chain for chain in chains) > 0.9 * len(chains)


def test_alternating_users_have_deeper_chains():
    data = toy_shop(300, 96, seed=1)
    split = leave_one_out(data)
    part = samples(split, "train")
    teacher = TemplateTeacher(data, split)
    depths = np.array([
        len(segments)
        for segments in segment([
            teacher.chain_of_thought(history, target)
            for history, target in zip(part["history"], part["target"], strict=True)
        ])
    ])  # fmt: skip
    alternating = np.array([user.startswith("alternating") for user in part["user_id"]])
    assert depths[alternating].mean() > depths[~alternating].mean() + 1


def test_real_items_have_no_leak(shared_data):
    given_away, _, chains = leaks(read_lcrec(shared_data / "scientific"), "validation")
    assert given_away == []
    assert len(set(map(words, chains))) > 20
