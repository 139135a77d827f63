"""The teacher behind an endpoint, against a local server that is slow, broken, busy and hostile."""

import importlib
import json
import logging
import sys
import threading
import time
import traceback

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasar_hf.data import Interactions, leave_one_out, samples
from lasar_hf.reasoning import TemplateTeacher
from lasar_hf.reasoning.leakage import REJECTIONS, rejection_reason
from lasar_hf.reasoning.openai_teacher import AnswerLog, OpenAITeacher, identifying_names, parse_reply
from tests.teacher_endpoint import GOOD, answer


SHOP = Interactions(
    [f"i{row}" for row in range(6)],
    [{"title": f"Cup Number {row} <a_{row}>", "brand": "Hill"} for row in range(6)],
    ["u", "v"], [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3]],
)  # fmt: skip
SPLIT = leave_one_out(SHOP)
TRAIN = samples(SPLIT, "train")  # 0 > 1, 01 > 2, 012 > 3; 0 > 1 again: 3 requests for 4 samples
TEMPLATE = TemplateTeacher(SHOP, SPLIT)
SOON = {"Retry-After": "0.01"}  # keeps the client's back-off short
KEY = "sk-secret-1234567890"


def teacher(server, tmp_path, **options):
    url = server if isinstance(server, str) else server.url
    return OpenAITeacher(SHOP, "tiny", url, tmp_path / "log.jsonl", TEMPLATE, **{"timeout": 5.0} | options)


def next_title(prompt):
    return json.loads(next(line for line in prompt.splitlines() if line.startswith("{")))["next"]["title"]


def test_chains_in_order(endpoint, tmp_path):
    server = endpoint(lambda prompt, n: answer(GOOD + "!" * int(next_title(prompt)[-1])))
    one = teacher(server, tmp_path)
    assert one.chains_of_thought(TRAIN) == [GOOD + "!" * number for number in (1, 2, 3, 1)]
    assert one.counts == {
        "requests": 3, "accepted": 3, "replaced": 0, "prompt_tokens": 30, "completion_tokens": 9
    }  # fmt: skip


def test_equal_requests_are_sent_once(endpoint, tmp_path):
    server = endpoint(lambda prompt, n: answer(GOOD))
    teacher(server, tmp_path).chains_of_thought(TRAIN)
    assert list(server.asked.values()) == [1, 1, 1]


def test_request(endpoint, tmp_path):
    server = endpoint(lambda prompt, n: answer(GOOD))
    teacher(server, tmp_path, max_tokens=99, temperature=0.5).chains_of_thought(TRAIN)
    path, headers, body = server.requests[0]
    prompt = body["messages"][0]["content"]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("tiny", 99, 0.5)
    assert "never write its title" in prompt.lower()
    assert '"Cup Number 0"' in prompt  # without its `<a_0>`
    assert "authorization" not in headers


def test_key_comes_from_the_environment(endpoint, tmp_path, monkeypatch):
    server = endpoint(lambda prompt, n: answer(GOOD))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "hf_not_for_this_endpoint")
    teacher(server, tmp_path).chains_of_thought(TRAIN)
    assert {headers["authorization"] for _, headers, _ in server.requests} == {f"Bearer {KEY}"}
    assert KEY not in (tmp_path / "log.jsonl").read_text()


@pytest.mark.filterwarnings("ignore:3 of 3 chains")
@pytest.mark.parametrize("status", [302, 400, 401, 404, 500])
def test_echoed_key_is_not_shown(endpoint, tmp_path, monkeypatch, caplog, status):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    body = json.dumps({"error": {"message": f"bad key: Bearer {KEY}"}}).encode()
    server = endpoint(lambda prompt, n: (status, SOON, body))
    try:
        teacher(server, tmp_path, max_retries=1, max_answers=1).chains_of_thought(TRAIN)
    except (ConnectionError, PermissionError):
        assert KEY not in traceback.format_exc()
    assert KEY not in caplog.text
    assert KEY not in (tmp_path / "log.jsonl").read_text()


