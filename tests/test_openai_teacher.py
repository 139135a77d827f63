"""The teacher behind an endpoint, against a local server that is slow, broken, busy and hostile."""

import gzip
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasar_hf.data import Interactions, leave_one_out, samples
from lasar_hf.data.storage import save_texts
from lasar_hf.reasoning import TemplateTeacher, openai_teacher
from lasar_hf.reasoning.leakage import REJECTIONS, bare, rejection_reason
from lasar_hf.reasoning.openai_teacher import OpenAITeacher, _parsed
from lasar_hf.reasoning.teacher_log import TeacherLog


GOOD = "The person keeps to cups. A cup of another colour is due."
SHOP = Interactions(
    [f"i{row}" for row in range(6)],
    [{"title": f"Cup Number {row} <a_{row}>", "brand": "Hill"} for row in range(6)],
    ["u", "v"], [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3]],
)  # fmt: skip
SPLIT = leave_one_out(SHOP)
TRAIN = samples(SPLIT, "train")  # 0 > 1, 01 > 2, 012 > 3; 0 > 1 again
TEMPLATE = TemplateTeacher(SHOP, SPLIT)


def answer(text, **more):
    usage = {"prompt_tokens": 10, "completion_tokens": 3}
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}], "usage": usage} | more).encode()


class Endpoint(ThreadingHTTPServer):
    """Answers as `reply(prompt, n)` says, for the n-th request with that prompt's items: status, headers, body."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.lock = reply, threading.Lock()
        self.asked, self.prompts, self.headers, self.busy, self.most_busy = Counter(), [], [], 0, 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        items = next(line for line in prompt.splitlines() if line.startswith("{"))
        with server.lock:
            nth = server.asked[items]
            server.asked[items] += 1
            server.prompts.append(prompt)
            server.headers.append((self.path, dict(self.headers), body))
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        reply = server.reply(prompt, nth)
        with server.lock:
            server.busy -= 1
        if reply is None:  # hang up without a word
            self.close_connection = True
            return
        status, headers, content = reply
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # the client did not wait
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    """Start a server with a given behaviour."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    servers = []

    def start(reply):
        servers.append(Endpoint(reply))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def teacher(server, tmp_path, **options):
    options = {"backoff": 0.01, "timeout": 5.0} | options
    url = server if isinstance(server, str) else server.url
    return OpenAITeacher(SHOP, "tiny", url, tmp_path / "log.jsonl", TEMPLATE, **options)


def next_title(prompt):
    return json.loads(next(line for line in prompt.splitlines() if line.startswith("{")))["next"]["title"]


def test_chains_in_order_each_request_once(endpoint, tmp_path):
    server = endpoint(lambda prompt, nth: answer(GOOD + "!" * int(next_title(prompt)[-1])))
    one = teacher(server, tmp_path)
    chains = one.chains_of_thought(TRAIN)
    assert chains == [GOOD + "!" * number for number in (1, 2, 3, 1)]
    assert set(server.asked.values()) == {1} and len(server.asked) == 3
    assert one.counts == {
        "requests": 3, "accepted": 3, "replaced": 0, "prompt_tokens": 30, "completion_tokens": 9
    }  # fmt: skip
    path, headers, body = server.headers[0]
    assert path == "/v1/chat/completions" and body["model"] == "tiny" and "Authorization" not in headers
    assert "never write its title" in body["messages"][0]["content"].lower()
    assert "<a_" not in body["messages"][0]["content"] and '"Cup Number 0"' in body["messages"][0]["content"]


def test_the_key_comes_from_the_environment(endpoint, tmp_path, monkeypatch):
    server = endpoint(lambda prompt, nth: answer(GOOD))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "hf_not_for_this_endpoint")
    teacher(server, tmp_path).chains_of_thought(TRAIN)
    assert {headers["Authorization"] for _, headers, _ in server.headers} == {"Bearer secret"}
    assert "secret" not in (tmp_path / "log.jsonl").read_text()
    monkeypatch.delenv("OPENAI_API_KEY")
    (tmp_path / "log.jsonl").unlink()
    server.headers.clear()
    teacher(server, tmp_path).chains_of_thought(TRAIN)
    assert not any("Authorization" in headers for _, headers, _ in server.headers)


