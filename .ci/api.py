"""The API page: which names README, docs/ and examples/ import from isomorph, and what their docstrings say.

python .ci/api.py               writes docs/api.md, the index
python .ci/api.py FOLDER        builds the pages of these modules with pdoc (extra "dev"); a warning is an error
"""

import ast
import functools
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(from isomorph[\w.]* import [\w, ]+)`")
Definition = ast.FunctionDef | ast.ClassDef
HEAD = """# API

What README, these pages and [examples/](../examples/README.md) import, a line each, written by `python .ci/api.py`.
The pages with signatures and whole docstrings (shapes, dtypes, units, errors, source), made by pdoc into `build/api/`:

```
python .ci/api.py build/api
```

An argument `x_ND` has the shape [N, D]: `T` tokens, `N` predicted tokens, `P` prompts, `G` responses per prompt,
`V` vocabulary, `D` hidden size.
"""


def source(module: str) -> Path:
    """The file of a module of ours."""
    place = ROOT.joinpath(*module.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def public() -> dict[str, list[str]]:
    """Module -> the names that are imported from it on the pages and in the examples, both sorted."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "kernels" / "README.md"]
    texts = [
        text for page in pages if page != PAGE for found in (BLOCK, INLINE) for text in found.findall(page.read_text())
    ]
    texts += [path.read_text() for path in sorted((ROOT / "examples").glob("*.py"))]
    found: dict[str, set[str]] = defaultdict(set)
    for node in (node for text in texts for node in ast.walk(ast.parse(text))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("isomorph."):
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                if source(module).is_file():
                    found[module]  # a module is imported whole
                else:
                    found[str(node.module)].add(alias.name)
    return {module: sorted(names) for module, names in sorted(found.items())}


def definition(module: str, name: str) -> tuple[Path, Definition] | None:
    """Where a name is defined: in the module, or in one of ours from which it is imported; None: a type alias."""
    path = source(module)
    for node in parsed(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return path, node
        if isinstance(node, ast.ImportFrom) and name in {alias.asname or alias.name for alias in node.names}:
            return definition(str(node.module), name)
    return None


def lacks(node: Definition) -> list[str]:
    """What a docstring leaves out, of: anything, the shapes of tensors, the errors that are raised here."""
    text = ast.get_docstring(node) or ""
    if not text:
        return ["a docstring"]
    if isinstance(node, ast.ClassDef):
        return []
    hints = [ast.unparse(arg.annotation) for arg in node.args.args + node.args.kwonlyargs if arg.annotation]
    hints += [ast.unparse(node.returns)] if node.returns else []
    takes_tensors = any(re.search(r"\bTensor\b", hint) for hint in hints)
    raised = [one.exc for one in ast.walk(node) if isinstance(one, ast.Raise) and one.exc is not None]
    errors = {re.split(r"\W", ast.unparse(one))[0] for one in raised}
    lacking = ["the shapes"] * (takes_tensors and not re.search(r"\[(\.\.\.|\]|\w+(, [\w*]+)*\])|\bshape\b", text))
    return lacking + [error for error in sorted(errors) if error not in text]


def index() -> str:
    """docs/api.md."""
    lines = [HEAD]
    for module, names in public().items():
        path = source(module).relative_to(ROOT)
        about = (ast.get_docstring(parsed(source(module))) or "").split("\n\n")[0]
        lines += [f"## [{module}](../{path})", "", " ".join(about.split()), ""]
        rows = []
        for name in names:
            found = definition(module, name)
            text = (ast.get_docstring(found[1]) or "") if found else "type alias"
            rows.append(f"| `{name}` | {' '.join(text.split(chr(10) * 2)[0].split()).replace('|', chr(92) + '|')} |")
        lines += ["| | |", "| --- | --- |", *rows, ""] if rows else []
    return "\n".join(lines)


def build(folder: Path) -> None:
    """Writes the HTML pages; ends the process with pdoc's words where it fails or warns."""
    packages = [module for module in public() if source(module).name == "__init__.py"]
    not_below = ["!" + re.escape(f"{package}.") for package in packages]  # pdoc would take every module in a package
    wanted = [*packages, *not_below, *(module for module in public() if module not in packages)]
    command = [sys.executable, "-P", "-m", "pdoc", "--docformat", "markdown", "-o", str(folder), *wanted]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode or "Warn" in done.stderr:
        sys.exit(done.stderr)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        build(Path(sys.argv[1]))
    else:
        PAGE.write_text(index(), encoding="utf-8")
