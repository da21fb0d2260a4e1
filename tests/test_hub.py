"""A published folder is pushed to the hub completely and loads by its URL; failed pushes are reported with a remedy."""

from __future__ import annotations

import base64
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import boxwright
from boxwright.cli.main import app
from boxwright.data.dataset import Category
from boxwright.hub import push, repository
from small_model import small_run

constants = pytest.importorskip("huggingface_hub.constants")


@dataclass
class FakeHub:
    """State of a fake hub."""

    url: str
    private: dict[str, bool] = field(default_factory=dict)
    """Whether each repository is private, by name."""
    commits: list[dict[str, bytes]] = field(default_factory=list)
    """Files of each commit by name."""
    messages: list[str] = field(default_factory=list)
    """Commit messages."""
    tokens: set[str] = field(default_factory=set)
    """Authorization headers of all POST requests."""
    refuses: bool = False
    """Whether all requests are answered with status 401."""


class Handler(BaseHTTPRequestHandler):
    """Implements the part of the hub's API that a push uses, without LFS: a commit contains all files."""

    hub: FakeHub

    def do_POST(self) -> None:
        """Create a repository, answer the preupload request, or receive a commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        if self.hub.refuses:
            return self.send(401, {"error": "Invalid username or password."})
        if self.path == "/api/validate-yaml":
            return self.send(200, {"warnings": []})
        if self.path == "/api/repos/create":
            payload = json.loads(body)
            repo = f"{payload['organization']}/{payload['name']}"
            exists = repo in self.hub.private
            self.hub.private.setdefault(repo, payload.get("private") or payload.get("visibility") == "private")
            return self.send(409 if exists else 200, {"url": f"{self.hub.url}/{repo}"})
        assert self.path.startswith("/api/models/owner/cells/")
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.send(200, {"files": files})
        assert "/commit/main" in self.path
        lines = [json.loads(line) for line in body.splitlines()]
        files = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
        self.hub.commits.append({name: base64.b64decode(content) for name, content in files.items()})
        self.hub.messages += [line["value"]["summary"] for line in lines if line["key"] == "header"]
        oid = "0" * 40
        self.send(200, {"commitUrl": f"{self.hub.url}/owner/cells/commit/{oid}", "commitOid": oid, "success": True})

    def do_GET(self) -> None:
        """Send the description of a repository, or one of its files."""
        if self.hub.refuses:
            return self.send(401, {"error": "Invalid username or password."})
        path = self.path.lstrip("/")
        repo = path.removeprefix("api/models/")
        if repo in self.hub.private:
            return self.send(200, {"id": repo, "private": self.hub.private[repo]})
        content = self.hub.commits[-1].get(path.removeprefix("owner/cells/resolve/main/"))
        self.send(404, {}) if content is None else self.send(200, content)

    def log_message(self, *_: Any) -> None:
        """Print no log."""

    def send(self, code: int, answer: dict | bytes) -> None:
        """Send a file, or a dict as JSON."""
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    for name in ("BOXWRIGHT_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path / "cache"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake = FakeHub(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = type("HubHandler", (Handler,), {"hub": fake})
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    monkeypatch.setenv("HF_TOKEN", "token-from-environment")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield fake
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = small_run(tmp_path / "cells", [Category(id=1, name="cell")])
    (folder / "experiment.json").write_text('{"experiment": {}}', "utf-8")
    return folder


def publish(run: Path, *words: str) -> Any:
    command = ["zoo", "publish", str(run), "--data", "BCCD", "--licence", "MIT", "--out", str(run.with_name("out"))]
    return CliRunner().invoke(app, [*command, *words])


def test_the_folder_is_pushed_in_one_commit_and_loads_by_the_printed_url(hub: FakeHub, run: Path) -> None:
    result = publish(run, "--to", "hf:owner/cells")
    assert result.exit_code == 0, result.output
    *files, url = result.stdout.splitlines()
    assert hub.commits == [{Path(file).name: Path(file).read_bytes() for file in files}]
    assert {path.name for path in run.with_name("out").iterdir()} == set(hub.commits[0])
    assert hub.messages == ["Publish out"]
    assert hub.tokens == {"Bearer token-from-environment"}
    assert hub.private == {"owner/cells": False}
    assert url == f"{hub.url}/owner/cells/resolve/main/{Path(files[0]).name}"
    assert boxwright.load(url).metadata["name"] == "cells"


def test_private_creates_a_private_repository(hub: FakeHub, run: Path) -> None:
    assert publish(run, "--to", "hf:owner/cells", "--private").exit_code == 0
    assert hub.private == {"owner/cells": True}
    assert len(hub.commits) == 1


def test_pushing_to_an_existing_repository_keeps_its_visibility(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("A card", "utf-8")
    hub.private["owner/cells"] = True
    assert push(tmp_path, "owner/cells") == f"{hub.url}/owner/cells"
    assert hub.private == {"owner/cells": True}
    hub.private["owner/cells"] = False
    with pytest.raises(ValueError, match="--private: owner/cells already exists and is public"):
        push(tmp_path, "owner/cells", private=True)
    assert len(hub.commits) == 1


def test_after_a_denied_push_the_folder_remains_and_the_error_has_the_next_command(hub: FakeHub, run: Path) -> None:
    hub.refuses = True
    result = publish(run, "--to", "hf:owner/cells")
    out = run.with_name("out")
    assert result.exit_code == 1
    assert f"{out} was written but not pushed to owner/cells" in result.stderr
    assert "401" in result.stderr
    assert f"hf upload owner/cells {out}" in result.stderr
    assert "token-from-environment" not in result.stderr
    assert (out / "README.md").is_file()
    assert hub.commits == []


def test_an_unreachable_hub_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(OSError, match=r"not pushed to owner/cells \(Connect"):
        push(tmp_path, "owner/cells")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "owner/cells"), "cannot push to 'owner/cells'. Give a repository"),
        (("--to", "hf:cells"), "cannot push to 'hf:cells'"),
        (("--to", "hf:owner/cells/more"), "cannot push to 'hf:owner/cells/more'"),
        (("--to", "hf:owner/a--b"), "'hf:owner/a--b' is not a valid repository name"),
        (("--private",), "--private needs --to"),
    ],
)
def test_an_invalid_repository_is_rejected_before_anything_is_written(
    run: Path, words: tuple[str, ...], message: str
) -> None:
    result = publish(run, *words)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not run.with_name("out").exists()


def test_a_missing_library_or_offline_mode_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOXWRIGHT_OFFLINE", "1")
    with pytest.raises(ValueError, match="BOXWRIGHT_OFFLINE is set"):
        repository("hf:owner/cells")
    for name in ("huggingface_hub", "huggingface_hub.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"not installed. Run pip install 'boxwright\[hub\]'"):
        repository("hf:owner/cells")
