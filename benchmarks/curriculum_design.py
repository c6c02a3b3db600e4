"""The study that curriculum_gpu.py makes: sizes, and its files for `isomorph study`."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from isomorph.curriculum.named_recipes import FOLDER

SEEDS = (1, 2, 3)
BASELINE = "words"
CLAIM = (BASELINE, "graph_words")  # come first; the others where time is left
OTHERS = ("words_graph", "mixed", "fading", "adaptive")
SMOLLM2 = Path(__file__).resolve().parents[1] / "studies" / "smollm2" / "shared.toml"
TINY = FOLDER / "exam.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is trained and asked."""

    base: Path  # recipe whose model, data and stage tables hold where nothing is said here
    warm_steps: int  # supervised, of right demonstrations
    habit_steps: int  # and then of sequential answers, always in words, on two graphs in five; 0: none
    warm_prompts: int
    warm_lr: float
    steps: int  # of RL, in each condition
    graph_steps: int  # of them, where words come after or before
    every: int  # steps between exams, and between checkpoints
    prompts: int  # of a step
    samples: int  # of a prompt
    lr: float
    exam_prompts: int  # of each representation
    representations: tuple[str, ...]
    response_tok: int  # at most
    demonstration_tok: int  # at most
    micro_batch_tok: int
    window: int  # steps, of the adaptive condition
    model_len: int  # longest prompt and response, for vLLM
    graph_share: float = 0.6  # of the demonstrations; the others are in words
    tiny: str = ""  # [model.tiny] in place of the base's
    patience: int = 3  # of the adaptive condition, which must be able to leave symbols within ``steps``


# as studies/demonstrations (mixed), then studies/carry_over: without a habit, RL of this size teaches nothing
FULL = Size(
    base=TINY,
    warm_steps=2000,
    habit_steps=400,
    warm_prompts=16,
    warm_lr=2e-3,
    steps=60,
    graph_steps=20,
    every=10,
    prompts=16,
    samples=8,
    lr=1e-4,
    exam_prompts=300,
    representations=("natural", "graph"),
    response_tok=136,
    demonstration_tok=160,
    micro_batch_tok=16_384,
    window=10,
    model_len=352,
)
REAL = Size(
    base=SMOLLM2,
    warm_steps=60,
    habit_steps=0,
    warm_prompts=32,
    warm_lr=3e-4,
    steps=40,
    graph_steps=20,
    every=10,
    prompts=16,
    samples=8,
    lr=1e-5,
    exam_prompts=200,
    representations=("natural", "graph"),
    response_tok=160,
    demonstration_tok=160,
    micro_batch_tok=16_384,
    window=6,
    model_len=640,
    graph_share=0.8,
)
REHEARSAL = replace(
    FULL,
    warm_steps=4,
    habit_steps=2,
    warm_prompts=4,
    steps=6,
    graph_steps=2,
    every=2,
    prompts=2,
    samples=2,
    exam_prompts=12,
    micro_batch_tok=2048,
    window=2,
    patience=2,
    tiny="{ hidden_size = 16, num_layers = 1, num_heads = 2, num_kv_heads = 1, intermediate_size = 16 }",
)


def size_of(model: str, *, rehearse: bool) -> Size:
    return REHEARSAL if rehearse else FULL if model == "tiny" else REAL


def shared_recipe(size: Size, *, model: str, dtype: str, sampler: str, memory_frac: float) -> str:
    """What all runs share, as TOML. ``model``: "tiny" or a path; ``memory_frac``: vLLM's share of the device."""
    text = [f"extends = {json.dumps(str(size.base))}", "[model]", f'dtype = "{dtype}"']
    text += [f"path = {json.dumps(model)}"] if model != "tiny" else [f"tiny = {size.tiny}"] if size.tiny else []
    text += ["[log]", "tensorboard = false", "[run]", f"checkpoint_every = {size.every}"]
    text += ["[sampler]", f'kind = "{sampler}"', f"max_seqs = {max(size.prompts * size.samples, 64)}"]
    if sampler == "vllm":
        text += ['publish = "shared"', f"max_model_len = {size.model_len}", f"memory_frac = {memory_frac:.3f}"]
    text += ["[objective]", 'name = "dapo"', 'scale = "none"']
    text += ["[optim]", f"lr = {size.lr}", "warmup_steps = 2"]
    text += ["[batch]", f"prompts = {size.prompts}", f"micro_batch_tok = {size.micro_batch_tok}"]
    text += ["[sampling]", f"max_new_tok = {size.response_tok}", f"samples_per_prompt = {size.samples}"]
    text += ["[eval]", 'data = "plans"', f"representations = {list(size.representations)}"]
    text += [f"prompts = {size.exam_prompts}", f"max_new_tok = {size.response_tok}", f"every = {size.every}"]
    return "\n".join(text) + "\n"


