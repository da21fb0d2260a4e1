"""`fetch` returns a complete, verified file or raises a clear error, also if hosts are slow, faulty or unreachable."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from email.message import Message
from io import BytesIO
from pathlib import Path
from urllib.request import Request

import pytest

from boxwright.weights.download import _PermanentError, _Redirects
from boxwright.weights.fetch import FetchError, Remote, cached_path, fetch, hash_in_name, read_remote, remote_file
from training.runs import start_python
from weights.hosts import Host, cut, redirect, serve, stall, status, whole

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = f"model_20181010-{SHA256[:8]}.pth"


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use an empty cache folder and no proxy."""
    monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("BOXWRIGHT_OFFLINE", raising=False)


@pytest.fixture
def host() -> Iterator[Host]:
    with serve() as host:
        yield host


def get(*urls: str, sha256: str = SHA256, timeout: float = 20) -> Path:
    return fetch(Remote(name=NAME, urls=urls, sha256=sha256), timeout=timeout, tries=3, pause=0.01)


def cached_files(tmp_path: Path) -> dict[str, int]:
    """Sizes of the files in the cache by name, without lock files."""
    files = (tmp_path / "cache").rglob("*")
    return {path.name: path.stat().st_size for path in files if path.is_file() and not path.name.endswith(".lock")}


def assert_complete(path: Path, tmp_path: Path) -> None:
    assert path.read_bytes() == CONTENT
    assert cached_files(tmp_path) == {NAME: len(CONTENT)}