def test_answer_with_the_key_is_rejected(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = endpoint(lambda prompt, n: answer(GOOD) if n else answer(f"{GOOD} The key is {KEY}."))
    assert teacher(server, tmp_path).chains_of_thought(TRAIN) == [GOOD] * 4
    assert KEY not in (tmp_path / "log.jsonl").read_text()


@pytest.mark.parametrize("key", ["a\r\nHost: b", "clé"])
def test_malformed_key_is_refused(endpoint, tmp_path, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        teacher("http://127.0.0.1:9/v1", tmp_path).chains_of_thought(TRAIN)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(endpoint, tmp_path, status):
    other = endpoint(lambda prompt, n: answer(GOOD))
    server = endpoint(lambda prompt, n: (status, {"Location": f"{other.url}/chat/completions"}, b""))
    with pytest.raises(PermissionError, match=str(status)):
        teacher(server, tmp_path).chains_of_thought(TRAIN)
    assert not other.requests


@pytest.mark.parametrize("limit", [1, 3])
def test_concurrency_is_the_number_of_requests_at_a_time(endpoint, tmp_path, limit):
    items = [{"title": f"Cup Number {row}"} for row in range(12)]
    shop = Interactions([str(row) for row in range(12)], items, ["u"], [list(range(12))])
    together = threading.Barrier(limit, timeout=20)  # nothing is answered before `limit` requests have arrived

    def reply(prompt, n):
        together.wait()
        return answer(GOOD)

    server = endpoint(reply)
    one = OpenAITeacher(shop, "tiny", server.url, tmp_path / "log.jsonl", TEMPLATE, concurrency=limit)
    one.chains_of_thought(samples(leave_one_out(shop), "train"))  # 9 requests
    assert server.most_busy == limit


@pytest.mark.parametrize("failure", [(429, SOON, b"slow down"), (500, SOON, b""), (503, SOON, b"<html>"), None])
def test_busy_and_broken_connections_are_retried(endpoint, tmp_path, failure):
    server = endpoint(lambda prompt, n: answer(GOOD) if n else failure)
    one = teacher(server, tmp_path)
    assert one.chains_of_thought(TRAIN) == [GOOD] * 4
    assert list(server.asked.values()) == [2, 2, 2]


def test_retry_after_is_respected(endpoint, tmp_path):
    server = endpoint(lambda prompt, n: answer(GOOD) if n else (429, {"Retry-After": "1.5"}, b""))
    start = time.perf_counter()
    teacher(server, tmp_path).chains_of_thought(TRAIN)
    assert time.perf_counter() - start > 1.5  # the client's own back-off is at most 0.5 s


def test_slow_answers_are_retried(endpoint, tmp_path):
    def reply(prompt, n):
        time.sleep(0.0 if n else 1.0)
        return answer(GOOD)

    server = endpoint(reply)
    assert teacher(server, tmp_path, timeout=0.3).chains_of_thought(TRAIN) == [GOOD] * 4
    assert list(server.asked.values()) == [2, 2, 2]


@pytest.mark.parametrize("failure", [(503, SOON, b""), None])
def test_dead_endpoint_stops_the_run(endpoint, tmp_path, failure):
    server = endpoint(lambda prompt, n: failure)
    with pytest.raises(ConnectionError, match=server.url):
        teacher(server, tmp_path, max_retries=1).chains_of_thought(TRAIN)


def test_unreachable_address_stops_the_run(endpoint, tmp_path):
    # An answer in the log shows that the endpoint lived; two requests are left, too few to count as down.
    teacher(endpoint(lambda prompt, n: answer(GOOD)), tmp_path).chains_of_thought(TRAIN.select([0]))
    with pytest.raises(ConnectionError, match="ConnectError"):
        teacher("http://127.0.0.1:9/v1", tmp_path, max_retries=0).chains_of_thought(TRAIN)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_wrong_key_or_model_stops_at_once(endpoint, tmp_path, status):
    server = endpoint(lambda prompt, n: (status, {}, b'{"error": "who are you"}'))
    with pytest.raises(PermissionError, match=f"{status}.*who are you"):
        teacher(server, tmp_path).chains_of_thought(TRAIN)
    assert set(server.asked.values()) == {1}


BAD_ANSWERS = {
    "title": [lambda title: answer(f"The person keeps to cups, so {title.upper().replace(' ', '  ')} follows now.")],
    "token": [answer(GOOD + " <b_3>"), answer(GOOD + " <|latent|>")],
    "empty": [
        answer(""), answer("  \n"), answer("Cup."), answer("<think>Cups, cups and more cups follow.</think>"),
        answer(None), answer(["a", "list"]),
    ],
    "garbage": [
        answer("x\x00y" * 20), answer("0101 " * 30 + "and some letters for the look"), answer("\ufffd" + GOOD),
        (200, {}, b"<html>gateway</html>"), (200, {}, b"[]"), (200, {}, b'{"choices": []}'), (200, {}, b"\xff"),
        (200, {}, b'{"choices": [{"message": null}]}'), (200, {}, b"[" * 200_000), (200, {}, b"1" * 5000),
        answer(GOOD + " \ud83d"), answer(GOOD + " \ue000"), answer(GOOD + " \uffff"), answer(GOOD + " \u202eydal"),
    ],
    "long": [answer("cup " * 3000)],
    "endpoint": [(400, {}, b'{"error": "filtered"}'), (422, {}, b"")],
}  # fmt: skip


@pytest.mark.parametrize(("reason", "bad"), [(reason, bad) for reason in BAD_ANSWERS for bad in BAD_ANSWERS[reason]])
def test_unusable_answers_are_asked_again_with_the_reason(endpoint, tmp_path, reason, bad):
    shop = Interactions(SHOP.item_ids, [{"title": f"Cup of {name}"} for name in "abcdef"], ["u"], SHOP.histories[:1])

    def reply(prompt, n):
        if n:
            return answer(f"<think>{next_title(prompt)} <a_1></think> {GOOD}\n")
        return bad(next_title(prompt)) if callable(bad) else bad

    server = endpoint(reply)
    one = OpenAITeacher(shop, "tiny", server.url, tmp_path / "log.jsonl", TEMPLATE)
    assert one.chains_of_thought(TRAIN) == [GOOD] * 4
    assert one.counts[f"refused_{reason}"] == 3
    assert sum(REJECTIONS[reason] in prompt for prompt in server.prompts) == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(st.sampled_from(["choices", "usage"]), value),
    max_leaves=6,
)
COUNT = st.integers() | st.floats() | JSON | st.integers(0, 5000).map(lambda digits: "1" * digits)
REPLIES = st.builds(
    lambda text, sent, got: {
        "choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": sent, "completion_tokens": got}
    },
    st.text() | JSON, COUNT, COUNT,
)  # fmt: skip


