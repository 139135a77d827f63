"""No secret leaves the process: not in errors, tracebacks, logs, output or files, however an endpoint repeats it."""

import base64
import html
import io
import json
import logging
import re
import signal
import time
import traceback
import warnings
from dataclasses import asdict
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from rich.console import Console
from rich.traceback import Traceback

from lasar_hf import LasarSFTConfig
from lasar_hf.commands.prepare import PrepareArguments, card_settings
from lasar_hf.data import Interactions, leave_one_out, samples
from lasar_hf.reasoning import TemplateTeacher
from lasar_hf.reasoning import openai_teacher as module
from lasar_hf.reasoning.openai_teacher import OpenAITeacher, contains_key
from tests.teacher_endpoint import GOOD, answer
from tests.training import sft_trainer


KEY = "sk-proj-Tr0ub4dor&3-correct-horse"
SHOP = Interactions(
    [f"i{row}" for row in range(4)], [{"title": f"Cup Number {row}"} for row in range(4)], ["u"], [[0, 1, 2, 3]]
)
TRAIN = samples(leave_one_out(SHOP), "train")  # one request
SOON = {"Retry-After": "0.01"}  # keeps the client's back-off short
PIECE = 10  # characters of the key beyond its public start `sk-proj-`


def spellings(key: str = KEY) -> dict[str, str]:
    """The key in the forms in which an endpoint may repeat it."""
    basic = base64.b64encode(f"user:{key}".encode()).decode()
    return {
        "plain": key,
        "bearer": f"Bearer {key}",
        "upper case": key.upper(),
        "lower case": key.lower(),
        "percent": quote(key, safe=""),
        "percent everything": "".join(f"%{ord(letter):02x}" for letter in key),
        "JSON escapes": "".join(f"\\u{ord(letter):04x}" for letter in key),
        "HTML entities": html.escape(key),
        "HTML numbers": "".join(f"&#{ord(letter)};" for letter in key),
        "base64": base64.b64encode(key.encode()).decode(),
        "basic": f"Basic {basic}",
        "hexadecimal": key.encode().hex(),
        "cut": key[: 8 + PIECE],
        "end": key[-PIECE - 4 :],
        "backwards": key[::-1],
        "spaced": " ".join(key),
    }


FORMS = spellings()


def leaks(text: str) -> list[str]:
    """The forms of the key that stand in a text; any piece of them counts."""
    text = text.casefold()
    found = []
    for name, form in FORMS.items():
        form = form.casefold().removeprefix("bearer ").removeprefix("basic ")
        form = form.removeprefix("sk-proj-")
        size = len(form) if len(form) < 2 * PIECE else len(form) // 2
        if any(form[start : start + size] in text for start in range(len(form) - size + 1)):
            found.append(name)
    return found


@pytest.fixture
def everything(monkeypatch, caplog, capsys, tmp_path):
    """Sets the key, logs all that is logged, and collects what a program shows or leaves behind."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx2", "httpcore2", "httpcore2.http11", "httpcore2.connection"):
        caplog.set_level(logging.DEBUG, name)
    texts = []

    def collect(error: BaseException | None = None) -> str:
        if error is not None:
            texts.append(repr(error))
            texts.extend(traceback.format_exception(error))
            # With the local variables of every frame, as some tools show them.
            texts.extend(traceback.TracebackException.from_exception(error, capture_locals=True).format())
            console = Console(file=io.StringIO(), width=200)
            console.print(Traceback.from_exception(type(error), error, error.__traceback__, show_locals=True))
            texts.append(console.file.getvalue())
            while error is not None:  # also what is not shown
                texts.append(f"{error!r} {vars(error)}")
                error = error.__context__ or error.__cause__
        files = [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
        return "\n".join([*texts, caplog.text, *capsys.readouterr(), *files])

    return collect


def teacher(server, tmp_path, **options):
    url = server if isinstance(server, str) else server.url
    template = TemplateTeacher(SHOP)
    options = {"timeout": 5.0, "max_retries": 1, "max_answers": 1} | options
    return OpenAITeacher(SHOP, "tiny", url, tmp_path / "log.jsonl", template, **options)


def ask(one: OpenAITeacher) -> BaseException | None:
    """The error of a run, `None` if it has none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            one.chains_of_thought(TRAIN)
        except (OSError, ValueError, RuntimeError, KeyboardInterrupt) as error:
            return error
        finally:
            logging.getLogger("warnings").info("%s", [str(warning.message) for warning in caught])
    return None


