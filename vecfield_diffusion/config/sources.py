"""Source files as syntax trees: what a module defines, imports and names, found without importing it."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Module:
    """The top level of one source file."""

    definitions: dict[str, ast.ClassDef | ast.FunctionDef]
    imports: dict[str, str]
    aliases: dict[str, ast.expr]


@functools.cache
def module_file(name: str) -> Path | None:
    """The source of a dotted module name, or None. Looks at files alone: the module is not imported."""
    first, *rest = name.split(".")
    spec = importlib.util.find_spec(first)
    if spec is None or not spec.submodule_search_locations:
        return None
    stem = Path(spec.submodule_search_locations[0], *rest)
    files = (stem.with_name(stem.name + ".py"), stem / "__init__.py") if rest else (stem / "__init__.py",)
    return next((file for file in files if file.is_file()), None)


@functools.cache
def read_module(name: str) -> Module | None:
    """The top level of a module of a package; None where there is no such source."""
    file = module_file(name)
    if file is None:
        return None
    body = ast.parse(file.read_text(encoding="utf-8")).body
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    imports: dict[str, str] = {}
    for node in body:
        if isinstance(node, ast.ImportFrom):
            parent = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (parent, node.module) if part)
            imports |= {alias.asname or alias.name: f"{source}.{alias.name}" for alias in node.names}
    return Module(
        definitions={node.name: node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)},
        imports=imports,
        aliases={
            target.id: node.value
            for node in body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        },
    )


def find(name: str) -> tuple[Module, ast.ClassDef | ast.FunctionDef] | None:
    """The definition of a dotted name and its module, followed through `from ... import ...`."""
    for _ in range(8):  # a chain of re-exports longer than this is a circle
        owner, _, last = name.rpartition(".")
        module = read_module(owner) if owner else None
        if module is None:
            return None
        if last in module.definitions:
            return module, module.definitions[last]
        if last not in module.imports:
            return None
        name = module.imports[last]
    return None


def first_sentence(name: str) -> str:
    """What the docstring of a dotted name says first; empty where there is none."""
    found = find(name)
    text = ast.get_docstring(found[1]) if found is not None else None
    first = " ".join((text or "").partition("\n\n")[0].split())
    return re.split(r"(?<! al)\. ", first)[0].rstrip(".")
