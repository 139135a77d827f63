"""The server: answers, status codes, changes of the catalogue, and a real process on a port."""

import ast
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

import lasar_cli
import lasar_hf.model
import lasar_hf.serving
from lasar_hf import LasarProcessor, Recommender, SidCatalog
from lasar_hf.serving import create_app, serve
from tests.tiny import tiny_catalog, tiny_model


HANDLER = Path(lasar_hf.model.__file__).with_name("handler.py")
ADMIN = {"Authorization": "Bearer secret"}


@pytest.fixture
def recommender() -> Recommender:
    model, tokenizer = tiny_model()
    catalog = tiny_catalog()
    titles = [f"Book {number}" for number in range(len(catalog))]
    return Recommender(model, LasarProcessor(tokenizer, SidCatalog(catalog.codes, catalog.item_ids, titles=titles)))


@pytest.fixture
def client(recommender):
    with TestClient(create_app(recommender, admin_token="secret")) as client:
        yield client


def ids(answer: dict) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def free_codes(catalog: SidCatalog) -> list[int]:
    """A Semantic ID that no item has; its first code is that of an item."""
    used = set(map(tuple, catalog.codes.tolist()))
    return next([a, b, c] for a in range(4) for b in range(4) for c in range(4) if (a, b, c) not in used)


# Answers


def test_one_user(client, recommender):
    answer = client.post("/recommend", json={"history": ["item-1", "book 2"], "top_k": 4})
    assert answer.status_code == 200
    assert answer.json() == recommender.recommend([["item-1", "item-2"]], top_k=4)[0]


def test_several_users(client, recommender):
    histories = [["item-1"], ["item-2", "item-3"], ["item-4"]]
    options = {"top_k": 3, "latent_steps": 0, "exclude_history": True}
    answer = client.post("/recommend", json={"histories": histories, **options}).json()
    for result, expected in zip(answer["results"], recommender.recommend(histories, **options), strict=True):
        assert ids(result) == ids(expected)
        assert result["latent_steps"] == 0


def test_allow_and_deny(client):
    body = {"history": ["item-1"], "allow": ["item-7", "Book 9", "item-8"], "deny": ["item-7"], "top_k": 20}
    assert set(ids(client.post("/recommend", json=body).json())) == {"item-8", "item-9"}
    assert client.post("/recommend", json=body | {"allow": []}).json()["items"] == []


def test_unknown_items_can_be_skipped(client, recommender):
    answers = client.post("/recommend", json={"histories": [["gone", "item-1"], ["gone"]], "unknown_items": "skip"})
    known, unknown = answers.json()["results"]
    assert ids(known) == ids(recommender.recommend([["item-1"]])[0])
    assert unknown == {"items": [], "latent_steps": None}


def test_simultaneous_users_get_their_own_answers(client, recommender):
    bodies = [
        {"history": [f"item-{number % 20}", f"item-{number % 7}"], "top_k": 3 + number % 2} for number in range(40)
    ]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: client.post("/recommend", json=body).json(), bodies))
    for body, answer in zip(bodies, answers, strict=True):
        assert ids(answer) == ids(recommender.recommend([body["history"]], top_k=body["top_k"])[0])
    metrics = client.get("/metrics").text
    num_batches = float(metrics.split("lasar_batch_size_count ")[1].split()[0])
    assert num_batches < 30  # one of them is the warm-up


# Errors