@given((REPLIES | JSON).map(lambda reply: json.dumps(reply).encode()) | st.binary() | st.just(b'{"a":' * 9000))
@settings(deadline=None)
def test_any_reply_can_be_parsed(content):
    parsed = parse_reply(content)
    assert isinstance(parsed.text, str)
    assert parsed.rejected in (None, "garbage")
    assert all(type(count) is int and 0 <= count <= 10**9 for count in parsed[1:3])


@pytest.mark.parametrize(("sent", "count"), [("Infinity", 0), ("-5", 0), ("1e300", 0), ("NaN", 0), ("12", 12)])
def test_impossible_token_counts_are_ignored(sent, count):
    usage = f'"usage": {{"prompt_tokens": {sent}, "completion_tokens": 3}}'
    reply = f'{{"choices": [{{"message": {{"content": "x"}}}}], {usage}}}'
    assert parse_reply(reply.encode()) == ("x", count, 3, None)


def test_chains_of_an_old_log_are_checked(endpoint, tmp_path):
    server = endpoint(lambda prompt, n: answer(GOOD + "1"))
    teacher(server, tmp_path, concurrency=1).chains_of_thought(TRAIN)
    log = tmp_path / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[0]["chain"], lines[1]["chain"] = GOOD + " \ud83d", GOOD + " It is the cup number 2!"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    server.reply = lambda prompt, n: answer(GOOD + "2")
    for _ in range(2):  # the new answers are known to the second call
        one = teacher(server, tmp_path)
        assert one.chains_of_thought(TRAIN) == [GOOD + "2", GOOD + "2", GOOD + "1", GOOD + "2"]
        assert one.counts["refused_title"] == 1
        assert one.counts["refused_garbage"] == 1
    assert server.asked.total() == 3 + 2


def test_the_template_replaces_unusable_answers(endpoint, tmp_path):
    server = endpoint(lambda prompt, n: answer("no") if next_title(prompt).endswith("2") else answer(GOOD))
    one = teacher(server, tmp_path, max_answers=2)
    with pytest.warns(UserWarning, match="1 of 3"):
        chains = one.chains_of_thought(TRAIN)
    assert chains == [GOOD, TEMPLATE.chain_of_thought([0, 1], 2), GOOD, GOOD]
    assert one.counts == {
        "requests": 3, "accepted": 2, "replaced": 1, "refused_empty": 2, "prompt_tokens": 40, "completion_tokens": 12
    }  # fmt: skip


def test_rejected_requests_are_not_asked_again(endpoint, tmp_path):
    server = endpoint(lambda prompt, n: answer("no") if next_title(prompt).endswith("2") else answer(GOOD))
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 of 3"):
            teacher(server, tmp_path, max_answers=2).chains_of_thought(TRAIN)
    assert server.asked.total() == 2 + 2