def test_a_file_is_downloaded_once_and_then_cached(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = host.answer(NAME, whole(CONTENT))
    assert_complete(get(url), tmp_path)
    monkeypatch.setenv("BOXWRIGHT_OFFLINE", "1")
    assert_complete(get(url), tmp_path)
    assert len(host.requests) == 1


def test_a_damaged_cached_file_is_downloaded_again(host: Host, tmp_path: Path) -> None:
    url = host.answer(NAME, whole(CONTENT))
    get(url).write_bytes(b"x" + CONTENT[1:])
    assert_complete(get(url), tmp_path)
    assert len(host.requests) == 2


def test_an_interrupted_download_is_resumed(host: Host, tmp_path: Path) -> None:
    url = host.answer(NAME, cut(CONTENT, 100_000), cut(CONTENT, 50_000), whole(CONTENT))
    assert_complete(get(url), tmp_path)
    assert host.ranges() == [None, "bytes=100000-", "bytes=150000-"]
    assert host.requests[1][1]["if-range"] == '"1"'


def test_interruptions_after_much_progress_do_not_count_as_tries(host: Host, tmp_path: Path) -> None:
    large = random.Random(1).randbytes(5 << 20)
    url = host.answer("large.pth", *[cut(large, (1 << 20) + 7) for _ in range(4)], whole(large))
    path = fetch(Remote(name="large.pth", urls=(url,)), timeout=20, tries=1, pause=0.01)
    assert path.read_bytes() == large
    assert len(host.requests) == 5


@pytest.mark.parametrize("sha256", [SHA256, ""])
def test_a_file_that_changed_on_the_host_is_downloaded_from_the_start(host: Host, tmp_path: Path, sha256: str) -> None:
    old = b"o" * len(CONTENT)
    url = host.answer(NAME, cut(old, 1000, etag='"old"'), whole(CONTENT, etag='"new"'))
    assert_complete(get(url, sha256=sha256), tmp_path)


def test_a_mix_of_two_versions_is_detected_by_the_hash(host: Host, tmp_path: Path) -> None:
    """The host sends different files with the same ETag."""
    url = host.answer(NAME, cut(b"o" * len(CONTENT), 1000), whole(CONTENT))
    assert_complete(get(url), tmp_path)
    assert host.ranges() == [None, "bytes=1000-", None]


def test_a_host_that_ignores_ranges_sends_the_whole_file_again(host: Host, tmp_path: Path) -> None:
    url = host.answer(NAME, cut(CONTENT, 1000), whole(CONTENT, ranges=False))
    assert_complete(get(url), tmp_path)
    assert host.ranges() == [None, "bytes=1000-"]


def test_after_a_wrong_range_the_whole_file_is_requested(host: Host, tmp_path: Path) -> None:
    wrong = whole(CONTENT, Content_Range=f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}")
    url = host.answer(NAME, cut(CONTENT, 1000), wrong, whole(CONTENT))
    assert_complete(get(url), tmp_path)
    assert host.ranges() == [None, "bytes=1000-", None]


def test_a_mirror_resumes_the_download_of_another_mirror(host: Host, tmp_path: Path) -> None:
    with serve() as second:
        first_url = host.answer(NAME, cut(CONTENT, 100_000))
        assert_complete(get(first_url, second.answer(NAME, whole(CONTENT, etag='"other"'))), tmp_path)
        assert second.ranges() == ["bytes=100000-"]
        assert "if-range" not in second.requests[0][1]


def test_without_a_hash_a_mirror_does_not_resume_the_download_of_another(host: Host, tmp_path: Path) -> None:
    with serve() as second:
        first_url = host.answer(NAME, cut(b"o" * len(CONTENT), 100_000))
        assert_complete(get(first_url, second.answer(NAME, whole(CONTENT)), sha256=""), tmp_path)
        assert second.ranges() == [None]


def test_after_a_timeout_the_next_mirror_is_tried(host: Host, tmp_path: Path) -> None:
    released = threading.Event()
    with serve() as second:
        start = time.perf_counter()
        stalled = host.answer(NAME, stall(CONTENT, 1000, released))
        path = get(stalled, second.answer(NAME, whole(CONTENT)), timeout=0.5)
        assert time.perf_counter() - start < 10
        assert_complete(path, tmp_path)
    released.set()


def test_an_overloaded_host_is_retried(host: Host, tmp_path: Path) -> None:
    assert_complete(get(host.answer(NAME, status(503), status(429), whole(CONTENT))), tmp_path)


def test_the_error_lists_all_mirrors_with_their_errors(host: Host, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening, so that connections are refused
        unreachable = f"http://127.0.0.1:{unused.getsockname()[1]}/{NAME}"
        missing = host.answer("missing", status(404))
        broken = host.answer("broken", status(500))
        with pytest.raises(FetchError) as caught:
            get(unreachable, missing, broken)
    message = str(caught.value)
    assert f"{unreachable}: [Errno" in message
    assert f"{missing}: HTTP 404 Not Found" in message
    assert f"{broken}: HTTP 500 Internal Server Error" in message
    assert str(cached_path(Remote(name=NAME, urls=(unreachable,), sha256=SHA256))) in message
    # Status 404 is permanent, status 500 is retried.
    assert [path for path, _ in host.requests] == ["/missing", "/broken", "/broken", "/broken"]
    assert cached_files(tmp_path) == {}


@pytest.mark.parametrize("sha256", [SHA256, SHA256[:8]])
def test_a_file_with_another_hash_is_rejected_without_retry(host: Host, tmp_path: Path, sha256: str) -> None:
    other = b"another file"
    actual = hashlib.sha256(other).hexdigest()[: len(sha256)]
    with pytest.raises(FetchError, match=f"SHA-256 mismatch: .* starts with {sha256}, got {actual}"):
        get(host.answer(NAME, whole(other)), sha256=sha256)
    assert len(host.requests) == 1
    assert cached_files(tmp_path) == {}


@pytest.mark.parametrize("digits", [6, 32])
def test_an_md5_hash_is_checked_after_download_and_on_each_call(host: Host, tmp_path: Path, digits: int) -> None:
    md5 = hashlib.md5(CONTENT).hexdigest()[:digits]
    url = host.answer(NAME, whole(b"another file"), whole(CONTENT))
    remote = Remote(name=NAME, urls=(url,), md5=md5)
    with pytest.raises(FetchError, match=f"MD5 mismatch: .* starts with {md5}, got [0-9a-f]{{{digits}}}"):
        fetch(remote, pause=0.01)
    assert cached_files(tmp_path) == {}
    assert_complete(fetch(remote), tmp_path)
    cached_path(remote).write_bytes(b"damaged")
    assert_complete(fetch(remote), tmp_path)
    assert_complete(fetch(remote), tmp_path)
    assert len(host.requests) == 3


def test_both_hashes_must_match(host: Host) -> None:
    url = host.answer(NAME, whole(CONTENT))
    with pytest.raises(FetchError, match="MD5"):
        fetch(Remote(name=NAME, urls=(url,), sha256=SHA256, md5="000000"), pause=0.01)


def test_a_wrong_content_length_is_an_error(host: Host, tmp_path: Path) -> None:
    url = host.answer(NAME, lambda handler: handler.send(200, CONTENT, Content_Length=len(CONTENT) + 10))
    with pytest.raises(FetchError, match=r"closed the connection after 300,000 of 300,010 bytes"):
        get(url)
    assert NAME not in cached_files(tmp_path)
    url = host.answer(NAME, lambda handler: handler.send(200, CONTENT, Content_Length=len(CONTENT) - 10))
    with pytest.raises(FetchError, match="SHA-256 mismatch"):
        get(url)
    assert cached_files(tmp_path) == {}


def test_a_file_that_became_shorter_is_downloaded_from_the_start(host: Host, tmp_path: Path) -> None:
    longer = CONTENT + b"more"
    url = host.answer(NAME, cut(longer, len(CONTENT) + 1), whole(CONTENT))  # the second answer is 416, out of range
    assert_complete(get(url), tmp_path)


def test_an_interruption_is_reported_and_the_next_call_resumes(host: Host, tmp_path: Path) -> None:
    url = host.answer(NAME, cut(CONTENT, 1000))
    with pytest.raises(FetchError, match="after 3,000 of 300,000 bytes"):
        get(url)
    assert NAME not in cached_files(tmp_path)
    host.answer(NAME, whole(CONTENT))
    assert_complete(get(url), tmp_path)
    assert host.ranges()[-1] == "bytes=3000-"


def test_redirects_keep_the_range(host: Host, tmp_path: Path) -> None:
    final = host.answer("final", cut(CONTENT, 1000), whole(CONTENT))
    assert_complete(get(host.answer(NAME, redirect(final))), tmp_path)
    assert host.ranges() == [None, None, "bytes=1000-", "bytes=1000-"]


@pytest.mark.parametrize("location", ["file:///etc/hostname", "ftp://127.0.0.1/x"])
def test_redirects_away_from_http_are_refused(host: Host, tmp_path: Path, location: str) -> None:
    with pytest.raises(FetchError, match=f"(refused the redirect to |Redirection to url .){location}"):
        get(host.answer(NAME, redirect(location)))
    assert len(host.requests) == 1


def test_circular_redirects_are_an_error(host: Host) -> None:
    with pytest.raises(FetchError, match="infinite loop"):
        get(host.answer(NAME, redirect(host.url + NAME)))
    assert len(host.requests) < 20


def test_a_redirect_from_https_to_http_is_refused() -> None:
    request = Request("https://models.example/a.pth")
    with pytest.raises(_PermanentError, match="refused the redirect to http://models"):
        _Redirects().redirect_request(request, BytesIO(), 302, "", Message(), "http://models.example/a.pth")
    followed = _Redirects().redirect_request(request, BytesIO(), 302, "", Message(), "https://models.example/b.pth")
    assert followed.full_url == "https://models.example/b.pth"


def test_a_compressed_answer_is_rejected(host: Host) -> None:
    with pytest.raises(FetchError, match="the host sends Content-Encoding gzip"):
        get(host.answer(NAME, whole(CONTENT, Content_Encoding="gzip")))


def test_an_answer_without_a_length_is_accepted_if_complete(host: Host, tmp_path: Path) -> None:
    def chunked(end: bytes) -> object:
        def answer(handler: object) -> None:
            handler.send_response(200)
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            handler.wfile.write(b"%x\r\n%s\r\n%s" % (len(CONTENT), CONTENT, end))

        return answer

    url = host.answer(NAME, chunked(b""), chunked(b"0\r\n\r\n"))
    assert_complete(get(url, sha256=""), tmp_path)
    assert len(host.requests) == 2


def test_the_proxy_of_the_environment_is_used(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host.answer(NAME, whole(CONTENT))
    monkeypatch.setenv("http_proxy", host.url)
    assert_complete(get(f"http://models.example/{NAME}"), tmp_path)
    assert host.requests[0][0] == f"http://models.example/{NAME}"


def test_offline_mode_sends_no_requests(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOXWRIGHT_OFFLINE", "1")
    url = host.answer(NAME, whole(CONTENT))
    with pytest.raises(FetchError, match="BOXWRIGHT_OFFLINE is set"):
        get(url)
    with pytest.raises(FetchError, match="BOXWRIGHT_OFFLINE is set"):
        read_remote(url)
    assert host.requests == []
    path = cached_path(Remote(name=NAME, urls=(url,), sha256=SHA256))
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert get(url) == path


def test_an_unusable_cache_folder_is_reported_with_its_variable(host: Host, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(OSError, match="Set BOXWRIGHT_CACHE to another folder"):
        get(host.answer(NAME, whole(CONTENT)))


def test_a_full_disk_is_reported_with_the_file_and_the_part_is_kept(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = host.answer(NAME, whole(CONTENT))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match=rf"cannot write .*{NAME} \(.*No space left"):
            get(url)
    assert NAME not in cached_files(tmp_path)
    assert_complete(get(url), tmp_path)
    assert len(host.requests) == 1


@pytest.mark.parametrize("url", ["http://a.example/a b.pth", "http://a.example/ü.pth", "http://a.example:x/a.pth"])
def test_an_invalid_url_is_an_error_without_retry(url: str) -> None:
    with pytest.raises(FetchError, match="invalid URL"):
        fetch(Remote(name=NAME, urls=(url,), sha256=SHA256), pause=100)


FETCH = """
from boxwright.weights.fetch import Remote, fetch
print(fetch(Remote(name={name!r}, urls=({url!r},), sha256={sha256!r}), timeout=20, tries=3, pause=0.01))
"""


def test_two_processes_download_a_file_once(host: Host, tmp_path: Path) -> None:
    def slow(handler: object) -> None:
        time.sleep(0.5)
        whole(CONTENT)(handler)

    code = FETCH.format(name=NAME, url=host.answer(NAME, slow), sha256=SHA256)
    processes = [start_python(code) for _ in range(2)]
    for process in processes:
        path, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert_complete(Path(path.strip()), tmp_path)
    assert len(host.requests) == 1


def test_the_part_of_a_killed_process_is_unlocked_and_resumed(host: Host, tmp_path: Path) -> None:
    released = threading.Event()
    url = host.answer(NAME, stall(CONTENT, 200_000, released))
    process = start_python(FETCH.format(name=NAME, url=url, sha256=SHA256))
    deadline = time.monotonic() + 60
    while cached_files(tmp_path).get(f"{NAME}.part", 0) < 50_000:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    released.set()
    received = cached_files(tmp_path)[f"{NAME}.part"]
    assert NAME not in cached_files(tmp_path)
    host.answer(NAME, whole(CONTENT))
    assert_complete(get(url), tmp_path)
    assert host.ranges() == [None, f"bytes={received}-"]


def test_a_part_with_damaged_metadata_is_discarded(host: Host, tmp_path: Path) -> None:
    url = host.answer(NAME, whole(CONTENT))
    path = cached_path(Remote(name=NAME, urls=(url,), sha256=SHA256))
    path.parent.mkdir(parents=True)
    path.with_name(f"{NAME}.part").write_bytes(b"?" * 1000)
    path.with_name(f"{NAME}.part.json").write_text('{"url": 1')
    assert_complete(get(url), tmp_path)
    assert host.ranges() == [None]


def test_a_complete_part_is_used_without_a_request(host: Host, tmp_path: Path) -> None:
    """A process killed between the last byte and the renaming leaves such a part."""
    url = host.answer(NAME, whole(CONTENT))
    path = get(url)
    path.rename(path.with_name(f"{NAME}.part"))
    metadata = f'{{"url": "{url}", "validator": "\\"1\\"", "length": {len(CONTENT)}}}'
    path.with_name(f"{NAME}.part.json").write_text(metadata)
    assert_complete(get(url), tmp_path)
    assert len(host.requests) == 1


def test_the_hash_is_read_from_the_url() -> None:
    assert hash_in_name("maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth") == "bf2d0c1e"
    assert hash_in_name("mask_rcnn_r50_fpn_1x_20181010-069fa190.pth") == "069fa190"
    assert hash_in_name(f"m-{SHA256}.safetensors") == SHA256
    assert hash_in_name("model-20181010.pth") == ""
    assert hash_in_name("R-50.pkl") == ""
    assert remote_file("https://a.example/b/m-bf2d0c1e.pth?x=1").sha256 == "bf2d0c1e"
    remote = remote_file(f"https://a.example/b/m%2B.pth#sha256={SHA256}")
    assert remote == Remote(name="m+.pth", urls=("https://a.example/b/m%2B.pth",), sha256=SHA256)
    for wrong in (
        "https://a.example/",
        "https://a.example/..",
        "https://a.example/a%2Fb",
        "file:///a/b.pth",
        "https:/b",
    ):
        with pytest.raises(ValueError, match="not the URL of a file"):
            remote_file(wrong)
    with pytest.raises(ValueError, match=r"#sha256= must be followed by .*, got '0123'"):
        remote_file("https://a.example/b.pth#sha256=0123")


def test_files_of_the_same_name_have_separate_cache_paths() -> None:
    urls = ("https://a.example/model.pth", "https://b.example/model.pth")
    assert len({cached_path(remote_file(url)) for url in urls}) == 2
    assert len({cached_path(remote_file(f"{urls[0]}#sha256={digit * 8}")) for digit in "ab"}) == 2


def test_read_remote_limits_the_size(host: Host) -> None:
    url = host.answer("zoo.toml", whole(b"x" * 1000))
    assert read_remote(url, limit=1000) == b"x" * 1000
    with pytest.raises(FetchError, match="larger than the limit of 999 bytes"):
        read_remote(url, limit=999)
    with pytest.raises(FetchError, match="HTTP 404"):
        read_remote(host.url + "none")
