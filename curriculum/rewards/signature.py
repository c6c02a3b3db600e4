"""Which form a user's reward function has, told by its signature, and the arguments that it is called with.

    f(answer: Answer) -> float                                                  ours, for a response
    f(answers: list[Answer]) -> list[float]                                     ours, for a group
    f(prompts, completions, completion_ids, trainer_state, **columns) -> list   TRL, for a group
    compute_score(data_source, solution_str, ground_truth, extra_info)          verl, for a response
    compute_score(data_sources, solution_strs, ground_truths, extra_infos)      verl, for a group

A class is called with the entry's ``arguments``, and so is a function that takes nothing else: what they return is the
reward function. Any of them may be ``async``. This module runs in reward workers, so it imports no torch.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

from isomorph.curriculum.rewards.answer import Answer
from isomorph.curriculum.rewards.user_code import DoesNotFit

Form = Literal["answer", "answers", "trl", "verl", "verl_batch"]
FORMS = (
    "f(answer: Answer), TRL's f(prompts, completions, **columns) or verl's compute_score(data_source, solution_str, "
    "ground_truth, extra_info)"
)
_TRL = {"prompts", "completions", "completion_ids"}
_TRL_EXTRA = {"trainer_state", "log_extra", "log_metric"}
_VERL = {"data_source", "solution_str", "ground_truth", "extra_info"}
_VERL_BATCH = {f"{name}s" for name in _VERL}


OURS = "isomorph.curriculum.rewards.builtin"  # the module of the functions that a recipe names without a file


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupInput:
    """A prompt and its G responses, as they are sent to a worker."""

    prompt: str
    messages: tuple[Mapping[str, Any], ...] | None  # where the prompt is chat messages
    gold: str
    row: Mapping[str, Any]
    data: str  # name of its [data.NAME]
    texts: tuple[str, ...]
    finish: tuple[Literal["stop", "length"], ...]
    num_tok: tuple[int, ...]
    token_ids: tuple[tuple[int, ...], ...]  # empty where no function asks for them
    seed: int  # of Python's and numpy's global random numbers in a call


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What TRL calls the trainer's state, as far as it is known."""

    step: int  # completed steps of the run
    max_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunction:
    """A function with its form, ready to be called."""

    call: Callable[..., Any]
    form: Form
    parameters: frozenset[str]  # that it names
    required: frozenset[str]
    takes_any: bool  # **kwargs
    is_async: bool
    wants_messages: bool | None  # TRL: by the annotation of ``completions``; None: as the prompt is
    arguments: Mapping[str, Any] = field(default_factory=dict)
    home: str = ""  # folder of its file, whose modules it may import

    @property
    def is_for_group(self) -> bool:
        """Whether it is called once for a group, else once for each response."""
        return self.form in ("answers", "trl", "verl_batch")

    @property
    def wants_token_ids(self) -> bool:
        return self.form == "trl" and (self.takes_any or "completion_ids" in self.parameters)

    def missing(self, columns: frozenset[str]) -> list[str]:
        """Its required parameters for which rows with these columns have nothing."""
        known = {"trl": _TRL | _TRL_EXTRA | columns, "verl": _VERL, "verl_batch": _VERL_BATCH}.get(self.form)
        return [] if known is None else sorted(self.required - known - self.arguments.keys())


def classify(function: Any, arguments: Mapping[str, Any], *, depth: int = 0) -> RewardFunction:
    """The function with its form. Raises DoesNotFit, or what a class or factory raises that is called here."""
    if not callable(function):
        raise DoesNotFit(f"must be a function, got {type(function).__name__}")
    if inspect.isclass(function):
        return classify(function(**arguments), {}, depth=depth + 1)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise DoesNotFit("its signature cannot be read; write a Python function that calls it") from None
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
    if unknown := sorted(arguments.keys() - {p.name for p in named}) if not takes_any else []:
        raise DoesNotFit(f"takes no argument {unknown[0]!r}, only {', '.join(p.name for p in named) or 'none'}")
    free = [p for p in named if p.name not in arguments]
    required = [p for p in free if p.default is p.empty]
    form = _form(free, required)
    if form is None and not required and not takes_any and depth == 0:
        return classify(function(**arguments), {}, depth=1)  # a factory, as trl.rewards.get_cosine_scaled_reward
    if form is None:
        raise DoesNotFit(f"its parameters ({', '.join(p.name for p in free) or 'none'}) fit none of {FORMS}")
    return RewardFunction(
        call=function,
        form=form,
        parameters=frozenset(p.name for p in free),
        required=frozenset(p.name for p in required),
        takes_any=takes_any,
        is_async=inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__),
        wants_messages=_wants_messages(free),
        arguments=dict(arguments),
    )


