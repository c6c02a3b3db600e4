"""Models of the Hugging Face hub against a server in this process: there, gone, unknown, private, without network."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from isomorph.engine.config import ModelConfig, TinyModel, UserError
from isomorph.engine.model.load import build_tiny, load_policy, read_shape
from isomorph.engine.model.policy import Policy

SMALLEST = TinyModel(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=16)
COMMIT = "1" * 40
ERRORS = {"me/none": (404, "RepoNotFound"), "me/gated": (403, "GatedRepo"), "me/data": (404, "EntryNotFound")}


class Hub(http.server.ThreadingHTTPServer):
    """Has the model me/model."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder = folder
        self.asked: list[str] = []


class Answers(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        for name, (status, code) in ERRORS.items():
            if self.path.startswith(f"/{name}/"):
                return self._send(status, b"", {"X-Error-Code": code})
        file = self.server.folder / self.path.rpartition("/")[2]
        if "/resolve/" not in self.path or not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = file.read_bytes()
        self._send(200, content, {"ETag": f'"{file.name}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None: ...


def point_to(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    here = f"http://127.0.0.1:{port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here)
    template = here + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def nobody() -> int:
    """A port on which nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    policy = build_tiny(SMALLEST, ["one", "two"], seed=0, dtype=torch.float32, device=torch.device("cpu"))
    policy.model.save_pretrained(tmp_path / "model")
    policy.text.tokenizer.save_pretrained(tmp_path / "model")
    server = Hub(tmp_path / "model")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_to(server.server_port, monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.shutdown()
    server.server_close()


def load(name: str) -> Policy:
    return load_policy(ModelConfig(path=name), vocabulary=[], seed=0, device=torch.device("cpu"))


@pytest.mark.usefixtures("hub")
def test_a_model_of_the_hub_is_read_from_its_cache_when_the_hub_is_gone(
    nobody: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load("me/model")
    assert not any("cache" in note for note in first.notes)
    point_to(nobody, monkeypatch)
    started = time.monotonic()
    again = load("me/model")
    assert time.monotonic() - started < 30  # retries took a minute
    assert any("me/model is read from the hub's cache on this machine: ConnectError" in note for note in again.notes)
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])


@pytest.mark.usefixtures("hub")
def test_a_hub_that_cannot_be_reached_is_said_within_seconds(nobody: int, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to(nobody, monkeypatch)
    for read in (load, lambda name: read_shape(ModelConfig(path=name), [])):
        started = time.monotonic()
        with pytest.raises(UserError, match=r"^model.path: me/model: the hub cannot be reached \(ConnectError: "):
            read("me/model")
        assert time.monotonic() - started < 30  # retries took a minute


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("me/none", "the hub has no such model, or it is private: correct the name, or log in: hf auth login"),
        ("me/gated", "the model asks for its conditions to be accepted: accept them on its page, then log in"),
        ("me/data", "the hub has it, but without a config.json"),
    ],
)
def test_what_the_hub_refuses_is_said_after_one_question(hub: Hub, name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=f"^model.path: {name}: {sentence}"):
        load(name)
    assert len(hub.asked) == 1


def test_a_name_that_the_hub_cannot_have_is_refused(hub: Hub) -> None:
    with pytest.raises(UserError, match=r"must be a folder, a .gguf file, or OWNER/NAME on the hub, got 'a/b/c'"):
        load("a/b/c")
    assert hub.asked == []
