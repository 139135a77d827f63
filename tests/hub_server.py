"""A server that speaks the part of the Hub's protocol which the tests need: make a repository, commit, download."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubServer(ThreadingHTTPServer):
    """Repositories in memory: `commits[repo]` are (commit id, files by path) from the oldest to the newest."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        self.token: str | None = None  # if set, every request must have it

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo: str, revision: str = "main") -> tuple[str, dict[str, bytes]]:
        """Commit id and files of a revision."""
        commits = self.commits[repo]
        return commits[-1] if revision == "main" else next(entry for entry in commits if entry[0] == revision)


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, content: bytes | dict, status: int = 200, **headers: str) -> None:
        body = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.answer({"error": "Not found"}, 404, X_Error_Code=code)

    def is_allowed(self) -> bool:
        allowed = self.server.token in (None, self.headers.get("Authorization", "").removeprefix("Bearer "))
        if not allowed:
            self.missing("RepoNotFound")
        return allowed

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.is_allowed():
            return
        parts = self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            request = json.loads(body)
            repo = f"{request.get('organization') or 'user'}/{request['name']}"
            self.server.commits.setdefault(repo, [("0" * 40, {})])
            if request.get("private") or request.get("visibility") == "private":
                self.server.private.add(repo)
            self.answer({"url": f"{self.server.url}/{repo}", "name": repo})
        elif parts[:2] == ["api", "models"] and parts[4] == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            self.answer({"files": files})
        elif parts[:2] == ["api", "models"] and parts[4] == "commit":
            repo = "/".join(parts[2:4])
            files = dict(self.server.files(repo)[1])
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "deletedFile":
                    del files[entry["value"]["path"]]
            commit = hashlib.sha1(body).hexdigest()
            self.server.commits[repo].append((commit, files))
            url = f"{self.server.url}/{repo}/commit/{commit}"
            self.answer({"commitUrl": url, "commitOid": commit, "success": True})
        else:  # such as validate-yaml
            self.answer({"warnings": [], "errors": []})

    def do_GET(self):
        if not self.is_allowed():
            return
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "whoami-v2"]:
            self.answer({"name": "user", "type": "user", "orgs": []})
            return
        repo = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
        if repo not in self.server.commits:
            self.missing("RepoNotFound")
        elif parts[:2] == ["api", "models"]:
            revision = parts[5] if parts[4:5] in (["revision"], ["tree"]) else "main"
            commit, files = self.server.files(repo, revision)
            if parts[4:5] == ["tree"]:
                folder = "".join(f"{part}/" for part in parts[6:])
                if folder and not any(path.startswith(folder) for path in files):
                    self.missing("EntryNotFound")
                    return
                rows = [{"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                        for path, content in files.items() if path.startswith(folder)]  # fmt: skip
                self.answer(json.dumps(rows).encode())
            else:
                siblings = [{"rfilename": path} for path in sorted(files)]
                self.answer({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": [],
                             "private": False, "downloads": 0, "likes": 0})  # fmt: skip
        else:
            commit, files = self.server.files(repo, parts[3])
            content = files.get("/".join(parts[4:]))
            if content is None:
                self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            else:
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                self.answer(content, ETag=etag, X_Repo_Commit=commit)

    do_HEAD = do_GET


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A running server; `HF_ENDPOINT` of a process must be its `url`."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
