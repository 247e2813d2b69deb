"""The help of a program: the comments of its configuration beside the keys, and one key or group explained."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vecfield_diffusion.config.overrides import Composer
from vecfield_diffusion.config.schema import Checker, shown
from vecfield_diffusion.config.sources import first_sentence
from vecfield_diffusion.errors import UserError, nearest

_WIDTH, _COLUMN = 120, 34
_DIRECTIVE = re.compile(r"#\s*@")


# Comments.


@dataclass(frozen=True)
class Comments:
    """The comments of one YAML file: of the whole file, and of its keys by their dotted names."""

    head: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)


def read_comments(text: str) -> Comments:
    """The comments of a YAML file.

    Those above the first key are the file's. A key has the comment on its line, what goes on below it in the same
    column, and the lines above the key that begin in the key's own column.
    """
    lines = text.splitlines()
    top = next((number for number, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    head = [_text(line) for line in lines[:top] if line.startswith("#") and not _DIRECTIVE.match(line)]
    root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    found = {path: _beside(lines, top, key, value) for path, key, value in _keys(root)}
    return Comments(" ".join(head), {path: comment for path, comment in found.items() if comment})


def _keys(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every key of a tree of mappings with its dotted name and its value; the groups of a defaults list, too."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if not prefix and key.value == "defaults" and isinstance(value, yaml.SequenceNode):
            for entry in value.value:
                yield from _keys(entry)
            continue
        yield f"{prefix}{key.value}", key, value
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from _keys(value, f"{prefix}{key.value}.")


def _beside(lines: Sequence[str], top: int, key: Any, value: Any) -> str:
    row, column = key.start_mark.line, key.start_mark.column
    above = row
    while above > top and lines[above - 1].startswith(" " * column + "#"):
        above -= 1
    texts = [_text(line) for line in lines[above:row]]
    # The comment starts behind the value where that ends on the same line, else behind the key.
    start = value.end_mark.column if value.end_mark.line == row else key.end_mark.column + 1
    place = lines[row].find("#", start)
    if place > 0 and lines[row][place - 1] == " ":
        texts.append(_text(lines[row][place:]))
        below = row + 1
        while below < len(lines) and lines[below].startswith(" " * place + "#"):
            texts.append(_text(lines[below]))
            below += 1
    return " ".join(texts)


def _text(line: str) -> str:
    return line.strip().lstrip("#").strip()


# What is shown.


class Help:
    """The help for one command line.

    Args:
        composer: finds options and their files.
        checker: knows what keys accept.
        config: the composed configuration without Hydra's own node.
        choices: the chosen option of each group of the program.
        header: what the program does, with examples.
        subject: a group whose keys are typed without its name.
    """

    def __init__(
        self,
        composer: Composer,
        checker: Checker,
        config: Mapping[str, Any],
        choices: Mapping[str, str],
        header: str,
        subject: str | None = None,
    ) -> None:
        self.composer, self.checker, self.config = composer, checker, config
        self.header, self.subject = header, subject
        order = [group for name in self._primaries(str(composer.name)) for group in self._of_file("", name).keys]
        self.choices = dict(sorted(choices.items(), key=lambda choice: [*order, choice[0]].index(choice[0])))
        self.comments = self._comments()

    def _comments(self) -> dict[str, str]:
        """The comments of the keys: of the primary configuration, and of the options that are chosen."""
        found: dict[str, str] = {}
        for name in self._primaries(str(self.composer.name)):
            found |= self._of_file("", name).keys
        for group, name in self.choices.items():
            found |= {f"{group}.{key}": comment for key, comment in self._of_file(group, name).keys.items()}
        return found

    def _primaries(self, name: str) -> Iterator[str]:
        """The primary configuration, after those that its defaults list names."""
        file = self.composer.file("", name)
        if file is None:
            return
        loaded = yaml.load(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
        for entry in loaded.get("defaults", []):
            if isinstance(entry, str) and entry != "_self_":
                yield from self._primaries(entry)
        yield name

    def _of_file(self, group: str, name: str) -> Comments:
        file: Path | None = self.composer.file(group, name)
        return Comments() if file is None else read_comments(file.read_text(encoding="utf-8"))

    def overview(self) -> str:
        """All keys and groups of the program."""
        plain = [key for key in self.config if key not in self.choices]
        blocks = [self.header.rstrip()]
        if plain:
            blocks.append("Keys (key=value):\n\n" + "\n".join(line for key in plain for line in self._lines(key)))
        groups = "\n".join(line for group in self.choices for line in self._group(group))
        title = "Options of each group (group=option), and the keys of the one that is chosen (group.key=value):"
        if self.choices:
            blocks.append(f"{title}\n\n{groups}" if self.subject is None else f"Keys (key=value):\n\n{groups}")
        blocks.append(
            "--help KEY explains one key or group, --cfg job prints the configuration, --hydra-help says more;\n"
            "-m runs every combination of values written a,b,c."
        )
        return "\n\n".join(blocks)

    def _group(self, group: str) -> Iterator[str]:
        if self.subject != group:
            options = ", ".join(self.composer.options(group))
            yield from _entry(f"{group}={self.choices[group]}", self.comments.get(group, ""))
            yield from textwrap.wrap(options, _WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 4)
        yield from self._keys_of(group)

    def _keys_of(self, group: str) -> Iterator[str]:
        node = self.config.get(group)
        for key in node if isinstance(node, Mapping) else ():
            if key != "_target_":
                yield from self._lines(f"{group}.{key}", indent=2)

    def _lines(self, path: str, indent: int = 0) -> Iterator[str]:
        """A key with its value and its comment; a mapping with its keys."""
        value = self._value(path)
        name = path.removeprefix(f"{self.subject}.") if self.subject is not None else path
        if isinstance(value, Mapping) and any(f"{path}.{key}" in self.comments for key in value):
            yield from _entry(name, self.comments.get(path, ""), indent)
            for key in value:
                if key != "_target_":
                    yield from self._lines(f"{path}.{key}", indent + 2)
        else:
            yield from _entry(f"{name}={_written(value)}", self.comments.get(path, ""), indent)

    def _value(self, path: str) -> Any:
        value: Any = self.config
        for key in path.split("."):
            value = value[key]
        return value

    def explain(self, word: str) -> str:
        """One key or group. Raises UserError where there is none of the name."""
        word = word.partition("=")[0]
        path = f"{self.subject}.{word}" if self.subject is not None and word not in self.choices else word
        if path in self.choices:
            return self._explain_group(path)
        try:
            value, owner = self._value(path), self._value(path.rpartition(".")[0]) if "." in path else None
        except (KeyError, TypeError, IndexError):
            near = nearest(word, [*self.choices, *_paths(self.config)])
            raise UserError(f"--help {word}: there is no such key or group.{near}") from None
        accepted = self.checker.kind_of(path, owner)
        lines = [f"{word}={_written(value)}", ""]
        lines += textwrap.wrap(self.comments.get(path, ""), _WIDTH, initial_indent="  ", subsequent_indent="  ")
        lines.append(f"  takes {accepted.text}")
        if isinstance(value, Mapping):
            lines += ["", *(line for key in value if key != "_target_" for line in self._lines(f"{path}.{key}", 2))]
        return "\n".join(lines)

    def _explain_group(self, group: str) -> str:
        node = self.config.get(group)
        target = node.get("_target_") if isinstance(node, Mapping) else None
        lines = [f"{group}={self.choices[group]}" + (f"  ({target})" if target else ""), ""]
        if comment := self.comments.get(group):
            lines += [*textwrap.wrap(comment, _WIDTH, initial_indent="  ", subsequent_indent="  "), ""]
        if keys := list(self._keys_of(group)):
            lines += [*keys, ""]
        lines += [f"Options ({group}=option):", ""]
        for name in self.composer.options(group):
            lines += _entry(name, self._about(group, name), 2)
        return "\n".join(lines)

    def _about(self, group: str, name: str) -> str:
        """What an option is: the comment at its head, else the first sentence about the class that it names."""
        file = self.composer.file(group, name)
        text = file.read_text(encoding="utf-8") if file is not None else ""
        target = re.search(r"^_target_: *(\S+)", text, re.MULTILINE)
        return read_comments(text).head or (first_sentence(target[1]) if target else "")


def _written(value: Any) -> str:
    """A value as it is typed; a mapping only where it holds plain values."""
    if not isinstance(value, Mapping):
        return shown(value)
    if any(isinstance(entry, Mapping) for entry in value.values()):
        return "{...}"
    return f"{{{','.join(f'{key}:{shown(entry)}' for key, entry in value.items())}}}"


def _entry(name: str, comment: str, indent: int = 0) -> Iterator[str]:
    """A name with its comment beside it, or below it where the name is long."""
    first = " " * indent + name
    if not comment:
        yield first
        return
    fits = len(first) <= _COLUMN - 2
    lines = textwrap.wrap(comment, _WIDTH - _COLUMN)
    if not fits:
        yield first
    for number, line in enumerate(lines):
        yield (first if fits and number == 0 else "").ljust(_COLUMN) + line


def _paths(config: Any, prefix: str = "") -> Iterator[str]:
    for key, value in config.items() if isinstance(config, Mapping) else ():
        if key != "_target_":
            yield f"{prefix}{key}"
            yield from _paths(value, f"{prefix}{key}.")
