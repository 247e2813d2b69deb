"""Kinds: what the annotation of a parameter accepts, and what a value of YAML becomes by it.

The grammar of the annotations: `int`, `float`, `bool`, `str`, `None`, unions, `Literal`, `list`, `tuple`,
`Sequence`, `dict`, `Any`, and names that the module of the target gives to one of these or imports. An annotation
outside the grammar (a class, say) accepts any value.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vecfield_diffusion.config import sources
from vecfield_diffusion.config.sources import Module

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Kind:
    """What a value must be.

    Attributes:
        text: what a message calls it.
        fit: gives the value as the constructor receives it; raises ValueError where it does not fit.
        rank: in a union, kinds of lower rank are tried first.
    """

    text: str
    fit: Callable[[Any], Any]
    rank: int = 0

    def takes(self, value: Any) -> bool:
        """Whether a value fits."""
        try:
            self.fit(value)
        except ValueError:
            return False
        return True


def _exactly(kind: type) -> Callable[[Any], Any]:
    def fit(value: Any) -> Any:
        if type(value) is not kind:
            raise ValueError
        return value

    return fit


def _fit_float(value: Any) -> float:
    """YAML reads 1e-3 as text, and 1 as a whole number: both are numbers here."""
    if type(value) in (int, float) or (isinstance(value, str) and _NUMBER.fullmatch(value)):
        return float(value)
    raise ValueError


def _fit_text(value: Any) -> str:
    """Text; a whole number is text too, for `name=7` reads as one. Empty text is a value that was forgotten."""
    if type(value) is int or (isinstance(value, str) and value):
        return str(value)
    raise ValueError


def _fit_any(value: Any) -> Any:
    return value


def _fit_node(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError
    return value


ANYTHING = Kind("a value", _fit_any, 6)
_SCALARS = {
    "bool": Kind("true or false", _exactly(bool), 1),
    "int": Kind("a whole number", _exactly(int), 1),
    "float": Kind("a number", _fit_float, 2),
    "str": Kind("text", _fit_text, 4),
    "Path": Kind("a path", _fit_text, 4),
}
_NULL = Kind("null", _exactly(type(None)))


def _literal(values: tuple[Any, ...]) -> Kind:
    def fit(value: Any) -> Any:
        if not any(type(value) is type(allowed) and value == allowed for allowed in values):
            raise ValueError
        return value

    return Kind("one of " + ", ".join(str(value) for value in values), fit)


def _union(members: list[Kind]) -> Kind:
    # A leaf of YAML is never an object of some class, so beside other kinds a class accepts a node alone.
    others = sorted((member for member in members if member is not ANYTHING), key=lambda member: member.rank)
    if not others:
        return ANYTHING
    if len(others) < len(members):
        others.append(Kind("", _fit_node))

    def fit(value: Any) -> Any:
        for member in others:
            try:
                return member.fit(value)
            except ValueError:
                continue
        raise ValueError

    texts = [other.text for other in sorted(others, key=lambda other: other is _NULL) if other.text]
    return Kind(" or ".join(dict.fromkeys(texts)), fit, max(other.rank for other in others))


def _sequence(item: Kind, make: type) -> Kind:
    def fit(value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError
        return make(item.fit(entry) for entry in value)

    return Kind(f"a list (each {item.text})", fit, 3)


def _fixed_tuple(items: list[Kind]) -> Kind:
    def fit(value: Any) -> Any:
        if not isinstance(value, list | tuple) or len(value) != len(items):
            raise ValueError
        return tuple(item.fit(entry) for item, entry in zip(items, value, strict=True))

    return Kind(f"a list of {len(items)} ({', '.join(item.text for item in items)})", fit, 3)


def _mapping(item: Kind) -> Kind:
    def fit(value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError
        return {key: item.fit(entry) for key, entry in value.items()}

    return Kind(f"a mapping (each {item.text})", fit, 3)


def _generic(name: str, arguments: list[ast.expr], module: Module | None) -> Kind:
    """The kind of `name[arguments]`."""
    if name == "Literal":
        return _literal(tuple(ast.literal_eval(argument) for argument in arguments))
    kinds = [kind(argument, module) for argument in arguments if not _is_ellipsis(argument)]
    if name == "Optional":
        return _union([*kinds, _NULL])
    if name == "Union":
        return _union(kinds)
    if name == "tuple" and len(kinds) == len(arguments):
        return _fixed_tuple(kinds)
    if name in ("list", "tuple", "Sequence"):
        return _sequence(kinds[0], tuple if name == "tuple" else list)
    if name in ("dict", "Mapping"):
        return _mapping(kinds[-1])
    return ANYTHING


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is Ellipsis


def kind(annotation: ast.expr | None, module: Module | None = None) -> Kind:
    """What an annotation accepts; `module` gives names such as `Boundary = Literal[...]` their meaning."""
    match annotation:
        case ast.Constant(value=None):
            return _NULL
        case ast.Constant(value=str(text)):
            return kind(ast.parse(text, mode="eval").body, module)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _union([kind(side, module) for side in (*_flatten(left), right)])
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Tuple(elts=arguments)):
            return _generic(name, arguments, module)
        case ast.Subscript(value=ast.Name(id=name), slice=argument):
            return _generic(name, [argument], module)
        case ast.Name(id="list" | "tuple" | "Sequence" as name):
            return _sequence(ANYTHING, tuple if name == "tuple" else list)
        case ast.Name(id="dict"):
            return _mapping(ANYTHING)
        case ast.Name(id=name) if name in _SCALARS:
            return _SCALARS[name]
        case ast.Name(id=name) if module is not None and name in module.aliases:
            return kind(module.aliases[name], module)
        case ast.Name(id=name) if module is not None and name in module.imports:
            owner, _, last = module.imports[name].rpartition(".")
            home = sources.read_module(owner)
            return kind(home.aliases[last], home) if home is not None and last in home.aliases else ANYTHING
    return ANYTHING


def _flatten(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_flatten(node.left), node.right]
    return [node]