def test_no_more_requests_at_a_time_than_allowed(endpoint, tmp_path):
    shop = Interactions(
        [f"i{row}" for row in range(12)], [{"title": f"Cup Number {row}"} for row in range(12)], ["u"],
        [list(range(12))],
    )  # fmt: skip
    train = samples(leave_one_out(shop), "train")
    for limit in (1, 3):
        together = threading.Barrier(limit, timeout=20)  # no answer before so many requests are there

        def reply(prompt, nth, together=together):
            together.wait()
            return answer(GOOD)

        server = endpoint(reply)
        OpenAITeacher(shop, "tiny", server.url, tmp_path / f"{limit}", TEMPLATE, limit).chains_of_thought(train)
        assert server.most_busy == limit and len(server.asked) == 9


@pytest.mark.parametrize(
    "trouble",
    [(429, {"Retry-After": "0.01"}, b"slow down"), (500, {}, b""), (503, {"Retry-After": "soon"}, b"<html>"), None],
)
def test_busy_and_broken_connections_are_tried_again(endpoint, tmp_path, trouble):
    server = endpoint(lambda prompt, nth: trouble if nth < 2 else answer(GOOD))
    one = teacher(server, tmp_path)
    assert one.chains_of_thought(TRAIN) == [GOOD] * 4
    assert set(server.asked.values()) == {3} and one.counts["accepted"] == 3


def test_the_endpoint_says_how_long_to_wait(endpoint, tmp_path):
    server = endpoint(lambda prompt, nth: (429, {"Retry-After": "0.4"}, b"") if nth < 1 else answer(GOOD))
    begin = time.perf_counter()
    teacher(server, tmp_path).chains_of_thought(TRAIN)
    assert time.perf_counter() - begin > 0.4


def test_but_no_longer_than_a_minute(endpoint, tmp_path, monkeypatch):
    assert openai_teacher._LONGEST_WAIT == 60.0
    monkeypatch.setattr(openai_teacher, "_LONGEST_WAIT", 0.1)
    for asked in ("3600", "9" * 400):
        busy = 429, {"Retry-After": asked}, b""
        server = endpoint(lambda prompt, nth, busy=busy: busy if nth < 1 else answer(GOOD))
        begin = time.perf_counter()
        teacher(server, tmp_path / asked[:4]).chains_of_thought(TRAIN)
        assert 0.1 < time.perf_counter() - begin < 5


def test_slow_answers_are_tried_again(endpoint, tmp_path):
    def reply(prompt, nth):
        time.sleep(0.0 if nth else 1.0)
        return answer(GOOD)

    server = endpoint(reply)
    assert teacher(server, tmp_path, timeout=0.3).chains_of_thought(TRAIN) == [GOOD] * 4
    assert set(server.asked.values()) == {2}


def test_a_dead_endpoint_stops_the_run(tmp_path, endpoint):
    server = endpoint(lambda prompt, nth: None)
    with pytest.raises(ConnectionError, match=r"gave no answer in 2 tries .* run again to go on"):
        teacher(server, tmp_path, max_tries=2).chains_of_thought(TRAIN)
    with pytest.raises(ConnectionError, match=r"gave no answer in 2 tries \(last: ClientConnectorError"):
        teacher("http://127.0.0.1:9/v1", tmp_path, max_tries=2).chains_of_thought(TRAIN)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_stops_at_once(endpoint, tmp_path, status):
    server = endpoint(lambda prompt, nth: (status, {}, b'{"error": "who are you"}'))
    with pytest.raises(PermissionError, match=rf"refuses 'tiny' \(status {status}\): .*who are you"):
        teacher(server, tmp_path).chains_of_thought(TRAIN)
    assert set(server.asked.values()) == {1}