def test_the_check_of_these_tests_sees_every_form():
    for name, form in FORMS.items():
        assert leaks(f"an answer with {form} in it"), name
    assert not leaks("an answer about sk-proj- and nothing else, refused with status 401")


# Replies that refuse the request


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("status", [401, 403])
def test_body_that_repeats_the_key(endpoint, tmp_path, everything, status, form):
    body = f'{{"error": {{"message": "bad key: {FORMS[form]}", "code": "{FORMS[form]}"}}}}'.encode()
    server = endpoint(lambda prompt, n: (status, SOON, body))
    error = ask(teacher(server, tmp_path))
    assert str(status) in str(error)
    assert not leaks(everything(error))


@pytest.mark.parametrize("status", [301, 307, 400, 402, 404, 408, 409, 413, 418, 422, 429, 451, 500, 502, 503, 529])
def test_every_status(endpoint, tmp_path, everything, status):
    body = f"<html>{KEY}</html>".encode()
    headers = SOON | {"X-Echo": KEY, "WWW-Authenticate": f'Bearer realm="{KEY}"', "Location": f"/other?key={KEY}"}
    server = endpoint(lambda prompt, n: (status, headers, body))
    assert not leaks(everything(ask(teacher(server, tmp_path))))


BODIES = {
    "not JSON": KEY.encode(),
    "cut": json.dumps({"error": {"message": "x" * 290 + KEY}}).encode()[:330],
    "utf-16": f"bad key {KEY}".encode("utf-16"),
    "nested": b'{"error":' * 2000 + KEY.encode(),
    "bytes": b"\xff\xfe" + KEY.encode() + b"\x00",
    "empty": b"",
}


@pytest.mark.parametrize("body", BODIES)
def test_malformed_bodies(endpoint, tmp_path, everything, body):
    server = endpoint(lambda prompt, n: (401, {"X-Request-Id": KEY, "Set-Cookie": KEY}, BODIES[body]))
    assert not leaks(everything(ask(teacher(server, tmp_path))))


def test_chunked_body_and_status_line(raw_endpoint, tmp_path, everything):
    half = len(KEY) // 2
    chunks = "".join(f"{len(part):x}\r\n{part}\r\n" for part in (f"bad {KEY[:half]}", KEY[half:]))
    url = raw_endpoint(f"HTTP/1.1 401 {KEY}\r\nX-Key: {KEY}\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}0\r\n\r\n")
    assert not leaks(everything(ask(teacher(url, tmp_path))))


@pytest.mark.parametrize(
    "reply",
    [
        f"HTTP/1.1 {KEY}\r\n\r\n",  # no status
        f"{KEY}\r\n\r\n",
        f"HTTP/1.1 200 OK\r\nContent-Length: {KEY}\r\n\r\n",
        f"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{KEY}",  # hangs up in the body
        f"HTTP/1.1 200 OK\r\n{KEY}\r\n\r\n",  # no header
        f"HTTP/1.1 401 No\r\nContent-Encoding: gzip\r\nContent-Length: {len(KEY)}\r\n\r\n{KEY}",  # not packed
    ],
)
def test_broken_http(raw_endpoint, tmp_path, everything, reply):
    error = ask(teacher(raw_endpoint(reply), tmp_path))
    assert error is not None
    assert not leaks(everything(error))


