"""Datasets of the hub against a server in this process: a dataset that changes, and one that stops arriving."""

import http.server
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_rewards_run import RECIPE
from tiny_runs import run, summary_of

from isomorph.curriculum.report.run_record import read_run_json
from isomorph.curriculum.rows import hub as hub_module
from isomorph.engine.config import UserError
from isomorph.engine.hub import PATIENCE_S
from isomorph.engine.record.runlog import read_steps

datasets = pytest.importorskip("datasets")


class Hub(http.server.ThreadingHTTPServer):
    """Keeps one dataset, me/sums, of one JSON Lines file, at each of its commits."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.commits: dict[str, bytes] = {}  # the last one is main
        self.is_stalled = False

    def commit(self, digit: str, rows: list[dict[str, Any]]) -> str:
        name = digit * 40
        self.commits[name] = "".join(json.dumps(row) + "\n" for row in rows).encode()
        return name


class Answers(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        revision = next((part for part in path.split("/") if part in self.server.commits), None)
        if revision is None and re.search("[0-9a-f]{40}", path):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        commit = revision or list(self.server.commits)[-1]
        content = self.server.commits[commit]
        entry = {"type": "file", "path": "train.jsonl", "size": len(content), "oid": commit}
        if "/resolve/" in path:
            if not path.endswith("train.jsonl"):
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return self._send(200, content, {"ETag": f'"{commit}"', "X-Repo-Commit": commit})
        if "/tree/" in path or "/paths-info/" in path:
            return self._send(200, json.dumps([entry]).encode(), {})
        siblings = [{"rfilename": "train.jsonl"}]
        self._send(200, json.dumps({"id": "me/sums", "sha": commit, "siblings": siblings, "tags": []}).encode(), {})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.is_stalled and "/resolve/" in self.path:
            self.wfile.write(content[:20])
            time.sleep(20)
            return
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here)
    template = here + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", here)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    yield server
    server.shutdown()
    server.server_close()


def rows(first: int) -> list[dict[str, Any]]:
    return [{"question": f"{n} plus {n} is", "answer": str(2 * n)} for n in range(first, first + 20)]


def test_a_commit_is_read_as_it_was_also_without_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    old = hub.commit("1", rows(0))
    found = hub_module.with_revision("me/sums")
    assert found == f"me/sums@{old}"
    new = hub.commit("2", rows(100))
    assert hub_module.read_hub(found, None, "train").row(0) == rows(0)[0]
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert hub_module.with_revision("me/sums") == found  # what is in the cache
        assert hub_module.read_hub(found, None, "train").row(0) == rows(0)[0]
        with pytest.raises(UserError, match=f"cannot be reached .*has another revision, {old}: connect this machine"):
            hub_module.read_hub(f"me/sums@{new}", None, "train")
    assert hub_module.read_hub("me/sums", None, "train").row(0) == rows(100)[0]
    with pytest.raises(UserError, match=r"me/sums@3+: the hub has the dataset, but not \(or no longer\) this revision"):
        hub_module.read_hub(f"me/sums@{'3' * 40}", None, "train")


def test_a_download_from_which_nothing_arrives_is_said_and_given_up(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert PATIENCE_S < 5 and hub_module.QUIET_S + hub_module.POLL_S < 5
    monkeypatch.setattr(hub_module, "QUIET_S", 0.5)
    monkeypatch.setattr(hub_module, "STALLED_S", 2.0)
    hub.commit("1", rows(0))
    hub.is_stalled = True
    started = time.monotonic()
    with pytest.raises(UserError, match="hub:me/sums: nothing arrived from the hub for 2 s: start again"):
        hub_module.read_hub("me/sums", None, "train")
    assert time.monotonic() - started < 10
    assert (
        "note: hub:me/sums: nothing has arrived from the hub for 0.5 s; it is given up after 2 s"
        in capsys.readouterr().err
    )


def test_a_resumed_run_reads_the_rows_that_it_began_with(hub: Hub, tmp_path: Path) -> None:
    """Between start and resume the dataset got another commit; the end is that of the uninterrupted run."""
    old = hub.commit("1", rows(0))
    text = RECIPE.replace("REWARDS", '{ function = "score.py:score" }').replace("steps = 3", "steps = 2")
    text = text.replace('path = "rows.jsonl"', 'path = "hub:me/sums"\nsplit = "train"')
    (tmp_path / "score.py").write_text(
        "def score(answer):\n    return len(answer.text) / 10 + int(answer.gold) / 100\n"
    )
    (tmp_path / "recipe.toml").write_text(text.replace("checkpoint_every = 2", "checkpoint_every = 1"))
    whole, _ = run(tmp_path / "recipe.toml", "whole")
    described = read_run_json(whole)
    assert (
        described["recipe"]["data"]["gsm"]["path"]
        == f"hub:me/sums@{old}"
        == described["files"]["data.gsm.path"]["path"]
    )
    sha = summary_of(whole)["weights_sha256"]
    shutil.rmtree(whole / "checkpoints" / "step-00000002")  # as if it had been killed within step 2
    new = hub.commit("2", rows(100))
    with pytest.raises(UserError, match=f"data.gsm.path is hub:me/sums@{new}, and was hub:me/sums@{old} when the run"):
        run(tmp_path / "recipe.toml", "whole", f"data.gsm.path=hub:me/sums@{new}", resume=True)
    resumed, printed = run(tmp_path / "recipe.toml", "whole", resume=True)
    assert "resuming after step 1" in printed
    assert summary_of(resumed)["weights_sha256"] == sha and len(read_steps(resumed)) == 2
