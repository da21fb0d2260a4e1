"""Files of the Hugging Face hub come by the name of their repository; a token goes there over https, nowhere else."""

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
from boxwright.weights.fetch import Remote, fetch, read_page
from boxwright.weights.hub import hub_file
from small_model import small_run
from weights.hosts import Answer, Handler, Host, redirect, serve, status, whole

TOKEN = "hf_secret"
CONTENT = b"weights" * 100
FILE = "owner/name/resolve/main/model.safetensors"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A server that all https URLs lead to, whatever their host; the Host header tells which was meant."""
    monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("BOXWRIGHT_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve() as host:

        class Here(HTTPConnection):
            def connect(self) -> None:
                named, self.host, self.port = (self.host, self.port), "127.0.0.1", int(host.url.split(":")[2][:-1])
                super().connect()
                self.host, self.port = named

        def https_open(handler: HTTPSHandler, request: Request) -> HTTPResponse:
            return handler.do_open(Here, request)  # type: ignore[return-value]

        monkeypatch.setattr(HTTPSHandler, "https_open", https_open)
        yield host


def asked(host: Host) -> list[tuple[str, str | None]]:
    """The host that each request meant, and the token that came with it."""
    return [(headers["host"], headers.get("authorization")) for _, headers in host.requests]


def get(url: str, sha256: str = "") -> Path:
    return fetch(Remote(name="model.safetensors", urls=(url,), sha256=sha256), tries=2, pause=0.01)


def for_the_token_alone(content: bytes) -> Answer:
    def answer(handler: Handler) -> None:
        good = handler.headers.get("Authorization") == f"Bearer {TOKEN}"
        (whole(content) if good else status(401))(handler)

    return answer


def test_the_hub_gets_the_token(host: Host) -> None:
    host.answer(FILE, for_the_token_alone(CONTENT))
    assert get(f"https://huggingface.co/{FILE}").read_bytes() == CONTENT
    assert asked(host) == [("huggingface.co", f"Bearer {TOKEN}")]


@pytest.mark.parametrize(
    "place",
    [
        "https://models.example",
        "https://huggingface.co.models.example",
        "https://cdn.huggingface.co",
        "https://huggingface.co:8443",
    ],
)
def test_other_hosts_do_not(host: Host, place: str) -> None:
    host.answer(FILE, whole(CONTENT))
    assert get(f"{place}/{FILE}").read_bytes() == CONTENT
    assert asked(host) == [(place.removeprefix("https://"), None)]


def test_nor_does_the_hub_without_https(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a stand-in for it that has none."""
    monkeypatch.setenv("HF_ENDPOINT", host.url)
    host.answer(FILE, whole(CONTENT))
    assert get(host.url + FILE).read_bytes() == CONTENT
    monkeypatch.setenv("HF_ENDPOINT", "https://huggingface.co")
    monkeypatch.setenv("http_proxy", host.url)  # to which a request without https can be sent from here
    host.answer("model.safetensors", whole(CONTENT))
    assert read_page(f"http://huggingface.co/{FILE}") == CONTENT
    assert [token for _, token in asked(host)] == [None, None]


def test_a_redirect_takes_the_token_nowhere_else(host: Host) -> None:
    """As where the hub points to the server that stores its large files; and on from there, back to the hub."""
    host.answer(FILE, redirect("https://cdn.models.example/first"))
    host.answer("first", redirect("https://huggingface.co/second"))
    host.answer("second", redirect("https://other.example/third"))
    host.answer("third", whole(CONTENT))
    assert get(f"https://huggingface.co/{FILE}").read_bytes() == CONTENT
    bearer = f"Bearer {TOKEN}"
    hosts = ["huggingface.co", "cdn.models.example", "huggingface.co", "other.example"]
    assert asked(host) == list(zip(hosts, [bearer, None, bearer, None], strict=True))


def test_a_redirect_within_the_hub_keeps_it(host: Host) -> None:
    """As of a repository that was renamed."""
    host.answer(FILE, redirect("/new"))
    host.answer("new", for_the_token_alone(CONTENT))
    assert get(f"https://huggingface.co/{FILE}").read_bytes() == CONTENT


