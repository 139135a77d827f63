"""A local OpenAI-compatible endpoint for the tests; the fixture `endpoint` starts it."""

import json
import socket
import threading
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


GOOD = "The person keeps to cups. A cup of another colour is due."


def answer(text, **fields):
    """A reply with a chat completion: status, headers, body."""
    usage = {"prompt_tokens": 10, "completion_tokens": 3}
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}], "usage": usage} | fields).encode()


class Endpoint(ThreadingHTTPServer):
    """
    Answers the n-th request for the same items with `reply(prompt, n)`: status, headers, body. `None` hangs up.

    `asked` counts the requests by their items; `prompts` and `requests` (path, headers, body) hold what arrived;
    `most_busy` is the highest number of requests at a time.
    """

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.lock = reply, threading.Lock()
        self.asked, self.prompts, self.requests, self.busy, self.most_busy = Counter(), [], [], 0, 0

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
            number = server.asked[items]
            server.asked[items] += 1
            server.prompts.append(prompt)
            server.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        reply = server.reply(prompt, number)
        with server.lock:
            server.busy -= 1
        if reply is None:
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
    """Start a server with a given behaviour; without proxies and keys of the machine."""
    proxies = ["http_proxy", "https_proxy", "all_proxy"]
    for name in [*proxies, *map(str.upper, proxies), "OPENAI_API_KEY", "OPENAI_ADMIN_KEY"]:
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


@pytest.fixture
def raw_endpoint(endpoint):
    """Start a server that answers every request with the given text, whatever it is; returns its address."""
    listeners = []

    def serve(listener, reply, forever):
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
            with connection, suppress(OSError):
                connection.recv(65536)
                connection.sendall(reply)
                while forever:
                    connection.sendall(reply[-1:] * 1000)

    def start(reply, forever=False):
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        threading.Thread(target=serve, args=(listener, reply.encode(), forever), daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
