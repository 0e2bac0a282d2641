"""Names and docstrings follow the rules of CONTRIBUTING.md, as far as a program can tell."""

import ast
from pathlib import Path

import pytest

import domainbed_hp

PACKAGE = Path(domainbed_hp.__file__).parent
TESTS = Path(__file__).parent
FILES = [path for folder in (PACKAGE, TESTS) for path in sorted(folder.rglob("*.py"))]
BANNED = {"keep", "kept", "told", "found", "each", "twice", "fewer", "alike", "beside", "bury", "elsewhere", "mine"}
RIDDLES = {"What", "Whether", "Of", "Those", "Who"}
FLAGS = {("run_args.py", "keep")}
"""Names that users know: `train --keep`."""


def find_names(node: ast.AST) -> list[str]:
    """Return the names that a node gives to a function, a class, an argument, a variable or an attribute."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return [node.attr]
    return [node.asname] if isinstance(node, ast.alias) and node.asname else []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_names_say_what_they_name(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {n for node in nodes for n in find_names(node) if n.lower().strip("_") in BANNED}
    assert {n for n in names if (path.name, n) not in FLAGS} == set(), "rename: see CONTRIBUTING.md"
    texts = [n.value.value for n in nodes if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    firsts = {text.split()[0].strip(".,;:") for text in texts if isinstance(text, str) and text.split()}
    assert firsts & RIDDLES == set(), "begin with a verb or a noun: see CONTRIBUTING.md"