MANY = Interactions(
    [str(row) for row in range(40)], [{"title": f"Cup {row} x", "brand": "Hill"} for row in range(40)], ["u"],
    [list(range(40))],
)  # fmt: skip
MANY_TRAIN = samples(leave_one_out(MANY), "train")  # 37 requests


def teacher_of_many(server, tmp_path, **options):
    options = {"timeout": 5.0, "max_answers": 1} | options
    return OpenAITeacher(MANY, "tiny", server.url, tmp_path / "log.jsonl", TemplateTeacher(MANY), **options)


def number(prompt):
    return int(next_title(prompt).split()[1])


def test_garbage_only_stops_the_run(endpoint, tmp_path):
    server = endpoint(lambda prompt, n: (200, {}, b"welcome to this network, please log in"))
    with pytest.raises(ConnectionError, match="20 requests"):
        teacher_of_many(server, tmp_path, concurrency=1).chains_of_thought(MANY_TRAIN)
    assert len(server.asked) == 20
    with pytest.warns(UserWarning, match="37 of 37"):  # asks the other 17, too few to stop again
        teacher_of_many(server, tmp_path, concurrency=1).chains_of_thought(MANY_TRAIN)
    assert server.asked.total() == 37


def test_rejections_of_an_earlier_run_do_not_stop_the_next(endpoint, tmp_path):
    server = endpoint(lambda prompt, n: answer("no" if number(prompt) <= 30 else GOOD))
    first, second = MANY_TRAIN.select(range(36, 9, -1)), MANY_TRAIN  # accepted ones first; rejected ones first
    with pytest.warns(UserWarning, match="20 of 27"):
        teacher_of_many(server, tmp_path, concurrency=1).chains_of_thought(first)
    server.asked.clear()
    with pytest.warns(UserWarning, match="30 of 37"):
        teacher_of_many(server, tmp_path, concurrency=1).chains_of_thought(second)
    assert len(server.asked) == 10


@pytest.mark.parametrize("failure", [(500, SOON, b"bug"), None])
@pytest.mark.parametrize("bad", [2, 3])
def test_request_that_is_never_answered_is_left_to_the_template(endpoint, tmp_path, failure, bad):
    server = endpoint(lambda prompt, n: failure if next_title(prompt).endswith(str(bad)) else answer(GOOD))
    for tries in (2, 4):  # the next run tries again
        one = teacher(server, tmp_path, concurrency=1, max_retries=1, max_answers=2)
        with pytest.warns(UserWarning, match="1 of 3"):
            chains = one.chains_of_thought(TRAIN)
        assert [chain == GOOD for chain in chains] == [target != bad for target in (1, 2, 3, 1)]
        assert server.asked.total() == 2 + tries


