"""The signature is the schema: a configuration is checked against the constructors that it names.

A node of a configuration holds `_target_`, the dotted name of a class or function, beside its arguments. This module
finds the source of the target, reads the parameters and their annotations from the syntax tree, and checks every
leaf against them. Nothing is imported, so that a misspelt key is answered before torch is loaded.

The grammar of the annotations: `int`, `float`, `bool`, `str`, `None`, unions, `Literal`, `list`, `tuple`,
`Sequence`, `dict`, `Any`, and names that the module of the target gives to one of these or imports. An annotation
outside the grammar (a class, say) accepts any value. Targets outside this package and torch are left to be bound when
built.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vecfield_diffusion.errors import UserError, nearest

PACKAGES = ("vecfield_diffusion", "torch")
#: Names that older checkpoints and configurations bear, and what they are called now.
MOVED = {
    f"vecfield_diffusion.data.{old}": "vecfield_diffusion.data.readers.open_fields"
    for old in ("formats.open_fields", "netcdf.open_netcdf", "hdf5.open_hdf5")
}
MISSING = "???"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


# Source files: what a module defines, imports and names.


@dataclass(frozen=True)
class Module:
    """The top level of one source file."""

    definitions: dict[str, ast.ClassDef | ast.FunctionDef]
    imports: dict[str, str]
    aliases: dict[str, ast.expr]


@functools.cache
def _module_file(name: str) -> Path | None:
    """The source of a dotted module name, or None. Looks at files alone: the module is not imported."""
    first, *rest = name.split(".")
    spec = importlib.util.find_spec(first)
    if spec is None or not spec.submodule_search_locations:
        return None
    stem = Path(spec.submodule_search_locations[0], *rest)
    files = (stem.with_name(stem.name + ".py"), stem / "__init__.py") if rest else (stem / "__init__.py",)
    return next((file for file in files if file.is_file()), None)


@functools.cache
def _module(name: str) -> Module | None:
    file = _module_file(name)
    if file is None:
        return None
    body = ast.parse(file.read_text(encoding="utf-8")).body
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    imports = {}
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


def _find(name: str) -> tuple[Module, ast.ClassDef | ast.FunctionDef] | None:
    """The definition of a dotted name and its module, followed through `from ... import ...`."""
    for _ in range(8):  # a chain of re-exports longer than this is a circle
        owner, _, last = name.rpartition(".")
        module = _module(owner) if owner else None
        if module is None:
            return None
        if last in module.definitions:
            return module, module.definitions[last]
        if last not in module.imports:
            return None
        name = module.imports[last]
    return None


# Kinds: what an annotation accepts.


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
        if not any(type(value) is type(each) and value == each for each in values):
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
        return make(item.fit(each) for each in value)

    return Kind(f"a list (each {item.text})", fit, 3)


def _fixed_tuple(items: list[Kind]) -> Kind:
    def fit(value: Any) -> Any:
        if not isinstance(value, list | tuple) or len(value) != len(items):
            raise ValueError
        return tuple(item.fit(each) for item, each in zip(items, value, strict=True))

    return Kind(f"a list of {len(items)} ({', '.join(item.text for item in items)})", fit, 3)


def _mapping(item: Kind) -> Kind:
    def fit(value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError
        return {key: item.fit(each) for key, each in value.items()}

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
            home = _module(owner)
            return kind(home.aliases[last], home) if home is not None and last in home.aliases else ANYTHING
    return ANYTHING


def _flatten(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_flatten(node.left), node.right]
    return [node]


# Signatures.


@dataclass(frozen=True)
class Signature:
    """The keywords that a target takes; `open` where it takes others too."""

    parameters: dict[str, Kind]
    open: bool = False


def _of_function(node: ast.FunctionDef, module: Module) -> Signature:
    arguments = [*node.args.args, *node.args.kwonlyargs]
    kinds = {each.arg: kind(each.annotation, module) for each in arguments if each.arg not in ("self", "cls")}
    return Signature(kinds, node.args.kwarg is not None)


def _bases(node: ast.ClassDef, module: Module) -> Signature:
    """What the base classes take; open where one of them lies outside the source that can be read."""
    parameters: dict[str, Kind] = {}
    outside = False
    for base in reversed(node.bases):
        if not isinstance(base, ast.Name):
            outside = outside or isinstance(base, ast.Attribute)
            continue
        found = (module, module.definitions[base.id]) if base.id in module.definitions else None
        found = found or _find(module.imports.get(base.id, ""))
        if found is None or not isinstance(found[1], ast.ClassDef):
            outside = outside or base.id not in ("ABC", "object", "Protocol")
            continue
        inherited = _of_class(found[1], found[0])
        parameters |= inherited.parameters
        outside = outside or inherited.open
    return Signature(parameters, outside)


def _is_dataclass(node: ast.ClassDef) -> bool:
    names = [each.func if isinstance(each, ast.Call) else each for each in node.decorator_list]
    return any(ast.unparse(name).rpartition(".")[2] == "dataclass" for name in names)


def _of_class(node: ast.ClassDef, module: Module) -> Signature:
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            own = _of_function(member, module)
            inherited = _bases(node, module)
            return Signature(inherited.parameters | own.parameters, inherited.open) if own.open else own
    inherited = _bases(node, module)
    if not _is_dataclass(node):
        return inherited
    fields = {
        member.target.id: kind(member.annotation, module)
        for member in node.body
        if isinstance(member, ast.AnnAssign)
        and isinstance(member.target, ast.Name)
        and "ClassVar" not in ast.unparse(member.annotation)
    }
    return Signature(inherited.parameters | fields, inherited.open)


@functools.cache
def signature(target: str) -> Signature | None:
    """What a class or function of this package or of torch takes; None for a target of another package.

    Raises:
        UserError: the target names this package but nothing in it.
    """
    target = MOVED.get(target, target)
    if target.partition(".")[0] not in PACKAGES:
        return None
    found = _find(target)
    if found is not None:
        module, node = found
        return _of_class(node, module) if isinstance(node, ast.ClassDef) else _of_function(node, module)
    if target.startswith("torch."):
        return None  # torch makes some of its names while it is imported
    owner, _, last = target.rpartition(".")
    module = _module(owner)
    hint = nearest(last, {*module.definitions, *module.imports} - {last}) if module else ""
    raise UserError(f"_target_: {target} is neither a class nor a function of this package.{hint}")


# Checks.


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    return str(value)


def fit(path: str, value: Any, wanted: Kind) -> Any:
    """The value as the constructor receives it.

    Raises:
        UserError: it does not fit; the message names the key, what was expected and what was found.
    """
    try:
        return wanted.fit(value)
    except ValueError:
        got = "nothing" if value == "" else shown(value) if value is None else repr(value)
        hint = nearest(value, wanted.text.removeprefix("one of ").split(", ")) if isinstance(value, str) else ""
        raise UserError(f"{path}={shown(value)}: expected {wanted.text}, got {got}.{hint}".rstrip(".")) from None


def unknown_key(path: str, options: Collection[str]) -> UserError:
    """The message for a key that nothing reads: the nearest one beside it, and all of them."""
    owner, _, last = path.rpartition(".")
    where = f" of {owner}" if owner else ""
    listed = f" The keys{where} are: {', '.join(sorted(options))}." if options else f" There are no keys{where}."
    return UserError(f"unknown key {path}.{nearest(last, options)}{listed}")


def _missing(path: str, examples: Mapping[str, str]) -> UserError:
    return UserError(f"{path}= is missing" + (f": {examples[path]}" if path in examples else ""))


class Checker:
    """Checks a whole configuration, or a node of it.

    Args:
        keys: the annotations of the keys that stand in no node with a `_target_`, such as `{"seed": "int"}`; dotted
            for keys within a group. A dotted key within a node goes before the annotation of the constructor, for a
            value such as `auto` that the program replaces before it builds.
        groups: the groups of options, which may stand at the top level.
        examples: for a key that must be given, how to give it.
        complete: whether a value that is still `???` is an error.
    """

    def __init__(
        self,
        keys: Mapping[str, str] | None = None,
        groups: Collection[str] = (),
        examples: Mapping[str, str] | None = None,
        complete: bool = True,
    ) -> None:
        self.kinds = {key: kind(ast.parse(text, mode="eval").body) for key, text in (keys or {}).items()}
        self.groups = set(groups)
        self.examples = examples or {}
        self.complete = complete

    def root(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A whole configuration, each value as its constructor receives it. Raises UserError."""
        known = self.groups | {key.partition(".")[0] for key in self.kinds}
        return {key: self._plain(key, value, known) for key, value in config.items()}

    def _plain(self, path: str, value: Any, known: Collection[str]) -> Any:
        """What stands outside every target: a described leaf, a node, or a mapping of these."""
        if path in self.kinds:
            return self._leaf(path, value, self.kinds[path])
        if isinstance(value, Mapping) and "_target_" in value:
            return self.node(value, path)
        if path.rpartition(".")[2] not in known:
            raise unknown_key(path, known)
        if not isinstance(value, Mapping):
            if value is None:
                return None
            raise UserError(f"{path}={shown(value)}: expected a group of keys, got {value!r}")
        prefix = f"{path}."
        inner = {key.removeprefix(prefix).partition(".")[0] for key in self.kinds if key.startswith(prefix)}
        inner |= {key for key, each in value.items() if isinstance(each, Mapping) and "_target_" in each}
        return {key: self._plain(prefix + key, each, inner) for key, each in value.items()}

    def node(self, value: Any, path: str) -> Any:
        """A node with `_target_`, or a container of nodes. Raises UserError."""
        if isinstance(value, list | tuple):
            return [self.node(each, f"{path}[{index}]") for index, each in enumerate(value)]
        if not isinstance(value, Mapping):
            return value
        if "_target_" not in value:
            return {key: self.node(each, f"{path}.{key}") for key, each in value.items()}
        wanted = self._signature(value["_target_"], path)
        result = {"_target_": value["_target_"]}
        for key, each in value.items():
            if key == "_target_":
                continue
            if wanted is not None and key not in wanted.parameters and not wanted.open:
                raise unknown_key(f"{path}.{key}", wanted.parameters)
            by_signature = wanted.parameters.get(key, ANYTHING) if wanted is not None else ANYTHING
            result[key] = self._leaf(f"{path}.{key}", each, self.kinds.get(f"{path}.{key}", by_signature))
        return result

    def _signature(self, target: Any, path: str) -> Signature | None:
        if not isinstance(target, str) or not target:
            raise UserError(f"{path}._target_: expected the name of a class or function, got {target!r}")
        try:
            return signature(target)
        except UserError as error:
            raise UserError(f"{path}.{error}") from None

    def _leaf(self, path: str, value: Any, wanted: Kind) -> Any:
        if isinstance(value, str) and value == MISSING:
            if self.complete:
                raise _missing(path, self.examples)
            return value
        if isinstance(value, Mapping) and "_target_" in value:
            return self.node(value, path)
        value = self.node(value, path)
        return value if wanted is ANYTHING else fit(path, value, wanted)