# Replies with an answer


HIDDEN = [name for name in FORMS if name not in ("backwards", "spaced", "JSON escapes")]


@pytest.mark.parametrize("form", HIDDEN)
def test_answer_with_the_key_is_not_kept(endpoint, tmp_path, everything, form):
    server = endpoint(lambda prompt, n: answer(f"{GOOD} {GOOD} It costs {FORMS[form]}."))
    one = teacher(server, tmp_path)
    error = ask(one)
    assert not one.counts or one.counts["accepted"] == 0
    assert not leaks(everything(error))


@pytest.mark.parametrize("key", [KEY, "0123456789abcdef0123456789abcdef", "hf_AbCdEfGhIjKlMnOpQrStUvWxYz"])
def test_pieces_of_other_keys(key):
    for name, form in spellings(key).items():
        if name in HIDDEN:
            assert contains_key(f"{GOOD} {form}", key), name
    assert not contains_key(GOOD, key)
    assert not contains_key("EMPTY answers", "EMPTY")


# Requests without a reply


def test_timeout(endpoint, tmp_path, everything):
    def reply(prompt, n):
        time.sleep(0.5)
        return answer(GOOD)

    error = ask(teacher(endpoint(reply), tmp_path, timeout=0.1, max_retries=0))
    assert isinstance(error, ConnectionError)
    assert not leaks(everything(error))


def test_hung_up_and_unreachable(endpoint, tmp_path, everything):
    for url in (endpoint(lambda prompt, n: None).url, "http://127.0.0.1:9/v1"):
        error = ask(teacher(url, tmp_path, max_retries=0))
        assert isinstance(error, ConnectionError)
        assert not leaks(everything(error))


def test_interruption(endpoint, tmp_path, everything, monkeypatch):
    def interrupt(prompt, n):
        import _thread

        _thread.interrupt_main()
        time.sleep(0.3)
        return answer(GOOD)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    error = ask(teacher(endpoint(interrupt), tmp_path))
    signal.signal(signal.SIGINT, before)
    assert isinstance(error, KeyboardInterrupt)
    shown = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    assert not leaks(shown)
    assert not leaks(everything())


def test_endless_reply_ends(raw_endpoint, tmp_path, everything, monkeypatch):
    monkeypatch.setattr(module, "MAX_REPLY", 10_000)
    url = raw_endpoint(f"HTTP/1.1 200 OK\r\n\r\n{KEY}", forever=True)
    error = ask(teacher(url, tmp_path, max_retries=0))
    assert "ReadError" in str(error)
    assert not leaks(everything(error))


# Addresses


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{KEY}@localhost/v1",
        f"https://user:{KEY}@example.org/v1",
        f"user:{KEY}@localhost:8000/v1",
        f"http://user:{KEY.replace('-', '/')}@localhost/v1",
        f"https://example.org/v1?api_key={KEY}",
        f"https://example.org/v1#{KEY}",
        f"https://{KEY}%40example.org:{KEY}/v1",
        f"ftp://{KEY}.example.org/v1",
        KEY,
        f"http://[{KEY}/v1",
    ],
)
def test_address_with_a_secret_is_refused_and_not_shown(tmp_path, everything, url):
    with pytest.raises(ValueError, match="base_url") as error:
        teacher(url, tmp_path)
    assert not leaks(f"{error.value}")
    assert "".join(traceback.format_exception(error.value)).casefold().count("tr0ub") == 0


@pytest.mark.parametrize("url", ["http://example.org/v1", "http://10.0.0.7:8000/v1", "http://localhost.example.org"])
def test_key_is_not_sent_unencrypted_to_another_machine(tmp_path, everything, url, monkeypatch):
    one = teacher(url, tmp_path)
    error = ask(one)
    assert isinstance(error, ValueError)
    assert "allow_insecure_http" in str(error)
    assert not leaks(everything(error))
    for value in ("EMPTY", ""):  # a placeholder is no secret
        monkeypatch.setenv("OPENAI_API_KEY", value)
        module._Run(one, SimpleNamespace())
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    module._Run(teacher(url, tmp_path, allow_insecure_http=True), SimpleNamespace())