def test_endpoint_that_goes_down_stops_the_run(endpoint, tmp_path):
    server = endpoint(lambda prompt, n: (503, SOON, b"") if number(prompt) > 5 else answer(GOOD))
    with pytest.raises(ConnectionError, match="503"):
        teacher_of_many(server, tmp_path, concurrency=2, max_retries=1).chains_of_thought(MANY_TRAIN)
    assert len(server.asked) <= 5 + 8 + 2
    assert all("chain" in json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    server.reply = lambda prompt, n: answer(GOOD)
    assert teacher_of_many(server, tmp_path).chains_of_thought(MANY_TRAIN) == [GOOD] * 37


def test_stopped_run_continues(endpoint, tmp_path):
    server = endpoint(lambda prompt, n: (401, {}, b"") if next_title(prompt).endswith("3") else answer(GOOD + "1"))
    with pytest.raises(PermissionError):
        teacher(server, tmp_path, concurrency=1).chains_of_thought(TRAIN)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"key": "torn')  # a killed run may leave half a line
    server.reply = lambda prompt, n: answer(GOOD + "2")
    server.asked.clear()
    one = teacher(server, tmp_path)
    assert one.chains_of_thought(TRAIN) == [GOOD + "1", GOOD + "1", GOOD + "2", GOOD + "1"]
    assert server.asked.total() == 1
    assert one.counts["prompt_tokens"] == 30
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [sorted(line) for line in lines] == [["chain", "completion_tokens", "key", "prompt_tokens"]] * 3


def test_other_model_is_another_request(endpoint, tmp_path):
    server = endpoint(lambda prompt, n: answer(GOOD + str(n)))
    one = teacher(server, tmp_path)
    other = OpenAITeacher(SHOP, "other", server.url, tmp_path / "log.jsonl", TEMPLATE)
    assert one.chains_of_thought(TRAIN) == [GOOD + "0"] * 4
    assert other.chains_of_thought(TRAIN) == [GOOD + "1"] * 4
    assert other.counts["prompt_tokens"] == 30  # of its own requests


def test_counts_are_those_of_the_call(endpoint, tmp_path):
    one = teacher(endpoint(lambda prompt, n: answer(GOOD)), tmp_path)
    one.chains_of_thought(TRAIN)
    one.chains_of_thought(TRAIN.select([1]))
    assert one.counts == {
        "requests": 1, "accepted": 1, "replaced": 0, "prompt_tokens": 10, "completion_tokens": 3
    }  # fmt: skip


def test_key_of_a_request_is_stable(endpoint, tmp_path):
    # A changed prompt or hash would make every answer in existing logs useless.
    teacher(endpoint(lambda prompt, n: answer(GOOD)), tmp_path).chains_of_thought(TRAIN.select([0]))
    key = json.loads((tmp_path / "log.jsonl").read_text())["key"]
    assert key == "77f4bf8a0b11fe222babfcb1a04fff64f0eda9dcb7ecc2ffc376614dee4814fd"


def test_answers_are_on_disk_before_the_next_request(endpoint, tmp_path):
    lines = []

    def reply(prompt, n):
        lines.append(len((tmp_path / "log.jsonl").read_bytes().splitlines()))
        return answer(GOOD)

    teacher(endpoint(reply), tmp_path, concurrency=1).chains_of_thought(TRAIN)
    assert lines == [0, 1, 2]


GOOD_LINE = '{"key": "k", "chain": "c", "prompt_tokens": 1, "completion_tokens": 1}\n'


@pytest.mark.parametrize(
    "line",
    ['{"key": 1\n', GOOD_LINE.replace('"c"', "null"), GOOD_LINE.replace('"k"', "1"), "[" * 100_000 + "\n", "[]\n"],
)
def test_broken_line_of_the_log_is_named(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_text(GOOD_LINE + line)
    with pytest.raises(ValueError, match=r"log\.jsonl: line 2"):
        AnswerLog(path)


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"max_answers": 0}, {"max_retries": -1}])
def test_bad_arguments(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        teacher("http://127.0.0.1:9", tmp_path, **options)


@pytest.mark.parametrize("url", ["localhost:8000", "file:///etc/passwd", "http://user:secret@localhost/v1"])
def test_bad_base_url(tmp_path, url):
    with pytest.raises(ValueError, match="base_url") as error:
        teacher(url, tmp_path)
    assert "secret" not in str(error.value)


def test_missing_openai_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "lasar_hf.reasoning.openai_teacher")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"lasar_hf\[teacher\]"):
        importlib.import_module("lasar_hf.reasoning.openai_teacher")


def reason_for(text, item):
    return rejection_reason(f"The person keeps to cups. Next follows {text} or so.", *identifying_names(item))


def test_title_is_searched_as_shown():
    assert reason_for("Blue Mug Large", {"title": "Blue <a_1> Mug Large"}) == "title"
    assert reason_for("Blue Mug", {"title": "Blue <a_1> Mug Large"}) is None


def test_shortened_title_is_searched():
    title = " ".join(f"word{number}" for number in range(80))
    assert reason_for(title, {"title": title}) == "title"
    assert reason_for(title[:300], {"title": title}) == "title"
    assert reason_for(title[: title.index(" ", 300)], {"title": title}) == "title"  # the last word, completed
    assert reason_for("y" * 300, {"title": "y" * 480}) == "title"
    assert reason_for("word0 word1 word2", {"title": title}) is None


def test_item_without_title_is_identified_by_its_first_words():
    item = {"description": "A tall glass, hand-blown in Murano. It holds wine.", "brand": "Hill"}
    assert reason_for("a tall glass hand blown in Venice", item) == "title"
    assert reason_for("a tall glass, hand-made", item) is None
    assert reason_for("a glass by Hill", item) is None
    assert reason_for("a tall glass hand blown in Venice", item | {"title": "Vase"}) is None
    assert reason_for("a tall glass hand blown in Venice", item | {"title": "<|latent|> 7"}) == "title"


@pytest.mark.parametrize("item", [{"brand": "Hill"}, {"title": "7"}, {"description": "A tall glass."}])
def test_item_that_nothing_identifies(item):
    assert identifying_names(item) == ()