@pytest.mark.parametrize(
    "body, message",
    [
        ({"history": []}, "The history is empty"),
        ({"history": ["item-1", "item-77"]}, "no item 'item-77'"),
        ({"history": ["<a_300>"]}, "Semantic ID"),
        ({"histories": [["item-1"], []]}, "histories.1: The history is empty"),
        ({"history": "item-1"}, "history: Input should be a valid list"),
        ({"history": [True]}, "history.0"),
        ({"history": ["item-1"], "histories": [["item-1"]]}, "Expected history"),
        ({}, "Expected history"),
        ({"histories": []}, "at least 1 item"),
        ({"histories": [["item-1"]] * 2000}, "at most 1024"),
        ({"history": ["item-1"], "topk": 3}, "topk: Extra"),
        ({"history": ["item-1"], "top_k": 101}, "top_k: Input should be less"),
        ({"history": ["item-1"], "latent_steps": 5}, "expected 0 … 4"),
        ({"history": ["item-1"], "allow": ["item-77"]}, "no item 'item-77'"),
    ],
)
def test_bad_requests_are_named(client, body, message):
    answer = client.post("/recommend", json=body)
    assert answer.status_code == 422
    assert message in answer.json()["detail"]


def test_items_of_the_history_cannot_be_included_where_training_left_them_out(client, recommender):
    recommender.model.config.exclude_history = True
    answer = client.post("/recommend", json={"history": ["item-1"], "exclude_history": False})
    assert answer.status_code == 422
    assert "exclude_history" in answer.json()["detail"]


@contextmanager
def busy(monkeypatch):
    """Within it, the model does not answer."""
    gate, started, recommend = threading.Event(), threading.Event(), Recommender.recommend

    def wait(self, *args, **kwargs):
        started.set()
        assert gate.wait(20)
        return recommend(self, *args, **kwargs)

    monkeypatch.setattr(Recommender, "recommend", wait)
    try:
        yield started
    finally:
        gate.set()


def test_a_full_queue_and_a_time_out(recommender, monkeypatch):
    body = {"history": ["item-1"]}
    options = {"max_queue": 1, "timeout": 2.0, "max_wait_ms": 0}
    with TestClient(create_app(recommender, **options)) as client, ThreadPoolExecutor(2) as pool:
        with busy(monkeypatch) as started:
            first = pool.submit(client.post, "/recommend", json=body)
            assert started.wait(5)
            second = pool.submit(client.post, "/recommend", json=body)
            while client.get("/health").json()["queue_length"] == 0:
                assert not second.done()
                time.sleep(0.01)
            refused = client.post("/recommend", json=body)
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
            for late in (first, second):
                assert late.result().status_code == 504
                assert "longer than 2 seconds" in late.result().json()["detail"]
        assert client.post("/recommend", json=body).status_code == 200
        counts = client.get("/metrics").text
        assert 'lasar_requests_total{path="/recommend",status="429"} 1.0' in counts
        assert 'lasar_requests_total{path="/recommend",status="504"} 2.0' in counts


def test_a_failure_of_the_model_fails_its_request_only(client, recommender, monkeypatch):
    recommend = Recommender.recommend

    def fail(self, histories, **kwargs):
        if ["item-3"] in histories:
            raise RuntimeError("broken")
        return recommend(self, histories, **kwargs)

    monkeypatch.setattr(Recommender, "recommend", fail)
    with ThreadPoolExecutor(8) as pool:
        post = lambda number: client.post("/recommend", json={"history": [f"item-{number}"]})  # noqa: E731
        answers = list(pool.map(post, range(8)))
    assert [answer.status_code for answer in answers] == [200, 200, 200, 500, 200, 200, 200, 200]
    assert "broken" not in answers[3].text


# Health, metrics and the catalogue


def test_health_and_metrics(client):
    health = client.get("/health")
    assert health.status_code == 200
    assert health.json() == {
        "status": "ready", "model": "", "num_items": 20, "num_removed": 0, "max_latent_steps": 4, "queue_length": 0,
    }  # fmt: skip
    client.post("/recommend", json={"history": ["item-1"]})
    client.get("/a/path/that/is/unknown")
    metrics = client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    for line in (
        'lasar_requests_total{path="/recommend",status="200"} 1.0',
        'lasar_requests_total{path="other",status="404"} 1.0',
        'lasar_request_seconds_count{path="/recommend"} 1.0',
        "lasar_batch_size_sum 2.0",
        "lasar_queue_length 0.0",
    ):
        assert line in metrics.text


