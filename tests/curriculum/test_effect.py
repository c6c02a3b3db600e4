"""No key of a recipe is parsed and ignored: every one acts in its context or is refused there by name.

What ``idle()`` says of a key is held against what the key does: of the objective's keys, whether the loss or its
gradient changes; of all others, whether a run reads them.
"""

import ast
import copy
import io
import itertools
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel
from rich.console import Console
from torch import Tensor

from isomorph.curriculum.assemble import run_recipe
from isomorph.curriculum.recipe import Recipe
from isomorph.engine.config import STAGE_TABLES, ObjectiveConfig, ObjectiveName, OptimConfig, SamplerConfig, UserError
from isomorph.engine.distributed.ranks import ALONE
from isomorph.engine.effect import idle_paths
from isomorph.engine.recipe_file import load_recipe
from isomorph.engine.types import Prompt, Rollout, Scores
from isomorph.engine.update.advantage import penalised
from isomorph.engine.update.micro_batches import pack
from isomorph.engine.update.objective import TokenInputs, loss_of_tokens, token_weight
from isomorph.engine.update.optimizer import learning_rate
from isomorph.engine.update.score import score
from isomorph.kernels.linear_logprob import TokenStats

ROOT = Path(__file__).parents[2]

# every kind of stage, on data of both kinds; {sampler} is filled in
RUN = """
[model.tiny]
hidden_size = 16
num_layers = 1
num_heads = 2
num_kv_heads = 1
intermediate_size = 16
max_model_len = 256
[data.plans]
kind = "async_plan"
difficulty = { form = "terse", demonstration = "compact", min_steps = 2, max_steps = 2, max_duration = 4 }
[sampling]
max_new_tok = 4
samples_per_prompt = 3
[batch]
prompts = 2
[[stage]]
name = "sft"
steps = 1
objective.name = "sft"
sampling = { max_new_tok = 64, samples_per_prompt = 1 }
mixture = [{ data = "plans", representation = "graph", weight_end = 0.5 }, { data = "plans", representation = "code" }]
fade = "cosine"
[[stage]]
name = "kl"
steps = 6
objective = { name = "grpo", kl_coef = 0.01, importance_sampling = "token", entropy_coef = 0.01 }
optim.schedule = "cosine"
batch = { prompts_per_update = 1, refills = 1 }
mastery = { pass_rate = 0.9, window = 1, min_steps = 1 }
plateau = { window = 5, patience = 1, min_steps = 1, at_zero = true }
max_response_tok = 1000
mixture = [{ data = "plans", representation = "graph" }]
[[stage]]
name = "rloo"
steps = 1
objective = { name = "rloo", reward_kl_coef = 0.01 }
reference = "previous"
batch.num_iterations = 2
mixture = [{ data = "plans", representation = "natural" }]
[[stage]]
name = "rft"
steps = 1
objective.name = "rft"
mixture = [{ data = "plans", representation = "natural" }]
[[stage]]
name = "once"
steps = 1
objective.name = "dapo"
mixture = [{ data = "plans", representation = "natural" }]
[[stage]]
name = "adaptive"
steps = 6
objective.name = "grpo"
adaptive = { window = 2, patience = 1 }
mixture = [{ data = "plans", representation = "graph" }, { data = "plans", representation = "natural" }]
[eval]
data = "plans"
representations = ["graph"]
prompts = 1
max_new_tok = 4
"""
FILES = """
[model]
path = "a-model"
[sampler]
kind = "vllm"
[data.rows]
kind = "jsonl"
family = "async_plan"
files = { natural = "rows.jsonl" }
[data.unused]
kind = "async_plan"
[[stage]]
name = "only"
steps = 1
mixture = [{ data = "rows", representation = "natural" }]
[eval]
data = "rows"
representations = ["natural"]
"""