@pytest.mark.parametrize(
    "url", ["https://example.org/v1", "http://127.3.2.1/v1", "http://[::1]:8/v1", "http://localhost"]
)
def test_key_may_be_sent_encrypted_or_to_this_machine(tmp_path, everything, url):
    assert module._Run(teacher(url, tmp_path), SimpleNamespace()).api_key == KEY


def test_key_for_this_machine_does_not_go_through_a_proxy(endpoint, tmp_path, everything, monkeypatch):
    proxy, server = endpoint(lambda prompt, n: answer(GOOD)), endpoint(lambda prompt, n: answer(GOOD))
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
    monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
    assert ask(teacher(server, tmp_path)) is None
    assert not proxy.requests


def test_redirect_is_not_followed(endpoint, tmp_path, everything):
    other = endpoint(lambda prompt, n: answer(GOOD))
    server = endpoint(lambda prompt, n: (307, {"Location": f"{other.url}/chat/completions?key={KEY}"}, b""))
    error = ask(teacher(server, tmp_path))
    assert "Redirects are not followed" in str(error)
    assert not other.requests
    assert not leaks(everything(error))


# What objects and files say


def test_objects_and_files_of_a_good_run(endpoint, tmp_path, everything):
    server = endpoint(lambda prompt, n: (200, {"X-Echo": KEY, "X-Request-Id": KEY}, answer(GOOD)[2]))
    one = teacher(server, tmp_path)
    assert ask(one) is None
    objects = [one, vars(one), one.counts, module._Run(one, SimpleNamespace())]
    arguments = PrepareArguments("toy", "out", teacher="openai", teacher_model="m", teacher_base_url=server.url)
    objects += [arguments, asdict(arguments), card_settings(arguments)]
    assert server.requests[0][1]["authorization"] == f"Bearer {KEY}"
    assert not leaks(everything() + repr(objects))


def test_loggers_speak_again_after_a_run(endpoint, tmp_path, everything):
    assert ask(teacher(endpoint(lambda prompt, n: answer(GOOD)), tmp_path)) is None
    assert logging.getLogger("httpcore2.http11").level == logging.DEBUG
    assert logging.getLogger("httpx2").level == logging.DEBUG


def test_without_a_key_a_refusal_is_quoted_without_control_characters(endpoint, tmp_path, everything, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    server = endpoint(lambda prompt, n: (404, {}, "no model\x1b[2J\u202e here".encode()))
    error = ask(teacher(server, tmp_path))
    assert "no model\\x1b[2J\\u202e here" in str(error)


def test_token_of_the_hub_is_not_in_the_files_of_a_run(tmp_path, caplog, capsys):
    from lasar_hf.trainers import checkpoint_to_resume
    from lasar_hf.trainers.hub import shared_files

    trainer = sft_trainer(tmp_path, hub_token=KEY, max_steps=1, save_strategy="steps", save_steps=1)
    assert isinstance(trainer.args, LasarSFTConfig)
    checkpoint_to_resume(trainer.args)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "training_args.bin").exists()  # transformers' pickle, with all arguments
    assert not [path for path in shared_files(tmp_path) if leaks(path.read_bytes().decode("latin-1"))]
    private = {"training_args.bin"}
    found = {
        path.name for path in tmp_path.rglob("*") if path.is_file() and leaks(path.read_bytes().decode("latin-1"))
    }
    assert found <= private
    assert not private & {path.name for path in shared_files(tmp_path)}
    assert not leaks(caplog.text + "".join(capsys.readouterr()) + repr(trainer.args) + str(trainer.args.to_dict()))
    assert re.search("^#", (tmp_path / "README.md").read_text(), re.MULTILINE)