def test_a_removed_item_is_not_recommended_and_returns(client):
    body = {"history": ["item-1"], "top_k": 20}
    best = ids(client.post("/recommend", json=body).json())[0]
    answer = client.post("/catalog/remove", json={"item_ids": [best]}, headers=ADMIN)
    assert answer.json() == {"num_items": 19, "num_removed": 1}
    assert best not in ids(client.post("/recommend", json=body).json())
    assert client.post("/recommend", json={"history": [best]}).status_code == 200  # histories may contain it
    answer = client.post("/catalog/add", json={"items": [{"item_id": best}]}, headers=ADMIN)
    assert answer.json() == {"num_items": 20, "num_removed": 0}
    first = client.post("/recommend", json=body).json()["items"][0]
    assert (first["item_id"], first["title"]) == (best, f"Book {best.removeprefix('item-')}")


def test_a_new_item_is_recommended_and_known_by_its_title(client, recommender):
    item = {"item_id": "new", "title": "A new book", "codes": free_codes(recommender.catalog)}
    assert client.post("/catalog/add", json={"items": [item]}, headers=ADMIN).json()["num_items"] == 21
    items = client.post("/recommend", json={"history": ["a NEW book"], "top_k": 21}).json()["items"]
    assert ("new", "A new book") in [(item["item_id"], item["title"]) for item in items]


@pytest.mark.parametrize(
    "path, body, message",
    [
        ("add", {"items": [{"item_id": "new"}]}, "'new' has the codes None; expected 3 codes"),
        ("add", {"items": [{"item_id": "new", "codes": [1, 2]}]}, "expected 3 codes"),
        ("add", {"items": [{"item_id": "new", "codes": [0, 0, 9]}]}, "codebook_size is 4"),
        ("add", {"items": [{"item_id": "item-1", "codes": [0, 0, 0]}]}, "already has the item 'item-1'"),
        ("add", {"items": []}, "at least 1 item"),
        ("remove", {"item_ids": ["item-1", "item-77"]}, "no item 'item-77' to remove"),
        ("remove", {"item_ids": [f"item-{number}" for number in range(20)]}, "at least one item to remain"),
    ],
)
def test_bad_changes_of_the_catalogue_change_nothing(client, path, body, message):
    answer = client.post(f"/catalog/{path}", json=body, headers=ADMIN)
    assert answer.status_code == 422
    assert message in answer.json()["detail"]
    assert client.get("/health").json()["num_items"] == 20


def test_changes_of_the_catalogue_need_the_token(client, recommender):
    body = {"item_ids": ["item-1"]}
    assert client.post("/catalog/remove", json=body).status_code == 401
    assert client.post("/catalog/remove", json=body, headers={"Authorization": "Bearer other"}).status_code == 401
    with TestClient(create_app(recommender)) as without_token:
        answer = without_token.post("/catalog/remove", json=body, headers=ADMIN)
    assert answer.status_code == 403
    assert client.get("/health").json()["num_removed"] == 0


def test_users_see_the_catalogue_before_or_after_a_change(client, recommender):
    item = {"item_id": "new", "codes": free_codes(recommender.catalog)}
    body = {"history": ["item-1"], "top_k": 30}
    before = ids(client.post("/recommend", json=body).json())
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda _: ids(client.post("/recommend", json=body).json()), range(60))
        client.post("/catalog/add", json={"items": [item]}, headers=ADMIN)
        after = ids(client.post("/recommend", json=body).json())
        answers = list(answers)
    assert set(after) == {*before, "new"}
    assert all(answer in (before, after) for answer in answers)


# The process