def test_the_endpoint_of_the_environment_gets_the_token_in_its_place(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example:8443/")
    host.answer(FILE, whole(CONTENT))
    get(f"https://hub.example:8443/{FILE}")
    get(f"https://huggingface.co/{FILE}")
    assert [token for _, token in asked(host)] == [f"Bearer {TOKEN}", None]


@pytest.mark.parametrize("token", ["", "wrong"])
def test_a_refusal_says_what_to_set_and_not_what_is_set(
    host: Host, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    host.answer(FILE, for_the_token_alone(CONTENT))
    with pytest.raises(FetchError, match="HTTP 401 Unauthorized; if it is private, set HF_TOKEN") as caught:
        get(f"https://huggingface.co/{FILE}")
    assert "wrong" not in str(caught.value)
    assert asked(host)[0][1] == (f"Bearer {token}" if token else None)


def test_a_token_that_is_none_is_not_sent_and_not_shown(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret\nHost: models.example")
    with pytest.raises(FetchError, match="HF_TOKEN holds more than") as caught:
        get(f"https://huggingface.co/{FILE}")
    assert "hf_secret" not in str(caught.value)
    assert host.requests == []


def repository(host: Host, files: dict[str, bytes | None]) -> None:
    """A private repository `owner/name`, whose list states the hashes of those of its files that have content."""
    siblings: list[dict[str, Any]] = []
    for name, content in files.items():
        entry: dict[str, Any] = {"rfilename": name, "blobId": "0"}
        if content is not None:
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
            host.answer(f"owner/name/resolve/main/{name}", for_the_token_alone(content))
        siblings.append(entry)
    page = json.dumps({"id": "owner/name", "private": True, "siblings": siblings}).encode()
    host.answer("api/models/owner/name?blobs=true", for_the_token_alone(page))


def test_a_private_repository_loads_by_its_name(host: Host, tmp_path: Path) -> None:
    content = (small_run(tmp_path / "run", [Category(id=1, name="cell")]) / "weights.safetensors").read_bytes()
    repository(host, {"README.md": None, "cells.safetensors": content})
    assert [category.name for category in boxwright.load("hf:owner/name").categories] == ["cell"]
    assert {token for _, token in asked(host)} == {f"Bearer {TOKEN}"}
    before = len(host.requests)
    assert weights_file("hf:owner/name/cells.safetensors").read_bytes() == content
    assert len(host.requests) == before + 1, "the hub is asked for its list, and the file is in the cache"


def test_the_hash_that_the_hub_states_is_checked(host: Host) -> None:
    repository(host, {"model.safetensors": CONTENT})
    assert hub_file("hf:owner/name").sha256 == hashlib.sha256(CONTENT).hexdigest()
    host.answer(FILE, whole(b"another"))
    with pytest.raises(FetchError, match="SHA-256"):
        weights_file("hf:owner/name")


@pytest.mark.parametrize(
    ("place", "files", "message"),
    [
        ("hf:owner", {}, "give hf:owner/name"),
        ("hf:owner/../name", {}, "give hf:owner/name"),
        ("hf:owner/name", {}, "holds no .safetensors file: there is nothing"),
        ("hf:owner/name", {"README.md": None}, "holds no .safetensors file: there is README.md"),
        ("hf:owner/name", {"a.safetensors": None, "b.safetensors": None}, "several weights files: there is a.safe"),
        ("hf:owner/name/x.pth", {"a.safetensors": None}, "no file x.pth: there is a.safetensors"),
    ],
)
def test_what_a_repository_does_not_hold_is_told(
    host: Host, place: str, files: dict[str, bytes | None], message: str
) -> None:
    repository(host, files)
    with pytest.raises((ValueError, FetchError), match=message):
        weights_file(place)


def test_weights_safetensors_comes_first(host: Host) -> None:
    repository(host, {"a.safetensors": None, "weights.safetensors": None})
    assert hub_file("hf:owner/name").urls == ("https://huggingface.co/owner/name/resolve/main/weights.safetensors",)


def test_a_page_that_is_none_of_the_hub_is_told(host: Host) -> None:
    host.answer("api/models/owner/name?blobs=true", whole(b"<html>"))
    with pytest.raises(ValueError, match="says nothing of a repository"):
        hub_file("hf:owner/name")
