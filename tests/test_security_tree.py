"""Reads the syntax trees of the whole repository, and of reasoning-gym: who evaluates, unpickles or runs what."""

import ast
import importlib.util
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from isomorph.curriculum.rows.gym_answers import FORMULAS, LITERALS

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "engine", "curriculum", "benchmarks", "studies", "examples", "tests")
OURS = ("kernels", "engine", "curriculum")
# modules that evaluate or unpickle what they read, or run Python's source
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml", "runpy", "code", "codeop"}
MODULES |= {"jinja2", "pty", "commands"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
# methods and functions of other packages
ATTRIBUTES = {"sympify", "parse_expr", "parse_latex", "lambdify", "system", "popen", "exec_module", "run_path"}
ATTRIBUTES |= {"import_module", "spec_from_file_location", "read_pickle", "to_pickle", "from_pickle", "S"}
USERS = "code that the recipe names: rewards, environments, tools"
ALLOWED = {
    ("curriculum/rewards/user_code.py", "import_module"): USERS,
    ("curriculum/rewards/user_code.py", "spec_from_file_location"): USERS,
    ("curriculum/rewards/user_code.py", "exec_module"): USERS,
    ("curriculum/rewards/families.py", "import_module"): "functions of FAMILIES, a table of our own",
    ("curriculum/rewards/pool.py", "import_module"): "functions of FAMILIES, a table of our own",
    ("curriculum/commands/doctor_packages.py", "import_module"): "the packages of doctor's own lists",
}


def python_files() -> Iterator[tuple[str, ast.Module]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func)


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((one.value for one in call.keywords if one.arg == name), None)


def is_constant(node: ast.expr | None, *values: object) -> bool:
    return isinstance(node, ast.Constant) and node.value in values


def suspicious(call: ast.Call) -> str | None:
    """What a call does that needs a reason; None for a harmless one."""
    name = name_of(call)
    last = name.rpartition(".")[2]
    if name in BUILTINS:
        return name
    if last in ATTRIBUTES and "." in name:
        if last == "import_module" and is_text(call.args[0]):
            return None
        return last
    if name == "torch.load" and not is_constant(keyword(call, "weights_only"), True):
        return "torch.load"
    if last in ("load", "loadtxt") and keyword(call, "allow_pickle") is not None:
        return "allow_pickle"
    if (shell := keyword(call, "shell")) is not None and not is_constant(shell, False):
        return "shell"
    code = keyword(call, "trust_remote_code")
    if code is not None and ast.unparse(code) not in ("False", "NO_CODE"):
        return "trust_remote_code"
    return None


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def imported_modules(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
            yield from (alias.name for alias in node.names if alias.name in ATTRIBUTES - {"S"})


def test_nothing_of_ours_evaluates_unpickles_or_starts_a_shell() -> None:
    found: dict[tuple[str, str], int] = {}
    for path, tree in python_files():
        if path.partition("/")[0] not in OURS:
            continue
        for module in MODULES.union(ATTRIBUTES) & set(imported_modules(tree)):
            found[path, module] = 0
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (what := suspicious(node)) is not None:
                found[path, what] = node.lineno
    assert found.keys() - ALLOWED.keys() == set(), "read it, and give a reason in ALLOWED or do it otherwise"
    assert ALLOWED.keys() - found.keys() == set(), "no longer needed"


def test_tests_benchmarks_studies_and_examples_unpickle_nothing_and_start_no_shell() -> None:
    """They may compile and run texts of their own; tests write hostile pickles. Of yaml, safe_load alone."""
    found = []
    for path, tree in python_files():
        if path.partition("/")[0] in OURS:
            continue
        found += [(path, what) for what in (MODULES - {"pickle", "runpy", "yaml"}) & set(imported_modules(tree))]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                what = suspicious(node)
                if what in ("torch.load", "allow_pickle", "shell", "trust_remote_code", "system", "popen"):
                    found.append((path, what))
                if name_of(node) in ("pickle.load", "pickle.loads"):
                    found.append((path, name_of(node)))
                if name_of(node).startswith("yaml.") and name_of(node) != "yaml.safe_load":
                    found.append((path, name_of(node)))
    assert found == []


def test_every_model_is_loaded_without_the_code_in_its_folder() -> None:
    loaders = []
    for path, tree in python_files():
        for node in ast.walk(tree):
            if not (path.startswith("engine/") and isinstance(node, ast.Call)):
                continue
            called = name_of(node)
            if called.endswith(".from_pretrained") and "GenerationConfig" not in called:  # that is JSON alone
                loaders.append((path, node.lineno))
                assert ast.unparse(keyword(node, "trust_remote_code") or node) == "NO_CODE", (path, node.lineno)
    assert len(loaders) == 4
    from isomorph.engine.model.load import NO_CODE

    assert NO_CODE is False


EVALUATES = {  # calls in reasoning-gym 0.1.25 by file; those of answers are in LITERALS and FORMULAS
    **{f"algorithmic/{name}.py": "answer" for name in ("binary_matrix", "spiral_matrix", "string_insertion")},
    **{f"games/{name}.py": "answer" for name in ("countdown", "n_queens", "puzzle24")},
    **{f"algebra/{name}.py": "answer" for name in ("simple_integration", "intermediate_integration")},
    "algebra/polynomial_multiplication.py": "answer",
    "algorithmic/number_sorting.py": "entry['answer'], which the package made",
    "arithmetic/basic_arithmetic.py": "expressions that the package makes",
    "arithmetic/bitwise_arithmetic.py": "metadata that the package made",
    "arithmetic/gsm_symbolic/generators_00_49.py": "fractions of its own",
    "arithmetic/gsm_symbolic/generators_50_99.py": "fractions of its own",
    "code/codeio.py": "programs of the package",
    "logic/propositional_logic.py": "a parser of that name, which evaluates nothing",
}


def test_no_scorer_of_reasoning_gym_evaluates_an_answer_unseen() -> None:
    """A new version of the package may evaluate more: then read it, and extend ``gym_answers``."""
    spec = importlib.util.find_spec("reasoning_gym")
    if spec is None or spec.origin is None:
        pytest.skip("needs reasoning-gym")
    root, found = Path(spec.origin).parent, Counter[str]()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = name_of(node).rpartition(".")[2]
                is_evaluation = name_of(node) in ("eval", "exec") or name in ("parse_expr", "sympify", "parse_latex")
                found[path.relative_to(root).as_posix()] += is_evaluation
    files = {path for path, count in found.items() if count}
    assert files == EVALUATES.keys()
    of_answers = {Path(path).stem for path, what in EVALUATES.items() if what == "answer"}
    assert of_answers == LITERALS | FORMULAS
