"""Objects from configurations: the one place where the name in a `_target_` becomes a call.

A configuration that the user types may name any class or function that can be imported. One that comes out of a
checkpoint was typed by somebody else, and a name in it could otherwise run any code: it may name the classes of this
package that describe data, diffusions and networks, the functions `open_...` that open data, the classes of `torch.nn`
and `torch.optim`, and what the modules define that the user lists in `trust=[...]`. What is named must be defined
there, not merely be in reach from there (`torch.os`).
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from vecfield_diffusion.config.schema import MOVED, Checker
from vecfield_diffusion.errors import UserError

PACKAGE = "vecfield_diffusion"
ROOMS = tuple(f"{PACKAGE}.{room}" for room in ("data", "diffusion", "models"))
CLASSES = ("torch.nn", "torch.optim")


def build(node: Any, path: str = "", *, trusted: bool = False, trust: Sequence[str] = (), **extra: Any) -> Any:
    """The object that a node of a configuration describes, with every node inside it.

    Args:
        node: a mapping with `_target_` and the arguments of the target. An empty mapping or None, the `none` option
            of a group, gives None. Mappings and lists without `_target_` are containers.
        path: where the node stands in the configuration, for messages.
        trusted: whether the user typed the configuration, so that it may name whatever can be imported.
        trust: further modules that an untrusted configuration may name.
        extra: arguments of the outermost target that no configuration can hold, such as the parameters of a network.

    Raises:
        UserError: the target is not allowed or does not exist, or it refuses its arguments.
    """
    if node is None or node == {}:
        return None
    return _build(Checker().node(node, path), path, lambda target: resolve(target, trusted, trust), extra)


def _build(node: Any, path: str, resolver: Callable[[str], Callable[..., Any]], extra: Mapping[str, Any]) -> Any:
    if isinstance(node, list | tuple):
        return type(node)(_build(each, f"{path}[{index}]", resolver, {}) for index, each in enumerate(node))
    if not isinstance(node, Mapping):
        return node
    prefix = f"{path}." if path else ""
    built = {key: _build(each, prefix + key, resolver, {}) for key, each in node.items() if key != "_target_"}
    if "_target_" not in node:
        return built
    try:
        target = resolver(node["_target_"])
    except UserError as error:
        raise UserError(f"{prefix}_target_={node['_target_']}: {error}") from None
    return _call(target, built | dict(extra), path)


def _call(target: Callable[..., Any], arguments: dict[str, Any], path: str) -> Any:
    """Calls the target; what it says of its arguments becomes a message that names the key."""
    try:
        return target(**arguments)
    except (ValueError, TypeError) as error:
        text = str(error)
        name, _, rest = text.partition(" ")
        name = name.strip("`'\":,").rpartition(".")[2]
        if name in arguments:
            raise UserError(f"{path}.{name}: {rest}".lstrip(".")) from error
        raise UserError(f"{path}: {text}".removeprefix(": ")) from error


# Names.


def _within(name: str, modules: Sequence[str]) -> bool:
    """Whether a dotted name is one of the modules or lies in one, by whole segments."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def resolve(target: str, trusted: bool = False, trust: Sequence[str] = ()) -> Callable[..., Any]:
    """The class or function of a dotted name.

    Args:
        target: the name, such as `vecfield_diffusion.samplers.heun.Heun`.
        trusted: whether any name that can be imported is allowed.
        trust: modules allowed besides the rooms of this package, `torch.nn` and `torch.optim`.

    Raises:
        UserError: the name is not allowed, or nothing has it.
    """
    target = MOVED.get(target, target)
    parts = target.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise UserError("expected a dotted name, such as package.module.Class")
    if trusted:
        found = _import(parts)
        if not callable(found):
            raise UserError("expected a class or a function")
        return found
    allowed = [*ROOMS, *CLASSES, *trust]
    if not _within(target, allowed) or any(part.startswith("_") for part in parts):
        raise _refused(allowed, parts)
    found = _import(parts)
    opens = _within(target, ROOMS) and parts[-1].startswith("open_")
    if not _defined(found, allowed) or not (inspect.isclass(found) or opens or _within(target, trust)):
        raise _refused(allowed, parts)
    return found


def _refused(allowed: Sequence[str], parts: Sequence[str]) -> UserError:
    text = f"a checkpoint may name only classes and functions defined in {', '.join(allowed)}"
    if parts[0] in (PACKAGE, "torch") or parts[0] in sys.stdlib_module_names:
        return UserError(text)
    return UserError(f"{text}; if you know and trust its author, add trust=[{'.'.join(parts[:-1])}]")


def _import(parts: Sequence[str]) -> Any:
    """Walks a dotted name from the outermost module inwards, importing modules on the way."""
    try:
        found: Any = importlib.import_module(parts[0])
        for depth in range(1, len(parts)):
            if isinstance(found, ModuleType) and not hasattr(found, parts[depth]):
                importlib.import_module(".".join(parts[: depth + 1]))
            found = getattr(found, parts[depth])
    except ModuleNotFoundError as error:
        raise UserError(f"cannot be imported: {error} (is its folder on PYTHONPATH?)") from error
    except AttributeError as error:
        raise UserError(f"does not exist: {error}") from error
    return found


def _defined(found: Any, allowed: Sequence[str]) -> bool:
    """Whether a class or function is defined in one of the modules, under the name that it bears."""
    if not (inspect.isclass(found) or inspect.isfunction(found)) or not _within(str(found.__module__), allowed):
        return False
    home: Any = sys.modules.get(found.__module__)
    for part in found.__qualname__.split("."):
        home = getattr(home, part, None)
    return home is found
