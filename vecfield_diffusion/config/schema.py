"""The signature is the schema: a configuration is checked against the constructors that it names.

A node of a configuration holds `_target_`, the dotted name of a class or function, beside its arguments. This module
reads the parameters of the target and their annotations from its source, and checks every leaf against them. Nothing
is imported, so that a misspelt key is answered before torch is loaded. Targets outside this package and torch are left
to be bound when they are built.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vecfield_diffusion.config import sources
from vecfield_diffusion.config.kinds import ANYTHING, Kind, kind
from vecfield_diffusion.config.moved import present_keys, present_name
from vecfield_diffusion.config.sources import Module
from vecfield_diffusion.errors import UserError, nearest

PACKAGES = ("vecfield_diffusion", "torch")
MISSING = "???"


@dataclass(frozen=True)
class Signature:
    """The keywords that a target takes; `open` where it takes others too."""

    parameters: dict[str, Kind]
    open: bool = False


@functools.cache
def signature(target: str) -> Signature | None:
    """What a class or function of this package or of torch takes; None for a target of another package.

    Raises:
        UserError: the target names this package but nothing in it.
    """
    target = present_name(target)
    if target.partition(".")[0] not in PACKAGES:
        return None
    found = sources.find(target)
    if found is not None:
        module, node = found
        return _of_class(node, module) if isinstance(node, ast.ClassDef) else _of_function(node, module)
    if target.startswith("torch."):
        return None  # torch makes some of its names while it is imported
    owner, _, last = target.rpartition(".")
    home = sources.read_module(owner)
    hint = nearest(last, {*home.definitions, *home.imports} - {last}) if home else ""
    raise UserError(f"_target_: {target} is neither a class nor a function of this package.{hint}")


def _of_function(node: ast.FunctionDef, module: Module) -> Signature:
    arguments = [*node.args.args, *node.args.kwonlyargs]
    kinds = {argument.arg: kind(argument.annotation, module) for argument in arguments}
    named = {name: accepted for name, accepted in kinds.items() if name not in ("self", "cls")}
    match node.args.kwarg:
        case ast.arg(annotation=ast.Subscript(value=ast.Name(id="Unpack"), slice=ast.Name(id=name))):
            found = _definition(name, module)
            return Signature(named | ({} if found is None else _fields(*found)))
    return Signature(named, node.args.kwarg is not None)


def _definition(name: str, module: Module) -> tuple[ast.ClassDef, Module] | None:
    """The class of a name in a module, and the module that defines it."""
    found = (module, module.definitions[name]) if name in module.definitions else None
    found = found or sources.find(module.imports.get(name, ""))
    return (found[1], found[0]) if found is not None and isinstance(found[1], ast.ClassDef) else None


def _fields(node: ast.ClassDef, module: Module) -> dict[str, Kind]:
    """The annotated names of a class."""
    return {
        member.target.id: kind(member.annotation, module)
        for member in node.body
        if isinstance(member, ast.AnnAssign)
        and isinstance(member.target, ast.Name)
        and "ClassVar" not in ast.unparse(member.annotation)
    }


def _of_class(node: ast.ClassDef, module: Module) -> Signature:
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            own = _of_function(member, module)
            inherited = _of_bases(node, module)
            return Signature(inherited.parameters | own.parameters, inherited.open) if own.open else own
    inherited = _of_bases(node, module)
    fields = _fields(node, module) if _is_dataclass(node) else {}
    return Signature(inherited.parameters | fields, inherited.open)


def _of_bases(node: ast.ClassDef, module: Module) -> Signature:
    """What the base classes take; open where one of them lies outside the source that can be read."""
    parameters: dict[str, Kind] = {}
    outside = False
    for base in reversed(node.bases):
        if not isinstance(base, ast.Name):
            outside = outside or isinstance(base, ast.Attribute)
            continue
        found = _definition(base.id, module)
        if found is None:
            outside = outside or base.id not in ("ABC", "object", "Protocol")
            continue
        inherited = _of_class(*found)
        parameters |= inherited.parameters
        outside = outside or inherited.open
    return Signature(parameters, outside)


def _is_dataclass(node: ast.ClassDef) -> bool:
    decorators = [decorator.func if isinstance(decorator, ast.Call) else decorator for decorator in node.decorator_list]
    return any(ast.unparse(decorator).rpartition(".")[2] == "dataclass" for decorator in decorators)


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
        if isinstance(value, float | bool) and wanted.takes(shown(value)):
            hint = f" Text that reads as a number or as true is quoted twice: {path}='\"...\"'"
        raise UserError(f"{path}={shown(value)}: expected {wanted.text}, got {got}.{hint}".rstrip(".")) from None


def unknown_key(path: str, options: Collection[str]) -> UserError:
    """The message for a key that nothing reads: the nearest one beside it, and all of them."""
    owner, _, last = path.rpartition(".")
    where = f" of {owner}" if owner else ""
    listed = f" The keys{where} are: {', '.join(sorted(options))}." if options else f" There are no keys{where}."
    return UserError(f"unknown key {path}.{nearest(last, options)}{listed}")


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

    def kind_of(self, path: str, owner: Any) -> Kind:
        """What a key accepts; `owner` is the mapping that holds it."""
        if path in self.kinds:
            return self.kinds[path]
        target = owner.get("_target_") if isinstance(owner, Mapping) else None
        wanted = None if target is None else self._signature(target, path.rpartition(".")[0])
        return ANYTHING if wanted is None else wanted.parameters.get(path.rpartition(".")[2], ANYTHING)

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
        inner |= {key for key, entry in value.items() if isinstance(entry, Mapping) and "_target_" in entry}
        return {key: self._plain(prefix + key, entry, inner) for key, entry in value.items()}

    def node(self, value: Any, path: str) -> Any:
        """A node with `_target_`, or a container of nodes. Raises UserError."""
        if isinstance(value, list | tuple):
            return [self.node(entry, f"{path}[{index}]") for index, entry in enumerate(value)]
        if not isinstance(value, Mapping):
            return value
        if "_target_" not in value:
            return {key: self.node(entry, f"{path}.{key}") for key, entry in value.items()}
        wanted = self._signature(value["_target_"], path)
        result = {"_target_": value["_target_"]}
        for key, entry in present_keys(value, path).items():
            if key == "_target_":
                continue
            if wanted is not None and key not in wanted.parameters and not wanted.open:
                raise unknown_key(f"{path}.{key}", wanted.parameters)
            result[key] = self._leaf(f"{path}.{key}", entry, self.kind_of(f"{path}.{key}", value))
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
                example = f": {self.examples[path]}" if path in self.examples else ""
                raise UserError(f"{path}= is missing{example}")
            return value
        if isinstance(value, Mapping) and "_target_" in value:
            return self.node(value, path)
        value = self.node(value, path)
        return value if wanted is ANYTHING else fit(path, value, wanted)