HOSTILE = {
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
        answer(GOOD, more="x" * 5_000_000),
        (200, {"Content-Encoding": "gzip"}, gzip.compress(answer(GOOD, more="x" * 50_000_000)[2])),
    ],
    "long": [answer("cup " * 3000)],
    "endpoint": [(400, {}, b'{"error": "filtered"}'), (422, {}, b"")],
}  # fmt: skip


@pytest.mark.parametrize(("reason", "bad"), [(reason, bad) for reason, all_bad in HOSTILE.items() for bad in all_bad])
def test_unusable_answers_are_asked_for_again_saying_why(endpoint, tmp_path, reason, bad):
    shop = Interactions(SHOP.item_ids, [{"title": f"Cup of {name}"} for name in "abcdef"], ["u"], SHOP.histories[:1])

    def reply(prompt, nth):
        if nth:
            return answer(f"<think>{next_title(prompt)} <a_1></think> {GOOD}\n")
        return bad(next_title(prompt)) if callable(bad) else bad

    server = endpoint(reply)
    one = OpenAITeacher(shop, "tiny", server.url, tmp_path / "log.jsonl", TEMPLATE, backoff=0.01)
    assert one.chains_of_thought(TRAIN) == [GOOD] * 4
    assert one.counts[f"refused_{reason}"] == one.counts["accepted"] == 3
    assert len([prompt for prompt in server.prompts if REJECTIONS[reason] in prompt]) == 3


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
def test_any_reply_can_be_read(content):
    text, sent, got, refused = _parsed(content)
    assert isinstance(text, str) and refused in (None, "garbage")
    assert all(type(count) is int and 0 <= count <= 10**9 for count in (sent, got))


@pytest.mark.parametrize(("told", "count"), [("Infinity", 0), ("-5", 0), ("1e300", 0), ("NaN", 0), ("12", 12)])
def test_tokens_that_cannot_be_are_not_counted(told, count):
    usage = f'"usage": {{"prompt_tokens": {told}, "completion_tokens": 3}}'
    reply = f'{{"choices": [{{"message": {{"content": "x"}}}}], {usage}}}'
    assert _parsed(reply.encode()) == ("x", count, 3, None)


def test_chains_in_an_old_log_are_checked_too(endpoint, tmp_path):
    server = endpoint(lambda prompt, nth: answer(GOOD + "1"))
    teacher(server, tmp_path, concurrency=1).chains_of_thought(TRAIN)
    log = tmp_path / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[0]["chain"], lines[1]["chain"] = GOOD + " \ud83d", GOOD + " It is the cup number 2!"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    server.reply = lambda prompt, nth: answer(GOOD + "2")
    for _ in range(2):  # what took their place is known from then on
        one = teacher(server, tmp_path)
        chains = one.chains_of_thought(TRAIN)
        assert chains == [GOOD + "2", GOOD + "2", GOOD + "1", GOOD + "2"]
        assert one.counts["accepted"] == 3 and one.counts["refused_title"] == one.counts["refused_garbage"] == 1
        save_texts([chains], tmp_path / "chains.arrow")
    assert server.asked.total() == 5


def test_the_template_writes_what_the_model_does_not(endpoint, tmp_path):
    server = endpoint(lambda prompt, nth: answer("no") if next_title(prompt).endswith("2") else answer(GOOD))
    one = teacher(server, tmp_path, max_answers=2)
    with pytest.warns(UserWarning, match="1 of 3 chains of thought are the template's: tiny gave no answer"):
        chains = one.chains_of_thought(TRAIN)
    assert chains == [GOOD, TEMPLATE.chain_of_thought([0, 1], 2), GOOD, GOOD]
    assert one.counts == {
        "requests": 3, "accepted": 2, "replaced": 1, "refused_empty": 2, "prompt_tokens": 40, "completion_tokens": 12
    }  # fmt: skip
    asked = server.asked.total()
    with pytest.warns(UserWarning, match="the template's"):  # known: not asked for again
        assert teacher(server, tmp_path, max_answers=2).chains_of_thought(TRAIN) == chains
    assert server.asked.total() == asked


