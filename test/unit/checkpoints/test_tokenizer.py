"""Where the tokenizer comes from, in which order, and a download that is what it should be or is not
there."""

from __future__ import annotations

import hashlib
import http.server
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashrt_runtime import cache
from flashrt_runtime.checkpoints import download, open_checkpoint, resolve_tokenizer
from flashrt_runtime.checkpoints import tokenizer as places
from flashrt_runtime.checkpoints.tokenizer import train_tokenizer
from flashrt_runtime.errors import TokenizerNotFoundError
from flashrt_runtime.processing import fast_tokens

VARIABLE = "FLASH_RT_PALIGEMMA_TOKENIZER"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty home directory, no variable, no shared place, no gcsfs."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for variable in (VARIABLE, *cache.DIRECTORY_VARIABLES, "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(places, "find_spec", lambda name: None)
    return tmp_path / "home"


@pytest.fixture
def bare(copy):
    """A checkpoint without a tokenizer."""
    (copy / "tokenizer.model").unlink()
    with open_checkpoint(copy) as checkpoint:
        yield checkpoint


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(train_tokenizer(512))
    return path


def test_the_checkpoints_own_comes_first(home, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(put(tmp_path / "mine.model")))
    with open_checkpoint(tiny) as checkpoint:
        assert resolve_tokenizer(checkpoint) == tiny / "tokenizer.model"


def test_then_the_variable_then_the_caches_in_order(home, bare, tmp_path, monkeypatch):
    openpi = put(home / ".cache/openpi/big_vision/paligemma_tokenizer.model")
    assert resolve_tokenizer(bare) == openpi
    own = put(home / ".cache/flash_rt/paligemma_tokenizer.model")
    assert resolve_tokenizer(bare) == own
    monkeypatch.setenv(VARIABLE, str(put(tmp_path / "mine.model")))
    assert resolve_tokenizer(bare) == tmp_path / "mine.model"


@pytest.mark.parametrize("variable", [*cache.DIRECTORY_VARIABLES, "XDG_CACHE_HOME"])
def test_the_cache_is_where_every_other_is(home, bare, tmp_path, monkeypatch, server, variable):
    """Downloaded to and found in the cache's directory; one in ~/.cache/flash_rt is found as before."""
    earlier = put(home / ".cache/flash_rt/paligemma_tokenizer.model")
    monkeypatch.setenv(variable, str(tmp_path / "cache"))
    assert resolve_tokenizer(bare) == earlier
    mine = tmp_path / "cache" / ("flash_rt" if variable == "XDG_CACHE_HOME" else "")
    download.download_tokenizer(places.cache_file(), server.url)
    assert resolve_tokenizer(bare) == mine / "paligemma_tokenizer.model"
    assert fast_tokens.cache_folder() == mine / "fast"


def test_a_variable_that_names_no_file_is_always_an_error(home, tiny, bare, monkeypatch):
    put(home / ".cache/flash_rt/paligemma_tokenizer.model")
    monkeypatch.setenv(VARIABLE, "/nowhere/tokenizer.model")
    for checkpoint in (bare, open_checkpoint(tiny)):
        with pytest.raises(TokenizerNotFoundError, match=r"/nowhere/tokenizer\.model: no such file"):
            resolve_tokenizer(checkpoint)


def test_none_found_names_the_command(home, bare):
    with pytest.raises(
        FileNotFoundError, match=r"no PaliGemma tokenizer in .*Run: flashrt download-tokenizer$"
    ):
        resolve_tokenizer(bare)


def test_one_from_elsewhere_must_have_the_policys_vocabulary(home, bare, monkeypatch):
    """A smaller one would give ids of other words, without any error to come."""
    file = home / ".cache/flash_rt/paligemma_tokenizer.model"
    file.parent.mkdir(parents=True)
    file.write_bytes(train_tokenizer(400))
    with pytest.raises(TokenizerNotFoundError, match="400 pieces, but the policy was trained with 512"):
        resolve_tokenizer(bare)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content` and counts."""

    content = b""
    requests = 0

    def do_GET(self):
        type(self).requests += 1
        self.send_response(200 if self.content else 404)
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A local server of a stand-in file, whose checksum is taken for the published one: the real one is far
    away."""
    content = train_tokenizer(512)
    monkeypatch.setattr(download, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(download, "SIZE", len(content))
    handler = type("Handler", (Server,), {"content": content, "requests": 0})
    instance = http.server.HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=instance.serve_forever)
    thread.start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{instance.server_port}/t", handler=handler, content=content)
    instance.shutdown()
    thread.join()
    instance.server_close()


def test_download_fetches_verifies_and_can_be_run_again(server, tmp_path):
    target = tmp_path / "deep/er/tokenizer.model"
    assert download.download_tokenizer(target, server.url)
    assert target.read_bytes() == server.content
    assert not download.download_tokenizer(target, server.url)
    assert server.handler.requests == 1


def test_a_damaged_file_is_replaced(server, tmp_path):
    target = tmp_path / "tokenizer.model"
    target.write_bytes(server.content[:-1] + b"x")
    assert download.download_tokenizer(target, server.url)
    assert target.read_bytes() == server.content


@pytest.mark.parametrize(
    "change", [lambda content: content[:-1], lambda content: content + b"x", lambda content: b""]
)
def test_other_content_is_refused_and_nothing_is_written(server, tmp_path, change):
    server.handler.content = change(server.content)
    target = tmp_path / "tokenizer.model"
    with pytest.raises(TokenizerNotFoundError, match=r"is not PaliGemma's tokenizer|could not be fetched"):
        download.download_tokenizer(target, server.url)
    assert list(tmp_path.iterdir()) == []


def test_no_network(tmp_path):
    with pytest.raises(TokenizerNotFoundError, match="could not be fetched"):
        download.download_tokenizer(tmp_path / "t.model", "http://127.0.0.1:9/none", timeout_s=5)


def test_the_published_files_identity():
    """Size and checksum as many projects pin them."""
    assert download.SIZE == 4264023
    assert download.SHA256.startswith("8986bb4f423f07f8")


def test_openpis_bucket_through_gcsfs(home, bare, server, monkeypatch):
    """gcsfs is a stand-in: the bucket is out of reach of tests."""

    class Filesystem:
        def __init__(self, token):
            assert token == "anon"

        def cat_file(self, path):
            assert path == "big_vision/paligemma_tokenizer.model"
            return server.content

    monkeypatch.setattr(places, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "gcsfs", SimpleNamespace(GCSFileSystem=Filesystem))
    found = resolve_tokenizer(bare)
    assert found == home / ".cache/flash_rt/paligemma_tokenizer.model"
    assert found.read_bytes() == server.content


def test_gcsfs_without_network(home, bare, monkeypatch):
    monkeypatch.setattr(places, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "gcsfs", SimpleNamespace())
    with pytest.raises(
        TokenizerNotFoundError, match=r"could not be fetched.*Run: flashrt download-tokenizer"
    ):
        resolve_tokenizer(bare)
