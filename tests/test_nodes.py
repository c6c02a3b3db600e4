"""Two nodes: what they must have in common before a run begins. A node that is lost: test_torchrun.py."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from apart import start_apart
from crowd import Crowd
from rich.console import Console
from tiny_runs import TINY

from isomorph.curriculum.assemble import run_recipe
from isomorph.curriculum.inputs import located
from isomorph.curriculum.nodes import refuse_other_files, refuse_other_folder, refuse_other_recipe, refuse_other_weights
from isomorph.curriculum.recipe import Recipe
from isomorph.engine.config import ModelConfig, TinyModel, UserError
from isomorph.engine.distributed import launch
from isomorph.engine.distributed.ranks import Place, Ranks
from isomorph.engine.model.load import load_policy
from isomorph.engine.recipe_file import load_recipe
from isomorph.engine.types import RunFailed

SMOKE = Path(__file__).parents[1] / "curriculum" / "recipes" / "smoke.toml"
HOST = socket.gethostname()
ROWS = (
    TINY
    + """
[data.t]
kind = "rows"
path = "rows.jsonl"
prompt = "{n}"
answer = "{n}"
eval_share = 0.5
rewards = [{ function = "exact" }]
[[stage]]
name = "rl"
steps = 1
objective.name = "grpo"
batch.prompts = 1
mixture = [{ data = "t" }]
[eval]
data = "t"
"""
)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Crowd]:
    """One rank on each of two nodes."""
    crowd = Crowd(2, num_nodes=2)
    yield crowd
    crowd.close()


def test_ranks_are_named_with_their_nodes() -> None:
    ranks = Ranks(1, 4, [Place(0, "a"), Place(0, "a"), Place(1, "b"), Place(1, "b")])
    assert ranks.named([1]) == "rank 1 (node 0, a)"
    assert ranks.named([2, 3]) == "ranks 2 and 3 (node 1, b)"
    assert ranks.named([0, 3]) == "rank 0 (node 0, a) and rank 3 (node 1, b)"
    assert ranks.num_nodes == 2 and ranks.num_on_host == 2
    assert Ranks(0, 3).num_nodes == 1 and Ranks(0, 3).num_on_host == 3


# -- what the nodes must have in common
def said(ranks: Ranks, what: str, folders: list[Path]) -> str:
    """What is refused of node N, which has ``folders[N]``."""
    own = folders[ranks.rank]
    try:
        if what == "folder":
            refuse_other_folder(own, ranks)
        elif what == "recipe":
            refuse_other_recipe(load_recipe(own / "recipe.toml", [], Recipe), ranks)
        elif what == "files":
            refuse_other_files(located(load_recipe(own / "rows.toml", [], Recipe)), ranks)
        else:
            tiny = ModelConfig(tiny=TinyModel(hidden_size=32, num_heads=2, num_kv_heads=1))
            seed = len(own.name)
            policy = load_policy(tiny, vocabulary=["one"], seed=seed, device=torch.device("cpu"))
            policy.unread = tuple(own.glob("*.safetensors"))
            refuse_other_weights(policy, ranks)
    except UserError as error:
        return str(error)
    return "same"


def test_nodes_with_different_inputs_are_refused_by_all_ranks(nodes: Crowd, tmp_path: Path) -> None:
    a, b, other = (tmp_path / name for name in ("a", "b", "other"))
    for folder in (a, b, other):
        folder.mkdir()
        (folder / "recipe.toml").write_text(SMOKE.read_text())
        (folder / "rows.toml").write_text(ROWS)
        (folder / "rows.jsonl").write_text('{"n": 1}\n')
    for what in ("recipe", "weights", "files"):
        assert nodes.ask(said, what, [a, b]) == ["same", "same"]
    assert nodes.ask(said, "folder", [a, a]) == ["same", "same"] and len([*a.iterdir()]) == 3
    for text in nodes.ask(said, "folder", [a, b]):
        assert f"rank 1 (node 1, {HOST}) cannot see what rank 0 (node 0, {HOST}) writes there" in text
    (b / "recipe.toml").write_text(SMOKE.read_text().replace("lr = 1e-2", "lr = 2e-2"))
    first, second = nodes.ask(said, "recipe", [a, b])
    assert f"stage.0.optim.lr is 0.01 on this node (node 0, {HOST}) and 0.02 on node 1" in first
    assert f"stage.0.optim.lr is 0.02 on this node (node 1, {HOST}) and 0.01 on node 0" in second
    for text in nodes.ask(said, "weights", [a, other]):
        assert "the model's weights must be the same on all nodes, it differs between node 0 and node 1" in text
    for folder, content in ((a, "1"), (b, "2")):
        (folder / "w.safetensors").write_text(content)
    assert all("model.path/w.safetensors must be" in text for text in nodes.ask(said, "weights", [a, b]))
    (b / "rows.jsonl").write_text('{"n": 2}\n')
    assert all("data.t.path must be the same on all nodes" in text for text in nodes.ask(said, "files", [a, b]))
    (b / "rows.jsonl").unlink()
    assert all("rows.jsonl" in text and "node 1" in text for text in nodes.ask(said, "files", [a, b]))


def joined(port: int) -> None:
    """Rank 0 of two waits for the other one, which does not come."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    launch.JOIN_S = 0.5
    with pytest.raises(RunFailed, match="of 2 ranks these have not joined within 0 s: 1; see the output"):
        launch.open_ranks().__enter__()


def test_a_rank_that_does_not_join_is_named() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = start_apart(joined, port)
    process.join(60)
    assert process.exitcode == 0


def test_shards_must_divide_the_ranks(tmp_path: Path) -> None:
    recipe = load_recipe(SMOKE, ["parallel.kind=fsdp", "parallel.shards=2"], Recipe)
    with pytest.raises(UserError, match=r"parallel.shards must divide the number of ranks, got 2 shards and 3 ranks"):
        run_recipe(recipe, tmp_path, Console(), lambda: False, Ranks(0, 3), resume=False)
    with pytest.raises(UserError, match='parallel.shards has no effect, because nothing is sharded with kind = "data"'):
        load_recipe(SMOKE, ["parallel.shards=2"], Recipe)
