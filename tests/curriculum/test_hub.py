"""run.push_to_hub against a server in this process that speaks as much of the hub's protocol as an upload needs."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from isomorph.curriculum.assemble import run_recipe
from isomorph.curriculum.hub import prepare_push, push
from isomorph.curriculum.named_recipes import FOLDER
from isomorph.curriculum.recipe import Recipe
from isomorph.engine.config import RunConfig, UserError
from isomorph.engine.distributed.ranks import ALONE
from isomorph.engine.recipe_file import load_recipe
from isomorph.engine.types import RunFailed

SMOKE = FOLDER / "smoke.toml"


class Hub(ThreadingHTTPServer):
    """Keeps what it is sent; refuses with ``status`` if that is set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.status = 0
        self.made: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.status:
            return self._send(self.server.status, {"error": "no write access"})
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self._send(200, {"url": f"{self._here()}/me/model"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            whole = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self._send(200, {"files": whole})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._send(200, {"commitUrl": f"{self._here()}/me/model/commit/1", "commitOid": "1"})

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self._send(self.server.status or 200, {"id": "me/model", "sha": "0", "siblings": []})

    def _here(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def _send(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_TOKEN", "a-token")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(range(256)))
    return tmp_path / "model"


def test_the_models_files_arrive_in_a_private_repository(hub: Hub, model: Path) -> None:
    prepare_push("me/model")
    assert [(made["name"], made["organization"]) for made in hub.made] == [("model", "me")]
    assert hub.made[0].get("private") is True or hub.made[0].get("visibility") == "private"
    assert hub.asked == ["/api/models/me/model/auth-check/write"]
    address = push("me/model", model)
    assert address is not None and address.endswith("/me/model/commit/1")
    assert hub.files == {"config.json": b"{}", "model.safetensors": bytes(range(256))}
    assert hub.tokens == {"Bearer a-token"}


def test_what_is_off_asks_nobody(hub: Hub, model: Path) -> None:
    prepare_push(None)
    assert push(None, model) is None
    assert hub.tokens == set()


def test_a_refusal_is_said_before_the_first_step_and_after_the_last(hub: Hub, model: Path) -> None:
    hub.status = 403
    with pytest.raises(
        UserError, match='run.push_to_hub: the repository "me/model" can be neither made nor written to: .*403'
    ):
        prepare_push("me/model")
    with pytest.raises(RunFailed, match=r"the run is done, but .*\(again: hf upload me/model .*403"):
        push("me/model", model)


def test_without_a_token_or_a_server_a_sentence_says_so(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(UserError, match="can be neither made nor written to"):
        prepare_push("me/model")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match=r"needs a token of the hub: log in with hf auth login, set HF_TOKEN"):
        prepare_push("me/model")
    with pytest.raises(ValueError, match="push_to_hub"):
        RunConfig(push_to_hub="no-slash")


def test_a_run_pushes_its_model_and_says_where(hub: Hub, tmp_path: Path) -> None:
    quick = ("stage.0.steps=1", "stage.1.steps=1", "stage.2.steps=1", "eval.prompts=1", "run.push_to_hub=me/model")
    console, threads = Console(file=io.StringIO(), width=300), torch.get_num_threads()
    run_recipe(load_recipe(SMOKE, list(quick), Recipe), tmp_path, console, lambda: False, ALONE, resume=False)
    torch.set_num_threads(threads)  # the recipe asks for one
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == hub.files
    assert isinstance(console.file, io.StringIO) and "/me/model/commit/1" in console.file.getvalue()