MANY = Interactions(
    [str(row) for row in range(40)], [{"title": f"Cup {row} x", "brand": "Hill"} for row in range(40)], ["u"],
    [list(range(40))],
)  # fmt: skip
MANY_TRAIN = samples(leave_one_out(MANY), "train")


def many(server, tmp_path, **options):
    options = {"backoff": 0.001, "timeout": 5.0, "max_answers": 1} | options
    return OpenAITeacher(MANY, "tiny", server.url, tmp_path / "log.jsonl", TemplateTeacher(MANY), **options)


def number(prompt):
    return int(next_title(prompt).split()[1])


def test_an_endpoint_of_garbage_stops_the_run(endpoint, tmp_path):
    server = endpoint(lambda prompt, nth: (200, {}, b"welcome to this network, please log in"))
    with pytest.raises(ConnectionError, match=r"no answer that could be used to 20 requests .*not plain text"):
        many(server, tmp_path, concurrency=1).chains_of_thought(MANY_TRAIN)
    assert len(server.asked) == 20
    with pytest.warns(UserWarning, match="37 of 37 chains"):  # 17 were asked: those known already do not count
        many(server, tmp_path, concurrency=1).chains_of_thought(MANY_TRAIN)
    assert len(server.asked) == server.asked.total() == 37


def test_refusals_of_an_earlier_run_do_not_stop_the_next(endpoint, tmp_path):
    server = endpoint(lambda prompt, nth: answer("no" if number(prompt) <= 30 else GOOD))
    first, second = MANY_TRAIN.select(range(36, 9, -1)), MANY_TRAIN  # the accepted first; the refused first
    with pytest.warns(UserWarning, match="20 of 27 chains"):
        many(server, tmp_path, concurrency=1).chains_of_thought(first)
    server.asked.clear()
    with pytest.warns(UserWarning, match="30 of 37 chains"):
        many(server, tmp_path, concurrency=1).chains_of_thought(second)
    assert len(server.asked) == 10


@pytest.mark.parametrize("trouble", [(500, {}, b"bug"), (503, {}, b""), None])
@pytest.mark.parametrize("bad", [2, 3])
def test_a_request_that_never_gets_an_answer_is_passed_over(endpoint, tmp_path, trouble, bad):
    server = endpoint(lambda prompt, nth: trouble if next_title(prompt).endswith(str(bad)) else answer(GOOD))
    options = {"concurrency": 1, "max_tries": 2, "max_answers": 2}
    for tries in (2, 4, 4):  # the next run tries once more, the one after takes it as known
        one = teacher(server, tmp_path, **options)
        with pytest.warns(UserWarning, match="1 of 3 chains of thought are the template's"):
            chains = one.chains_of_thought(TRAIN)
        assert [chain == GOOD for chain in chains] == [row + 1 != bad for row in (0, 1, 2, 0)]
        assert one.counts["refused_endpoint"] == tries // 2 and one.counts["accepted"] == 2
        assert server.asked.total() == 2 + tries


