"""What is pushed to the hub is the published folder, whole, and loads back by its URL; a refusal is told and mended."""

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
class StandIn:
    """The part of the hub's interface that a push uses."""

    url: str
    private: dict[str, bool] = field(default_factory=dict)
    """Whether a repository is private, by its name."""
    commits: list[dict[str, bytes]] = field(default_factory=list)
    """The files of each commit by name."""
    messages: list[str] = field(default_factory=list)
    """What each commit says of itself."""
    tokens: set[str] = field(default_factory=set)
    """Those that came with a request that changes something."""
    refuses: bool = False
    """Whether no token is good."""


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does, for repositories that take every file in the commit itself."""

    hub: StandIn

    def do_POST(self) -> None:
        """Make a repository, say how files are to come, take a commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        if self.hub.refuses:
            return self.send(401, {"error": "Invalid username or password."})
        if self.path == "/api/validate-yaml":
            return self.send(200, {"warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            there = repo in self.hub.private
            self.hub.private.setdefault(repo, asked.get("private") or asked.get("visibility") == "private")
            return self.send(409 if there else 200, {"url": f"{self.hub.url}/{repo}"})
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
        """Give what is known of a repository, or a file of it."""
        if self.hub.refuses:
            return self.send(401, {"error": "Invalid username or password."})
        path = self.path.lstrip("/")
        repo = path.removeprefix("api/models/")
        if repo in self.hub.private:
            return self.send(200, {"id": repo, "private": self.hub.private[repo]})
        content = self.hub.commits[-1].get(path.removeprefix("owner/cells/resolve/main/"))
        self.send(404, {}) if content is None else self.send(200, content)

    def log_message(self, *_: Any) -> None:
        """Stay silent."""

    def send(self, code: int, answer: dict | bytes) -> None:
        """Send a file, or a page of JSON."""
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    for name in ("BOXWRIGHT_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path / "cache"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stand_in = StandIn(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = type("HubHandler", (Handler,), {"hub": stand_in})
    monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
    monkeypatch.setenv("HF_TOKEN", "of the environment")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield stand_in
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = small_run(tmp_path / "cells", [Category(id=1, name="cell")])
    (folder / "experiment.json").write_text('{"experiment": {}}', "utf-8")
    return folder


def publish(run: Path, *words: str) -> Any:
    fixed = ["zoo", "publish", str(run), "--data", "BCCD", "--licence", "MIT", "--out", str(run.with_name("out"))]
    return CliRunner().invoke(app, [*fixed, *words])


def test_the_folder_is_pushed_in_one_commit_and_loads_by_the_url_that_is_printed(hub: StandIn, run: Path) -> None:
    result = publish(run, "--to", "hf:owner/cells")
    assert result.exit_code == 0, result.output
    *files, url = result.stdout.splitlines()
    assert hub.commits == [{Path(file).name: Path(file).read_bytes() for file in files}]
    assert {path.name for path in run.with_name("out").iterdir()} == set(hub.commits[0])
    assert hub.messages == ["Publish out"]
    assert hub.tokens == {"Bearer of the environment"}
    assert hub.private == {"owner/cells": False}
    assert url == f"{hub.url}/owner/cells/resolve/main/{Path(files[0]).name}"
    assert boxwright.load(url).metadata["name"] == "cells"


def test_private_makes_a_private_repository(hub: StandIn, run: Path) -> None:
    assert publish(run, "--to", "hf:owner/cells", "--private").exit_code == 0
    assert hub.private == {"owner/cells": True}
    assert len(hub.commits) == 1


def test_a_repository_that_is_there_keeps_what_it_is(hub: StandIn, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("A card", "utf-8")
    hub.private["owner/cells"] = True
    assert push(tmp_path, "owner/cells") == f"{hub.url}/owner/cells"
    assert hub.private == {"owner/cells": True}
    hub.private["owner/cells"] = False
    with pytest.raises(ValueError, match="there already and public, and --private is given"):
        push(tmp_path, "owner/cells", private=True)
    assert len(hub.commits) == 1


def test_a_refusal_leaves_the_folder_and_tells_how_to_go_on(hub: StandIn, run: Path) -> None:
    hub.refuses = True
    result = publish(run, "--to", "hf:owner/cells")
    out = run.with_name("out")
    assert result.exit_code == 1
    assert f"{out} is made, but was not pushed to owner/cells" in result.stderr
    assert "401" in result.stderr
    assert f"hf upload owner/cells {out}" in result.stderr
    assert "of the environment" not in result.stderr
    assert (out / "README.md").is_file()
    assert hub.commits == []


def test_a_host_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(OSError, match=r"was not pushed to owner/cells \(Connect"):
        push(tmp_path, "owner/cells")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "owner/cells"), "'owner/cells' is no place to push to: give hf:owner/name"),
        (("--to", "hf:cells"), "'hf:cells' is no place to push to"),
        (("--to", "hf:owner/cells/more"), "is no place to push to"),
        (("--to", "hf:owner/a--b"), "'hf:owner/a--b' cannot be a repository"),
        (("--private",), "give --to too"),
    ],
)
def test_what_is_no_place_is_told_before_anything_is_made(run: Path, words: tuple[str, ...], message: str) -> None:
    result = publish(run, *words)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not run.with_name("out").exists()


def test_without_the_library_or_the_network_it_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOXWRIGHT_OFFLINE", "1")
    with pytest.raises(ValueError, match="BOXWRIGHT_OFFLINE is set"):
        repository("hf:owner/cells")
    for name in ("huggingface_hub", "huggingface_hub.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"not installed: pip install 'boxwright\[hub\]'"):
        repository("hf:owner/cells")