def study_file(size: Size, *, threads: int) -> str:
    """STUDY.toml beside shared.toml: a warm start for each seed, and all conditions at equal steps."""
    budgets = list(range(size.every, size.steps + 1, size.every))
    graphs, rest = size.graph_steps, size.steps - size.graph_steps
    parts = [_HEAD.format(seeds=list(SEEDS), budgets=budgets, baseline=BASELINE, threads=threads), _warm_start(size)]
    graph, words = '{ data = "plans", representation = "graph"', '{ data = "plans", representation = "natural"'
    stages = {
        "words": [("words", size.steps, "", f"{words} }}")],
        "graph_words": [("graph", graphs, "", f"{graph} }}"), ("words", rest, _CARRY, f"{words} }}")],
        "words_graph": [("words", rest, "", f"{words} }}"), ("graph", graphs, _CARRY, f"{graph} }}")],
        "mixed": [("mixed", size.steps, "", f"{graph} }}, {words} }}")],
        "fading": [
            (
                "fading",
                size.steps,
                'fade = "cosine"\n',
                f"{graph}, weight = 1.0, weight_end = 0.0 }}, {words}, weight = 0.0, weight_end = 1.0 }}",
            )
        ],
        "adaptive": [
            (
                "adaptive",
                size.steps,
                f"adaptive = {{ least_share = 0.1, window = {size.window}, patience = {size.patience} }}\n",
                f"{graph} }}, {words} }}",
            )
        ],
    }
    for condition in (*CLAIM, *OTHERS):
        for name, steps, more, mixture in stages[condition]:
            parts.append(
                f'[[condition.{condition}.stage]]\nname = "{name}"\nsteps = {steps}\n{more}mixture = [{mixture}]\n'
            )
    return "\n".join(parts)


_CARRY = 'optimizer_state = "carry"\noptim.warmup_steps = 0\n'
_HEAD = """[study]
name = "study"
question = "Does graph -> words beat words only at equal budget?"
recipe = "shared.toml"
seeds = {seeds}
budgets = {budgets}
baseline = "{baseline}"
measure = ["natural"]
threads = {threads}
"""


def _warm_start(size: Size) -> str:
    """Reward in words is rare afterwards: with a tiny model in about one response of a hundred."""
    shared = f"""objective.name = "sft"
batch = {{ prompts = {size.warm_prompts} }}
sampling = {{ max_new_tok = {size.demonstration_tok}, samples_per_prompt = 1 }}"""
    optim = 'schedule = "cosine", betas = [0.9, 0.98], weight_decay = 0.01'
    text = f"""[[warm_start.stage]]
name = "demonstrations"
steps = {size.warm_steps}
{shared}
optim = {{ lr = {size.warm_lr}, warmup_steps = {max(1, size.warm_steps // 40)}, {optim} }}
mixture = [
  {{ data = "plans", representation = "graph", weight = {size.graph_share} }},
  {{ data = "plans", representation = "natural", weight = {1 - size.graph_share:.3g} }},
]
"""
    if not size.habit_steps:
        return text
    return f"""{text}
[[warm_start.stage]]
name = "habit"
steps = {size.habit_steps}
{shared}
optim = {{ lr = 3e-4, warmup_steps = {max(1, size.habit_steps // 8)}, {optim} }}
mixture = [
  {{ data = "plans", representation = "graph", weight = 0.5, sequential_rate = 0.4 }},
  {{ data = "plans", representation = "natural", weight = 0.5, sequential_rate = 1.0 }},
]
"""