def _form(free: list[inspect.Parameter], required: list[inspect.Parameter]) -> Form | None:
    names = {p.name for p in free}
    if "solution_strs" in names:
        return "verl_batch"
    if "solution_str" in names:
        return "verl"
    if names & _TRL:
        return "trl"
    if len(required) != 1:
        return None
    (only,) = required
    annotated = _annotation(only)
    if only.name == "answer" or annotated.rpartition(".")[2] == "Answer":
        return "answer"
    if only.name == "answers" or (annotated.endswith("Answer]") and "[" in annotated):
        return "answers"
    return None


def _wants_messages(free: list[inspect.Parameter]) -> bool | None:
    for parameter in free:
        if parameter.name == "completions":
            annotated = _annotation(parameter).replace(" ", "").lower()
            inner = annotated.partition("[")[2]
            return True if inner.startswith(("list[", "sequence[")) else False if inner.startswith("str]") else None
    return None


def _annotation(parameter: inspect.Parameter) -> str:
    """As it would be written, without the module ``typing``; "" without one."""
    annotation = parameter.annotation
    if annotation is parameter.empty:
        return ""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__qualname__", None)
    if text is None or getattr(annotation, "__args__", None):
        text = str(annotation)
    return text.replace("typing.", "").strip("'\"")


def keywords(function: RewardFunction, group: GroupInput, response: int | None, progress: Progress) -> dict[str, Any]:
    """The arguments of one call, for the whole group where ``response`` is None."""
    if function.form == "answer":
        assert response is not None
        return {_only(function): answer_of(group, response), **function.arguments}
    if function.form == "answers":
        answers = [answer_of(group, i) for i in range(len(group.texts))]
        return {_only(function): answers, **function.arguments}
    found = {"trl": _of_trl, "verl": _of_verl, "verl_batch": _of_verl_batch}[function.form](
        function, group, response, progress
    )
    return {**found, **function.arguments}


def answer_of(group: GroupInput, response: int) -> Answer:
    return Answer(
        prompt=group.prompt,
        text=group.texts[response],
        gold=group.gold,
        row=group.row,
        finish=group.finish[response],
        num_tok=group.num_tok[response],
    )


def _only(function: RewardFunction) -> str:
    (name,) = function.required
    return name


def _of_trl(function: RewardFunction, group: GroupInput, response: int | None, progress: Progress) -> dict[str, Any]:
    size = len(group.texts)
    as_messages = function.wants_messages
    if as_messages is None:
        as_messages = group.messages is not None
    prompt: Any = group.prompt
    if as_messages:
        prompt = [dict(m) for m in group.messages or ({"role": "user", "content": group.prompt},)]
    offered: dict[str, Any] = {
        **{name: [value] * size for name, value in group.row.items() if name not in ("prompt", "completion")},
        "prompts": [prompt] * size,
        "completions": [[{"role": "assistant", "content": t}] if as_messages else t for t in group.texts],
        "completion_ids": [list(ids) for ids in group.token_ids],
        "trainer_state": SimpleNamespace(global_step=progress.step, max_steps=progress.max_steps),
    }
    offered |= {name: _ignore for name in ("log_extra", "log_metric") if name in function.required}
    if function.takes_any:
        return {name: value for name, value in offered.items() if name not in function.arguments}
    return {name: value for name, value in offered.items() if name in function.parameters}


def _of_verl(function: RewardFunction, group: GroupInput, response: int | None, progress: Progress) -> dict[str, Any]:
    assert response is not None
    reward_model = group.row.get("reward_model")  # of rows that verl's scripts have made
    is_verls = isinstance(reward_model, Mapping) and "ground_truth" in reward_model
    offered = {
        "data_source": group.row.get("data_source", group.data),
        "solution_str": group.texts[response],
        "ground_truth": reward_model["ground_truth"] if is_verls else group.gold,  # type: ignore[index]
        "extra_info": group.row.get("extra_info", group.row),
    }
    return offered if function.takes_any else {n: v for n, v in offered.items() if n in function.parameters}


def _of_verl_batch(
    function: RewardFunction, group: GroupInput, response: int | None, progress: Progress
) -> dict[str, Any]:
    each = [_of_verl_all(group, i, progress) for i in range(len(group.texts))]
    offered = {f"{name}s": [found[name] for found in each] for name in _VERL}
    return offered if function.takes_any else {n: v for n, v in offered.items() if n in function.parameters}


def _of_verl_all(group: GroupInput, response: int, progress: Progress) -> dict[str, Any]:
    return _of_verl(_ANY_VERL, group, response, progress)


def _ignore(*arguments: Any, **named: Any) -> None:
    """In the place of TRL's functions that log."""


_ANY_VERL = RewardFunction(
    call=_ignore,
    form="verl",
    parameters=frozenset(_VERL),
    required=frozenset(),
    takes_any=True,
    is_async=False,
    wants_messages=None,
)

# one of our functions is tried on it before the first response: it refuses wrong arguments, and imports what it needs
TRIAL = GroupInput(
    prompt="",
    messages=None,
    gold="1",
    row={},
    data="",
    texts=("<answer>1</answer>",),
    finish=("stop",),
    num_tok=(1,),
    token_ids=((1,),),
    seed=0,
)