# -- what is refused is what idle() names, wherever a key stands
def keys_of(section: BaseModel, at: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Path and value of every key that can be written; tables that are absent have none."""
    for key in type(section).model_fields:
        value, path = getattr(section, key), (*at, key)
        if isinstance(value, BaseModel):
            yield from keys_of(value, path)
        elif isinstance(value, dict) and all(isinstance(v, BaseModel) for v in value.values()):
            for name, inner in value.items():
                yield from keys_of(inner, (*path, name))
        elif isinstance(value, tuple) and value and all(isinstance(v, BaseModel) for v in value):
            for i, inner in enumerate(value):
                yield from keys_of(inner, (*path, i))
        else:
            yield path, value


def written(tables: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """``tables`` with one key more, at its present value."""
    tables = copy.deepcopy(tables)
    node: Any = tables
    for part in path[:-1]:
        node = node[part] if isinstance(part, int) else node.setdefault(part, {})
    node[path[-1]] = list(value) if isinstance(value, tuple) else value
    return tables


def toml_of(tables: dict[str, Any]) -> str:
    def inline(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key} = {inline(v)}" for key, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(inline, value)) + "]"
        if isinstance(value, bool):
            return str(value).lower()
        return f'"{value}"' if isinstance(value, str) else repr(value)

    return "\n".join(f"{key} = {inline(value)}" for key, value in tables.items())


@pytest.mark.parametrize("text", [RUN, FILES], ids=["tiny", "files"])
def test_a_key_that_is_written_is_refused_by_name_where_it_is_idle_and_taken_where_it_acts(
    tmp_path: Path, text: str
) -> None:
    tables, recipe = tomllib.loads(text), tmp_path / "recipe.toml"
    text = text.replace('[data.unused]\nkind = "async_plan"\n', "")
    own = tomllib.loads(text)
    recipe.write_text(text)
    loaded = load_recipe(recipe, [], Recipe)
    idle = idle_paths(loaded)
    seen = {True: 0, False: 0}
    for path, value in keys_of(loaded):
        if value is None or path[-1] == "kind":
            continue
        recipe.write_text(toml_of(written(own, path, value)))
        is_idle = any(path[:end] in idle for end in range(1, len(path) + 1))
        seen[is_idle] += 1
        if is_idle:
            with pytest.raises(UserError) as caught:
                load_recipe(recipe, [], Recipe)
            assert f"{'.'.join(map(str, path))} has no effect, because " in str(caught.value)
        else:
            load_recipe(recipe, [], Recipe)
    assert min(seen.values()) > 5, seen
    if tables != own:
        recipe.write_text(toml_of(tables))
        with pytest.raises(UserError, match=r"data\.unused\.kind has no effect, because no stage and no \[eval\]"):
            load_recipe(recipe, [], Recipe)


@pytest.mark.parametrize("text", [RUN, FILES], ids=["tiny", "files"])
def test_every_key_that_is_called_idle_is_a_key_of_the_schema(tmp_path: Path, text: str) -> None:
    """A key under an old name is refused as unknown, and the one that took its place would be ignored."""
    text = text.replace('[data.unused]\nkind = "async_plan"\n', "")
    loaded = load_recipe(written_to(tmp_path, text), [], Recipe)
    assert {path for path in idle_paths(loaded) if not is_key(loaded, path)} == set()


def is_key(section: Any, path: tuple[str | int, ...]) -> bool:
    """Whether ``path`` can be written; what is inside a table that is absent is not looked at."""
    for part in path:
        if section is None:
            return True
        if isinstance(section, BaseModel) and part not in type(section).model_fields:
            return False
        section = section_at(section, (part,))
    return True


def test_the_first_stage_has_no_optimizer_state_to_carry_over(tmp_path: Path) -> None:
    assert "stage.0.optimizer_state has no effect" in refusal(tmp_path, "stage.0.optimizer_state='carry'")
    loaded = load_recipe(tmp_path / "recipe.toml", ["stage.1.optimizer_state='carry'"], Recipe)
    assert loaded.stage[1].optimizer_state == "carry"


def test_every_key_of_the_schema_is_read_somewhere_outside_the_schema() -> None:
    read = set()
    for file in [*(ROOT / "engine").rglob("*.py"), *(ROOT / "curriculum").rglob("*.py")]:
        if file.name not in ("config.py", "recipe.py", "stage_spec.py"):
            read |= {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
    unread = {f"{model.__name__}.{key}" for model in models_of(Recipe) for key in model.model_fields if key not in read}
    assert unread == set()


def test_vllms_sampler_reads_the_keys_that_act_beside_it() -> None:
    """And no other; that the built-in one reads its own shows in the run below."""
    files = [ROOT / "engine" / "rollout" / name for name in ("vllm.py", "vllm_engine.py")]
    read = {
        node.attr
        for node in itertools.chain.from_iterable(ast.walk(ast.parse(file.read_text())) for file in files)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config"
    }
    config = SamplerConfig(kind="vllm")
    assert read == {key for key in SamplerConfig.model_fields if (key,) not in config.idle()} - {"kind"}


def models_of(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        inner = (models_of(field.annotation) for field in annotation.model_fields.values())
        return {annotation}.union(*inner)
    return set().union(*(models_of(part) for part in get_args(annotation) if part is not NoneType))


# -- what acts is read in a run
def test_a_run_reads_every_key_that_acts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.toml").write_text(RUN)
    loaded = load_recipe(tmp_path / "recipe.toml", [], Recipe)
    idle = idle_paths(loaded)
    wanted = {
        path: type(section_at(loaded, path[:-1]))
        for path, value in keys_of(loaded)
        if value is not None and not any(path[:end] in idle for end in range(1, len(path) + 1))
    }
    read: set[tuple[type, str]] = set()
    plain = BaseModel.__getattribute__

    def spying(self: BaseModel, name: str) -> Any:
        read.add((type(self), name))
        return plain(self, name)

    monkeypatch.setattr(BaseModel, "__getattribute__", spying)
    folder, threads = tmp_path / "run", torch.get_num_threads()
    folder.mkdir()
    run_recipe(loaded, folder, Console(file=io.StringIO()), lambda: False, ALONE, resume=False)
    torch.set_num_threads(threads)
    unread = {path for path, kind in wanted.items() if (kind, path[-1]) not in read}
    assert unread == set()


def section_at(section: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        section = section[part] if isinstance(section, (dict, tuple)) else getattr(section, str(part))
    return section


# -- what the objective's keys do, and what idle() says of them
OTHER: dict[str, tuple[Any, ...]] = {
    "baseline": ("mean", "leave_one_out", "none"),
    "scale": ("std", "none", "batch"),
    "aggregation": ("token", "sequence", "constant"),
    "ratio": ("token", "sequence", "product"),
    "clip_low": (0.01, 0.02),
    "clip_high": (0.01, 0.02),
    "kl_coef": (0.1, 0.2),
    "kl_estimator": ("k1", "k2", "k3"),
    "reward_kl_coef": (0.1, 0.2),
    "entropy_coef": (0.1, 0.2),
    "importance_sampling": ("off", "token", "sequence"),
    "importance_sampling_mode": ("truncate", "mask"),
    "importance_sampling_cap": (1.01, 1.02),
    "importance_sampling_floor": (0.0, 0.9),
    "clip_dual": (1.001, 1.002, 1.29, 1.31),  # at least 1 + clip_high, which is small for gspo
    "old_logprob": ("trainer", "sampler"),
}
GENERATOR = torch.Generator().manual_seed(0)
LENS = (4, 1, 6, 3, 5, 2)
NOISE = [0.3 * torch.randn(sum(LENS), generator=GENERATOR, dtype=torch.float64) for _ in range(3)]
LOGITS = torch.randn(sum(LENS), 8, generator=GENERATOR, dtype=torch.float64)
TARGETS = torch.randint(8, (sum(LENS), 1), generator=GENERATOR)


def outcome(o: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Loss and gradient of two groups of three, from their rewards on."""
    logits = LOGITS.clone().requires_grad_()
    logprob_NV = logits.log_softmax(-1)
    entropy = -(logprob_NV.exp() * logprob_NV).sum(-1)
    stats = TokenStats(logprob_NV.gather(1, TARGETS)[:, 0], entropy, logits.logsumexp(-1))
    old, ref, sampler = (stats.logprob.detach() + noise for noise in NOISE)
    prompts = [Prompt(prompt_id=i, token_ids=(1,), task="t", representation="r", payload=None) for i in range(2)]
    rollouts = [
        Rollout(
            prompt_id=i // 3,
            sample=i % 3,
            token_ids=torch.ones(n, dtype=torch.int64),
            sampler_logprob=None,
            finish="stop",
            policy_version=0,
        )
        for i, n in enumerate(LENS)
    ]
    groups = score(prompts, rollouts, Scores(rewards=(1.0, 0.0, 0.5, 0.25, 1.0, 0.0)), o)
    seq_id = torch.arange(len(LENS)).repeat_interleave(torch.tensor(LENS))
    advantage = torch.tensor([a for g in groups for a in g.advantages]).double()[seq_id]
    if o.reward_kl_coef:
        updates = pack(groups, micro_batch_tok=100, prompts_per_update=None, objective=o, device=torch.device("cpu"))
        order = updates[0].response_ids[0].tolist()
        old_S, ref_S = old.split(LENS), ref.split(LENS)
        known = [[[torch.cat([part[i] for i in order])]] for part in (old_S, ref_S)]
        ((advantage_N,),) = penalised(updates, *known, o)
        parts = dict(zip(order, advantage_N.split([LENS[i] for i in order]), strict=True))
        advantage = torch.cat([parts[i] for i in range(len(LENS))])
    weight = token_weight(o, seq_id, 6, num_loss_tok=len(seq_id), num_step_seqs=6, max_new_tok=9, dtype=torch.float64)
    rows = TokenInputs(
        weight=weight,
        advantage=advantage,
        seq_id=seq_id,
        old_logprob=old,
        ref_logprob=ref if o.needs_reference else None,
        sampler_logprob=sampler,
    )
    loss = (weight * loss_of_tokens(o, stats, rows).loss).sum()
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("name", get_args(ObjectiveName))
@pytest.mark.parametrize(
    "others",
    [{}, {"kl_coef": 0.1, "importance_sampling": "token", "importance_sampling_cap": 1.1}],
    ids=["preset", "with KL and TIS"],
)
def test_a_key_of_an_objective_is_idle_where_loss_and_gradient_do_not_depend_on_it(
    name: str, others: dict[str, Any]
) -> None:
    if name in ("sft", "rft") and others:
        return  # refused
    idle = ObjectiveConfig(name=name, **others).idle()  # type: ignore[arg-type]
    assert OTHER.keys() == ObjectiveConfig.model_fields.keys() - {"name"}
    for key, values in OTHER.items():
        outcomes = []
        for value in values:
            try:
                without = {"importance_sampling": "off"} if key == "old_logprob" else {}  # they exclude each other
                choices = {"name": name, **others, **without, key: value}
                outcomes.append(outcome(ObjectiveConfig.model_validate(choices)))
            except ValueError as error:  # refused already here, by name
                assert key in str(error)
        acts = any(
            bool((a - b).abs().max() > 1e-9) for other in outcomes[1:] for a, b in zip(outcomes[0], other, strict=True)
        )
        assert ((key,) in idle) != acts, key


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_last_share_of_the_learning_rate_is_idle_where_the_rate_does_not_depend_on_it(schedule: Any) -> None:
    one, two = (OptimConfig(schedule=schedule, final_lr_frac=share) for share in (0.1, 0.7))
    changes = any(learning_rate(one, step, 10) != learning_rate(two, step, 10) for step in range(10))
    assert ("final_lr_frac" in {path[0] for path in one.idle()}) != changes


# -- layers
def refusal(tmp_path: Path, *overrides: str, text: str = RUN) -> str:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "recipe.toml", list(overrides), Recipe)
    return str(caught.value)