def test_an_endpoint_that_goes_down_stops_the_run_and_loses_nothing(endpoint, tmp_path):
    server = endpoint(lambda prompt, nth: (503, {}, b"") if number(prompt) > 5 else answer(GOOD))
    with pytest.raises(ConnectionError, match=r"no answer in 2 tries \(last: status 503\).*run again to go on"):
        many(server, tmp_path, concurrency=2, max_tries=2).chains_of_thought(MANY_TRAIN)
    assert len(server.asked) <= 5 + 8 + 2
    assert all("chain" in json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    server.reply = lambda prompt, nth: answer(GOOD)
    one = many(server, tmp_path)
    assert one.chains_of_thought(MANY_TRAIN) == [GOOD] * 37 and one.counts["replaced"] == 0


def test_an_address_nobody_answers_at_stops_the_run(endpoint, tmp_path):
    teacher(endpoint(lambda prompt, nth: answer(GOOD)), tmp_path).chains_of_thought(TRAIN.select([0]))
    with pytest.raises(ConnectionError, match=r"no answer in 2 tries \(last: ClientConnectorError"):
        teacher("http://127.0.0.1:9/v1", tmp_path, max_tries=2).chains_of_thought(TRAIN)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_a_stopped_run_goes_on_and_asks_nothing_twice(endpoint, tmp_path):
    server = endpoint(lambda prompt, nth: (401, {}, b"") if next_title(prompt).endswith("3") else answer(GOOD + "1"))
    with pytest.raises(PermissionError):
        teacher(server, tmp_path, concurrency=1).chains_of_thought(TRAIN)
    log = tmp_path / "log.jsonl"
    assert len(log.read_text().splitlines()) == 2
    with log.open("a") as file:
        file.write('{"key": "torn')  # what a kill may leave
    server.reply = lambda prompt, nth: answer(GOOD + "2")
    server.asked.clear()
    one = teacher(server, tmp_path)
    assert one.chains_of_thought(TRAIN) == [GOOD + "1", GOOD + "1", GOOD + "2", GOOD + "1"]
    assert len(server.asked) == 1 and one.counts["prompt_tokens"] == 30
    assert [sorted(json.loads(line)) for line in log.read_text().splitlines()] == [
        ["chain", "completion_tokens", "key", "prompt_tokens"]
    ] * 3
    other = OpenAITeacher(SHOP, "other", server.url, log, TEMPLATE)  # another model is another request
    assert other.chains_of_thought(TRAIN) == [GOOD + "2"] * 4
    assert other.counts["prompt_tokens"] == 30 and other.counts["completion_tokens"] == 9  # its own
    assert one.chains_of_thought(TRAIN.select([1])) == [GOOD + "1"]
    assert one.counts == {
        "requests": 1, "accepted": 1, "replaced": 0, "prompt_tokens": 10, "completion_tokens": 3
    }  # fmt: skip


def test_each_answer_is_on_the_disk_before_the_next_request(endpoint, tmp_path):
    known = []

    def reply(prompt, nth):
        known.append(len((tmp_path / "log.jsonl").read_bytes().splitlines()))
        return answer(GOOD)

    teacher(endpoint(reply), tmp_path, concurrency=1).chains_of_thought(TRAIN)
    assert known == [0, 1, 2]


def test_a_broken_line_inside_the_log_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    good = '{"key": "k", "chain": "c", "prompt_tokens": 1, "completion_tokens": 1}\n'
    for bad in ('{"key": 1\nx\n', good.replace('"c"', "null"), good.replace('"k"', "1"), "[" * 100_000 + "\n"):
        path.write_text(good + bad)
        with pytest.raises(ValueError, match=r"log.jsonl: line 2 is no answer"):
            TeacherLog(path)


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"max_answers": 0}, {"max_tries": 0}])
def test_bad_arguments(tmp_path, options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` is 0"):
        teacher("http://127.0.0.1:9", tmp_path, **options)
    with pytest.raises(ValueError, match="`base_url` is 'localhost:8000'"):
        teacher("localhost:8000", tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        GOOD + " 🙂 (½ — “ok”)",
        "האיש אוסף כוסות.\u200f הבאה תהיה אדומה.",
        "Der Nächste ist ein Band der Reihe.",
        "这个人一直在买同一个系列的书，下一本也来自这个系列。",
    ],
)
def test_text_of_any_language_is_good(text):
    assert rejection_reason(text, "Silent Harbor, Volume Six") is None


@pytest.mark.parametrize(
    ("title", "named"),
    [
        ("Silent Harbor, Volume Six", "Sil\u200bent\u00a0HARBOR, volume six"),
        ("Silent Harbor, Volume Six", "Ｓilent Harbor, Volume Six"),
        ("Silent Harbor, Volume Six", "silent\nharbor, VOLUME  SIX"),
        ("Silent Harbor, Volume Six", "Silent *Harbor* Volume Six"),
        ("Silent Harbor, Volume Six", "Silent Harbor, Volume Six's heir"),
        ("Levi's Jeans", "Levi\u2019s Jeans"),
        ("Wi-Fi Lamp", "Wi\u2011Fi Lamp"),
        ("Wi\u2013Fi Lamp", "Wi-Fi Lamp"),
        ("Café Mug Deluxe", "Cafe Mug Deluxe"),
        ("Cafe Mug Deluxe", "cafe\u0301 mug deluxe"),
        ("İstanbul", "istanbul"),
        ("ISTANBUL", "İstanbul"),
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("Tom & Jerry", "tom &amp; jerry"),
        ('Mug 3" Wide', "mug 3\u2033 wide"),
        ("Gauge™ Pro", "Gauge Pro"),
        ("静港第六卷", "系列的静港第六卷这本书"),  # no spaces between words
        ("머그컵", "머그컵을"),  # an ending on the word
    ],
)
def test_a_title_in_other_typography_is_seen(title, named):
    assert rejection_reason(f"So the next that may well follow is {named}, of course.", title) == "title"


@pytest.mark.parametrize("title", ["Art", "It", "e", "7", ".", "™", "", "person of", "Volume Fivefold"])
def test_words_that_only_begin_like_a_title_are_no_leak(title):
    assert rejection_reason("The party of people of smart taste took part: Volume Five fits.", title) is None


def names_of(item):
    """What the teacher looks for where `item` is the target."""
    items = [item, {"title": "Cup Number 1"}, {"title": "Cup Number 2"}]
    shop = Interactions(["a", "b", "c"], items, ["u"], [[0, 1, 2]])
    return OpenAITeacher(shop, "tiny", "http://x", "unused", TEMPLATE)._names[0]


def seen(named, item):
    return rejection_reason(f"The person keeps to cups. Next follows {named} or so.", *names_of(item))


def test_the_title_is_looked_for_as_it_was_shown():
    assert seen("Blue Mug Large", {"title": "Blue <a_1> Mug Large"}) == "title"
    assert seen("Blue Mug", {"title": "Blue <a_1> Mug Large"}) is None
    long = " ".join(f"word{number}" for number in range(80))
    assert seen(long, {"title": long}) == "title"
    assert seen(long[:300], {"title": long}) == "title"
    assert seen(long[: long.index(" ", 300)], {"title": long}) == "title"  # the word that was cut, made whole
    assert seen("y" * 300, {"title": "y" * 480}) == "title"
    assert seen("word0 word1 word2", {"title": long}) is None


def test_an_item_without_a_title_is_known_by_its_first_words():
    item = {"description": "A tall glass, hand-blown in Murano. It holds wine.", "brand": "Hill"}
    assert seen("a tall glass hand blown in Venice", item) == "title"
    assert seen("a tall glass, hand-made", item) is None
    assert seen("a glass by Hill", item) is None
    assert seen("a tall glass hand blown in Venice", item | {"title": "Vase"}) is None
    assert seen("A tall glass.", {"description": "A tall glass."}) is None  # so few words tell no item from others
    assert seen("a tall glass hand blown in Venice", item | {"title": "<|latent|> 7"}) == "title"
    assert names_of({"brand": "Hill"}) == names_of({"title": "7"}) == ()


@given(st.text(max_size=60), st.text(min_size=1, max_size=12), st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_a_title_inside_any_text_is_refused(before, title, after):
    if sum(letter.isalnum() for letter in bare(title)) > 1:
        assert rejection_reason(f"{before} {title} {after} and then some more words follow", title) is not None
