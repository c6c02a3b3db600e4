"""Keeps what a model wrote from being run by reasoning-gym: nine of its scorers evaluate the answer as Python.

Four of them call ``eval`` for answers that are Python lists, five ``parse_expr`` of SymPy for formulas, which calls
``eval``, too, with all of Python's built-in functions in reach. ``harmless`` hands such a scorer only literals, or
formulas of numbers, names and known functions. tests/test_security_tree.py looks for further ones in the package.
"""

import ast

MAX_CHARS = 2_000  # of an answer that is parsed
LITERALS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
FORMULAS = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
_UNREADABLE = ""  # every one of these scorers gives it what it gives an answer that it cannot read
_FUNCTIONS = frozenset(
    {"sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh"}
    | {"asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "Abs", "abs"}
)
_OF_LITERALS = (ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Load, ast.UnaryOp, ast.USub, ast.UAdd)
_OF_FORMULAS = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call),
    *(ast.UnaryOp, ast.USub, ast.UAdd),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow),
)


def harmless(task: str, stated: str, accepted: str) -> str:
    """``stated``, or "" where the scorer of ``task`` would evaluate it and it is more than a literal or a formula.

    ``accepted``: the entry's own answer, which the scorers compare as text first.
    """
    if task not in LITERALS | FORMULAS or stated == accepted:
        return stated
    if len(stated) > MAX_CHARS:
        return _UNREADABLE
    is_harmless = _is_literal(stated) if task in LITERALS else _is_formula(stated)
    return stated if is_harmless else _UNREADABLE


def _is_literal(text: str) -> bool:
    """Whether ``eval`` makes lists, numbers and texts of it, or refuses it."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError):
        return True  # eval refuses it before anything runs; a board of queens is no Python
    except (MemoryError, RecursionError):
        return False
    return all(isinstance(node, _OF_LITERALS) for node in ast.walk(tree))


def _is_formula(text: str) -> bool:
    """Whether it holds nothing but numbers, names, arithmetic and calls of known functions.

    SymPy rewrites a text before it evaluates it, so that one which is no Python may become some: that is refused.
    """
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    nodes = list(ast.walk(tree))
    called = [node for node in nodes if isinstance(node, ast.Call)]
    constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return (
        all(isinstance(node, _OF_FORMULAS) for node in nodes)
        and all(isinstance(call.func, ast.Name) and call.func.id in _FUNCTIONS for call in called)
        and all(type(value) in (int, float) for value in constants)
    )
