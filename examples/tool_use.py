"""A table that only a tool can read, the reward, and the rows of tool_use.toml.

`python examples/tool_use.py` writes the rows: keys to ask for, and for the warm-up demonstrations that ask the tool in
one of eight cases and guess otherwise, so that reinforcement learning has something to gain.
"""

import json
import random
from pathlib import Path

COLOURS = ("red", "green", "blue", "gold")
_RNG = random.Random(0)
TABLE = {(a, b): _RNG.choice(COLOURS) for a in range(10) for b in range(10)}


def look(a: int, b: int) -> str:
    """Looks a key up in the table.

    Args:
        a: The first digit of the key.
        b: The second digit of the key.
    """
    return TABLE[a, b]


def right(answer) -> float:
    """1.0 where the last word of the response is the colour of the key."""
    return float(answer.text.split()[-1:] == [answer.gold])


def demonstration(a: int, b: int, rng: random.Random) -> tuple[str, str]:
    """A prompt and its response: a call, a guess, or, after a call and its result, that result."""
    key, call, colour = f"key {a} {b}", f"<call> look {a} {b} </call>", rng.choice(COLOURS)
    kind = rng.randrange(12)
    if kind < 4:
        return f"{key} {call} <result> {colour} </result>", colour
    return key, call if kind == 4 else colour


def main() -> None:
    """Writes tool_use.jsonl and tool_use_warm_up.jsonl beside this file."""
    folder, rng = Path(__file__).parent, random.Random(1)
    keys = [{"prompt": f"key {a} {b}", "answer": TABLE[a, b]} for a, b in TABLE]
    warm_up = [demonstration(*rng.choice(list(TABLE)), rng) for _ in range(2000)]
    shown = [{"prompt": prompt, "demonstration": response} for prompt, response in warm_up]
    for name, rows in (("tool_use.jsonl", keys), ("tool_use_warm_up.jsonl", shown)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