@contextmanager
def server(model: Path, port: int, **options):
    command = f"from lasar_hf.serving import serve; serve({str(model)!r}, port={port}, device='cpu', **{options})"
    process = subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def fetch(port: int, path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_a_process_serves_and_answers_what_is_queued_before_it_ends(recommender, tmp_path):
    recommender.save_pretrained(tmp_path)
    port, body = free_port(), {"history": ["item-1", "item-2"]}
    with server(tmp_path, port, max_wait_ms=2000) as process:
        while True:
            try:
                assert fetch(port, "/health")["num_items"] == 20
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.1)
        with ThreadPoolExecutor(3) as pool:
            answers = [pool.submit(fetch, port, "/recommend", body) for _ in range(3)]
            while fetch(port, "/health")["queue_length"] < 3:
                assert not any(answer.done() for answer in answers)
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            expected = recommender.recommend([body["history"]])[0]
            assert [ids(answer.result()) for answer in answers] == [ids(expected)] * 3
        assert process.wait(20) in (0, -signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("given, variable, expected", [(None, "a", "a"), ("b", "a", "b"), (None, "", None)])
def test_the_admin_token_is_an_argument_or_a_variable(recommender, tmp_path, monkeypatch, given, variable, expected):
    recommender.save_pretrained(tmp_path)
    monkeypatch.setenv("LASAR_ADMIN_TOKEN", variable)
    tokens = []
    monkeypatch.setattr(
        "uvicorn.Server.run", lambda server, sockets: tokens.append(server.config.app.state.admin_token)
    )
    serve(tmp_path, port=0, device="cpu", admin_token=given)
    assert tokens == [expected]


def test_a_port_in_use_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(SystemExit, match=f"port {port}: Address already in use. Choose"):
            serve(tmp_path, port=port)


def test_options_out_of_range_are_named(recommender, tmp_path):
    recommender.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="num_beams is 0; expected at least 1"):
        serve(tmp_path, port=0, device="cpu", num_beams=0)


def test_the_command_passes_its_options(recommender, tmp_path, monkeypatch):
    recommender.save_pretrained(tmp_path)
    calls = []
    monkeypatch.setattr(lasar_hf.serving, "serve", lambda *args, **options: calls.append((args, options)))
    monkeypatch.setenv("LASAR_ADMIN_TOKEN", "secret")
    result = CliRunner().invoke(lasar_cli.app, f"serve {tmp_path} --port 1234 --max-batch 8 --timeout 2".split())
    assert result.exit_code == 0, result.output
    options = {"num_beams": 50, "max_batch": 8, "max_wait_ms": 5.0, "max_queue": 1024, "timeout": 2.0}
    options["revision"] = None
    assert calls == [((str(tmp_path), "127.0.0.1", 1234, None, "secret"), options)]


@pytest.mark.parametrize(
    "name, message",
    [("empty", "Cannot serve"), ("missing", "which is not a folder"), ("cut", "not the file that was saved")],
)
def test_a_missing_or_damaged_model_is_named(recommender, tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    recommender.save_pretrained(tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.safetensors", 5000)
    with pytest.raises(SystemExit, match=message) as error:
        serve(str(tmp_path / name), port=0)
    assert "\n" not in error.value.code


# Inference Endpoints


def test_endpoint_handler(recommender, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    recommender.save_pretrained(tmp_path / "model")
    copy = shutil.copy(HANDLER, tmp_path / "model")
    spec = importlib.util.spec_from_file_location("handler", copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler = module.EndpointHandler(os.fspath(tmp_path / "model"))
    history = ["item-1", "item-2"]
    expected = recommender.recommend([history], top_k=3)
    assert handler({"inputs": history, "parameters": {"top_k": 3}}) == expected[0]
    assert handler({"inputs": [history], "parameters": {"top_k": 3}}) == expected
    assert len(handler({"inputs": history})["items"]) == 10
    for data in ({}, {"inputs": "item-1"}):
        with pytest.raises(ValueError, match='Expected {"inputs"'):
            handler(data)


def test_endpoint_handler_needs_torch_and_transformers_only():
    tree = ast.walk(ast.parse(HANDLER.read_text()))
    nodes = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
    assert names == {"torch", "transformers"}
