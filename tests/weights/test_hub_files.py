"""`hf:` names load files of the Hugging Face Hub, and `HF_TOKEN` is sent only to the hub and only over https."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.request import HTTPSHandler, Request

import pytest

import boxwright
from boxwright.data.dataset import Category
from boxwright.predictor import weights_file
from boxwright.weights.download import FetchError
from boxwright.weights.fetch import Remote, fetch, read_remote
from boxwright.weights.hub import hub_file
from small_model import small_run
from weights.hosts import Answer, Handler, Host, redirect, serve, status, whole

TOKEN = "hf_secret"
CONTENT = b"weights" * 100
FILE = "owner/name/resolve/main/model.safetensors"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A server that receives all https requests, for any host. The Host header tells which host was requested."""
    monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("BOXWRIGHT_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve() as host:

        class LocalConnection(HTTPConnection):
            def connect(self) -> None:
                requested, self.host, self.port = (self.host, self.port), "127.0.0.1", int(host.url.split(":")[2][:-1])
                super().connect()
                self.host, self.port = requested

        def https_open(handler: HTTPSHandler, request: Request) -> HTTPResponse:
            return handler.do_open(LocalConnection, request)  # type: ignore[return-value]

        monkeypatch.setattr(HTTPSHandler, "https_open", https_open)
        yield host


def received(host: Host) -> list[tuple[str, str | None]]:
    """The requested host and the Authorization header of each request."""
    return [(headers["host"], headers.get("authorization")) for _, headers in host.requests]


def get(url: str, sha256: str = "") -> Path:
    return fetch(Remote(name="model.safetensors", urls=(url,), sha256=sha256), tries=2, pause=0.01)


def with_token_only(content: bytes) -> Answer:
    """Answer with the content if the request carries the token, else with status 401."""

    def answer(handler: Handler) -> None:
        authorized = handler.headers.get("Authorization") == f"Bearer {TOKEN}"
        (whole(content) if authorized else status(401))(handler)

    return answer


def test_the_token_is_sent_to_the_hub(host: Host) -> None:
    host.answer(FILE, with_token_only(CONTENT))
    assert get(f"https://huggingface.co/{FILE}").read_bytes() == CONTENT
    assert received(host) == [("huggingface.co", f"Bearer {TOKEN}")]


@pytest.mark.parametrize(
    "origin",
    [
        "https://models.example",
        "https://huggingface.co.models.example",
        "https://cdn.huggingface.co",
        "https://huggingface.co:8443",
    ],
)
def test_the_token_is_not_sent_to_other_hosts(host: Host, origin: str) -> None:
    host.answer(FILE, whole(CONTENT))
    assert get(f"{origin}/{FILE}").read_bytes() == CONTENT
    assert received(host) == [(origin.removeprefix("https://"), None)]


def test_the_token_is_not_sent_without_https(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither to an `HF_ENDPOINT` with http nor to the hub by http."""
    monkeypatch.setenv("HF_ENDPOINT", host.url)
    host.answer(FILE, whole(CONTENT))
    assert get(host.url + FILE).read_bytes() == CONTENT
    monkeypatch.setenv("HF_ENDPOINT", "https://huggingface.co")
    monkeypatch.setenv("http_proxy", host.url)  # makes the http request arrive at the local server
    host.answer("model.safetensors", whole(CONTENT))
    assert read_remote(f"http://huggingface.co/{FILE}") == CONTENT
    assert [token for _, token in received(host)] == [None, None]


def test_redirects_send_the_token_to_the_hub_only(host: Host) -> None:
    """The hub redirects to the server of large files; here that server redirects back to the hub, and it elsewhere."""
    host.answer(FILE, redirect("https://cdn.models.example/first"))
    host.answer("first", redirect("https://huggingface.co/second"))
    host.answer("second", redirect("https://other.example/third"))
    host.answer("third", whole(CONTENT))
    assert get(f"https://huggingface.co/{FILE}").read_bytes() == CONTENT
    bearer = f"Bearer {TOKEN}"
    hosts = ["huggingface.co", "cdn.models.example", "huggingface.co", "other.example"]
    assert received(host) == list(zip(hosts, [bearer, None, bearer, None], strict=True))


def test_a_redirect_within_the_hub_keeps_the_token(host: Host) -> None:
    """The hub redirects in this way if a repository was renamed."""
    host.answer(FILE, redirect("/new"))
    host.answer("new", with_token_only(CONTENT))
    assert get(f"https://huggingface.co/{FILE}").read_bytes() == CONTENT


def test_the_token_is_sent_to_hf_endpoint_instead_of_the_hub(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example:8443/")
    host.answer(FILE, whole(CONTENT))
    get(f"https://hub.example:8443/{FILE}")
    get(f"https://huggingface.co/{FILE}")
    assert [token for _, token in received(host)] == [f"Bearer {TOKEN}", None]


@pytest.mark.parametrize("token", ["", "wrong"])
def test_a_denied_request_suggests_hf_token_but_does_not_print_it(
    host: Host, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    host.answer(FILE, with_token_only(CONTENT))
    with pytest.raises(FetchError, match="HTTP 401 Unauthorized; if the repository is private, set HF_") as caught:
        get(f"https://huggingface.co/{FILE}")
    assert "wrong" not in str(caught.value)
    assert received(host)[0][1] == (f"Bearer {token}" if token else None)


def test_an_invalid_token_is_neither_sent_nor_printed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret\nHost: models.example")
    with pytest.raises(FetchError, match="HF_TOKEN contains whitespace") as caught:
        get(f"https://huggingface.co/{FILE}")
    assert "hf_secret" not in str(caught.value)
    assert host.requests == []


def add_repository(host: Host, files: dict[str, bytes | None]) -> None:
    """Add a private repository `owner/name`; the hub reports the hashes of the files that have content."""
    siblings: list[dict[str, Any]] = []
    for name, content in files.items():
        entry: dict[str, Any] = {"rfilename": name, "blobId": "0"}
        if content is not None:
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
            host.answer(f"owner/name/resolve/main/{name}", with_token_only(content))
        siblings.append(entry)
    description = json.dumps({"id": "owner/name", "private": True, "siblings": siblings}).encode()
    host.answer("api/models/owner/name?blobs=true", with_token_only(description))


def test_a_model_loads_from_a_private_repository(host: Host, tmp_path: Path) -> None:
    content = (small_run(tmp_path / "run", [Category(id=1, name="cell")]) / "weights.safetensors").read_bytes()
    add_repository(host, {"README.md": None, "cells.safetensors": content})
    assert [category.name for category in boxwright.load("hf:owner/name").categories] == ["cell"]
    assert {token for _, token in received(host)} == {f"Bearer {TOKEN}"}
    before = len(host.requests)
    assert weights_file("hf:owner/name/cells.safetensors").read_bytes() == content
    assert len(host.requests) == before + 1, "expected one request for the file list: the file itself is cached"


def test_the_hash_that_the_hub_reports_is_checked(host: Host) -> None:
    add_repository(host, {"model.safetensors": CONTENT})
    assert hub_file("hf:owner/name").sha256 == hashlib.sha256(CONTENT).hexdigest()
    host.answer(FILE, whole(b"another"))
    with pytest.raises(FetchError, match="SHA-256"):
        weights_file("hf:owner/name")


@pytest.mark.parametrize(
    ("uri", "files", "message"),
    [
        ("hf:owner", {}, "Use hf:owner/name"),
        ("hf:owner/../name", {}, "Use hf:owner/name"),
        ("hf:owner/name", {}, "has no .safetensors file. Files: none"),
        ("hf:owner/name", {"README.md": None}, "has no .safetensors file. Files: README.md"),
        ("hf:owner/name", {"a.safetensors": None, "b.safetensors": None}, "several weights files. Files: a.safe"),
        ("hf:owner/name/x.pth", {"a.safetensors": None}, "no file x.pth. Files: a.safetensors"),
    ],
)
def test_a_missing_or_ambiguous_file_is_reported_with_the_files_of_the_repository(
    host: Host, uri: str, files: dict[str, bytes | None], message: str
) -> None:
    add_repository(host, files)
    with pytest.raises((ValueError, FetchError), match=message):
        weights_file(uri)


def test_weights_safetensors_is_the_default_file(host: Host) -> None:
    add_repository(host, {"a.safetensors": None, "weights.safetensors": None})
    assert hub_file("hf:owner/name").urls == ("https://huggingface.co/owner/name/resolve/main/weights.safetensors",)


def test_an_answer_that_is_not_from_the_hub_is_reported(host: Host) -> None:
    host.answer("api/models/owner/name?blobs=true", whole(b"<html>"))
    with pytest.raises(ValueError, match="did not return a repository description"):
        hub_file("hf:owner/name")
