"""Environments as a user of the package verifiers writes them; SHAPE chooses one."""

import verifiers as vf
from datasets import Dataset

ROWS = [{"question": f"Count to {n}.", "answer": str(n), "info": {"most": n + 1}} for n in range(1, 7)]


def length(completion, **kwargs) -> float:
    return len(completion[-1]["content"]) / 100


async def states(completion, answer) -> float:
    return float(answer in completion[-1]["content"])


class Count(vf.MultiTurnEnv):
    """Asks for the next number, until the last one was said; the model may be wrong once."""

    async def setup_state(self, state):
        state["next"], state["wrong"] = 1, 0
        return state

    @vf.stop
    async def has_counted(self, state) -> bool:
        return state["next"] > int(state["answer"])

    @vf.cleanup
    async def leave(self, state) -> None:
        CLEANED.append(state["answer"])

    async def env_response(self, messages, state, **kwargs):
        said = messages[-1]["content"]
        if said == "raise":
            raise KeyError("a broken environment")
        if said == "tool error":
            raise vf.ToolCallError from ValueError("no such tool")
        if str(state["next"]) in said:
            state["next"] += 1
            if state["next"] > int(state["answer"]):
                state["final_env_response"] = [{"role": "user", "content": "Done."}]
        else:
            state["wrong"] += 1
        return [{"role": "user", "content": f"Say {state['next']}."}]


CLEANED: list[str] = []


def counted(state) -> float:
    return state["next"] - 1 - 0.25 * state["wrong"]


class Forgetful(Count):
    async def get_prompt_messages(self, state):
        return state["prompt"] + [{"role": "user", "content": "Again."}] * len(state["trajectory"])


def look(key: int, unit: str) -> str:
    """Looks up a number.

    Args:
        key: which
        unit: its unit
    """
    return f"{key * 11} {unit}"


class Unit(vf.StatefulToolEnv):
    """Its tool gets an argument that the model does not see."""

    def __init__(self, **options):
        super().__init__(**options)
        self.add_tool(look, args_to_skip=["unit"])

    def update_tool_args(self, tool_name, tool_args, messages, state, **kwargs):
        return {**tool_args, "unit": f"of {state['answer']}"}


def of_the_group(completions) -> list[float]:
    return [0.0 for _ in completions]


def load_environment(shape: str = "single", **options) -> vf.Environment:
    rows = Dataset.from_list(ROWS)
    rubric = vf.Rubric(funcs=[length, states], weights=[1.0, 0.5])
    if shape == "single":
        return vf.SingleTurnEnv(dataset=rows, eval_dataset=rows, system_prompt="Be brief.", rubric=rubric, **options)
    if shape == "tools":
        return vf.ToolEnv(dataset=rows, rubric=rubric, tools=[look], **options)
    if shape == "group":
        return vf.SingleTurnEnv(dataset=rows, rubric=vf.Rubric(funcs=[of_the_group]))
    if shape == "mixed":
        return vf.EnvGroup([load_environment("single"), load_environment("count")], env_names=["one", "many"])
    if shape == "stateful":
        return Unit(tools=[], dataset=rows, rubric=rubric)
    made = {"count": Count, "forgetful": Forgetful}[shape]
    return made(dataset=rows, rubric=vf.Rubric(funcs=[counted, length]), **options)