def test_a_table_that_stages_share_must_act_in_one_of_them(tmp_path: Path) -> None:
    assert "has no effect" not in str(load_recipe(written_to(tmp_path, RUN), ["sampling.temperature=0.7"], Recipe))
    only_sft = RUN[: RUN.index('[[stage]]\nname = "kl"')] + RUN[RUN.index("[eval]") :]
    assert "sampling.temperature has no effect, because demonstrations" in refusal(
        tmp_path, "sampling.temperature=0.7", text=only_sft
    )
    named = RUN.replace('objective.name = "dapo"', 'objective.name = "cispo"')  # "dapo" is what none means
    assert "objective.entropy_coef has no effect, because every stage has a value of its own" in refusal(
        tmp_path, "objective.entropy_coef=0.1", text=named
    )


def test_what_an_override_makes_idle_in_the_recipe_is_not_refused_but_its_own_keys_are(tmp_path: Path) -> None:
    vllm = FILES.replace('[data.unused]\nkind = "async_plan"\n', "").replace('"vllm"', '"vllm"\nmax_model_len = 512')
    assert load_recipe(written_to(tmp_path, vllm), ["sampler.kind=builtin"], Recipe).sampler.kind == "builtin"
    assert "sampler.max_model_len" in refusal(tmp_path, "sampler.kind=builtin", "sampler.max_model_len=9999", text=vllm)
    assert "sampler.kv_tok" in refusal(tmp_path, "sampler.kv_tok=99", text=vllm)


def test_what_a_recipe_extends_is_shared_with_others(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(RUN + "[sampler]\nmax_model_len = 512\n")
    (tmp_path / "own.toml").write_text('extends = "base.toml"\n[run]\nseed = 1\n')
    assert load_recipe(tmp_path / "own.toml", [], Recipe).run.seed == 1
    assert "sampler.max_model_len" in refusal(tmp_path, text=RUN + "[sampler]\nmax_model_len = 512\n")


def written_to(tmp_path: Path, text: str) -> Path:
    (tmp_path / "recipe.toml").write_text(text)
    return tmp_path / "recipe.toml"


def test_the_shared_tables_are_those_of_a_stage() -> None:
    assert set(STAGE_TABLES) == {"objective", "optim", "batch", "sampling"}
