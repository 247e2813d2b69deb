"""What a command line means: the words that were typed become overrides, with a note where they were read freely.

Only what can mean one thing is read freely: `device=gpu`, a list without its brackets, `dataset.path=my.nc` without
`dataset=file`. What a program answers but does not take, such as a number of epochs, ends with the line to type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, Override

from vecfield_diffusion.config.kinds import Kind
from vecfield_diffusion.config.moved import RENAMED
from vecfield_diffusion.config.overrides import Composer
from vecfield_diffusion.config.schema import Checker, shown
from vecfield_diffusion.errors import UserError

_OPENING, _CLOSING = "[{", "]}"


@dataclass(frozen=True)
class Spelling:
    """The freedoms of a program's command line.

    Args:
        files: groups whose option may also be a file, with the option that reads its `path`:
            `{"mask": "file"}` makes `mask=file mask.path=m.npy` of `mask=m.npy`.
        implied: keys that only one option of their group is meant to have: `{"dataset.path": "dataset=file"}`.
        instead: keys of other programs with the key that is meant: `{"mask": "masks"}`.
        values: other words for values of a key: `{"device": {"gpu": "cuda"}}`.
        answers: the last words of keys that there are not, or groups that were given several options, with what to
            type instead.
        subject: a group that the whole command is about: its `path` stands first, its keys without the name.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    implied: Mapping[str, str] = field(default_factory=dict)
    instead: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    answers: Mapping[str, str] = field(default_factory=dict)
    subject: str | None = None


def joined(arguments: Sequence[str]) -> list[str]:
    """The arguments with those put together that a shell took apart at the spaces of a list: `window=[64, 64]`."""
    result: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if "=" in word and _depth(word) > 0:
            ends = [end for end in range(1, len(rest) + 1) if _depth(" ".join([word, *rest[:end]])) == 0]
            if ends and not any("=" in part for part in rest[: ends[0]]):
                word, rest = " ".join([word, *rest[: ends[0]]]), rest[ends[0] :]
        result.append(word)
    return result


def _depth(text: str) -> int:
    """How many brackets stay open."""
    return sum(text.count(letter) for letter in _OPENING) - sum(text.count(letter) for letter in _CLOSING)


class Reader:
    """Reads the overrides of one command line.

    Args:
        spelling: the freedoms of the program.
        keys: the annotations of the keys outside every group.
        composer: reads and composes overrides.
        multirun: whether several values of a key mean several jobs.

    Attributes:
        notes: what was read freely, a line for each.
    """

    def __init__(self, spelling: Spelling, keys: Mapping[str, str], composer: Composer, multirun: bool) -> None:
        self.spelling, self.composer, self.multirun = spelling, composer, multirun
        self.kinds = Checker(keys).kinds
        self.notes: list[str] = []

    def read(self, arguments: Sequence[str]) -> list[str]:
        """The overrides that are meant. Raises UserError."""
        words = self._renamed(self._of_subject(arguments))
        overrides = [text for word in words for text in self._meant(word)]
        return [*self._implied(overrides), *overrides]

    def _note(self, typed: str, meant: str) -> str:
        self.notes.append(f"note: {typed} is read as {meant}")
        return meant

    def _of_subject(self, arguments: Sequence[str]) -> list[str]:
        subject = self.spelling.subject
        if subject is None or not arguments:
            return list(arguments)
        first, *keys = arguments
        if "=" in first and not Path(first).exists():
            raise UserError(f"{first}: the file comes first, then the keys of {subject}: FILE {first}")
        own = (f"{subject}.", f"{subject}=", "hydra")
        inside = [key if key.startswith(own) else _within(subject, key) for key in keys]
        return [f"{subject}.path={quoted(first)}", *inside]

    def _renamed(self, words: Sequence[str]) -> list[str]:
        """The words with the present names of keys, but for those that an option of the user's own has kept."""
        keys = [word.partition("=")[0].lstrip("+~") for word in words]
        chosen = [word for word, key in zip(words, keys, strict=True) if self.composer.options(key)]
        return [
            self._note(word, word.replace(key, RENAMED[key], 1))
            if key in RENAMED and not self.composer.has(chosen, key)
            else word
            for word, key in zip(words, keys, strict=True)
        ]

    def _meant(self, text: str) -> list[str]:
        override = self.composer.parse(text)
        key = override.key_or_group
        self._refuse_answered(override)
        self._refuse_options(key)
        if "=" in text and key in self.spelling.instead and not self.composer.has([], key):
            return self._meant(self._note(text, f"{self.spelling.instead[key]}={text.partition('=')[2]}"))
        if override.is_delete():
            return [text]
        return self._file(override) or [self._value(text, override)]

    def _refuse_answered(self, override: Override) -> None:
        key = override.key_or_group
        last = key.rpartition(".")[2]
        if last in self.spelling.answers and not self.composer.options(last) and key not in self.kinds:
            if not self.composer.has([], key):
                raise UserError(f"{override.input_line}: {self.spelling.answers[last]}")
        elif key in self.spelling.answers and override.is_sweep_override() and not self.multirun:
            raise UserError(f"{override.input_line} holds several options: {self.spelling.answers[key]}")

    def _refuse_options(self, key: str) -> None:
        """Refuses a key of an option where the program takes the names of options alone."""
        group, _, rest = key.partition(".")
        if rest and group in self.spelling.instead and not self.composer.has([], key):
            several = self.spelling.instead[group]
            raise UserError(
                f"{key}: {several}=[...] takes options as they are. Write one of your own into DIR/{group}/NAME.yaml, "
                f"and add --config-dir DIR '{several}=[NAME]'"
            )

    def _file(self, override: Override) -> list[str]:
        group, value = override.key_or_group, override.value()
        if group not in self.spelling.files or not isinstance(value, str) or value in self.composer.options(group):
            return []
        if not Path(value).suffix and not Path(value).is_file():
            return []
        return [f"{group}={self.spelling.files[group]}", f"{group}.path={override.get_value_string()}"]

    def _value(self, text: str, override: Override) -> str:
        """The override with the value that its key can take."""
        key, value = override.key_or_group, override.value()
        name, _, typed = text.partition("=")
        other = self.spelling.values.get(key, {}).get(str(value).lower())
        if other is not None:
            return self._note(text, f"{name}={other}")
        wanted = self.kinds.get(key)
        if wanted is None:
            return text
        if override.is_sweep_override():
            return self._list(text, override, wanted)
        if not isinstance(value, str | list | dict) and _is_text(wanted, value, typed):
            return f"{name}={quoted(typed)}"
        if isinstance(value, str) and not wanted.takes(value) and wanted.takes([value]):
            return self._note(text, f"{name}=[{typed}]")
        return text

    def _list(self, text: str, override: Override, wanted: Kind) -> str:
        """Several values of a key that takes a list: the list, or with -m a list in each job."""
        sweep, name = override.value(), text.partition("=")[0]
        if not isinstance(sweep, ChoiceSweep) or not sweep.simple_form:
            return text
        choices = [_plain(choice) for choice in sweep.list]
        if any(isinstance(choice, list) for choice in choices):
            return text
        if not self.multirun:
            return self._note(text, f"{name}=[{text.partition('=')[2]}]") if wanted.takes(choices) else text
        if any(map(wanted.takes, choices)) or not wanted.takes(choices[:1]):
            return text
        return self._note(text, f"{name}={','.join(f'[{choice}]' for choice in override.sweep_string_iterator())}")

    def _implied(self, overrides: Sequence[str]) -> list[str]:
        """The options that keys call for where no other one is chosen."""
        found = []
        parsed = [self.composer.parse(text) for text in overrides]
        typed = {override.key_or_group for override in parsed}
        # An experiment may choose the option; keys that there are not are another matter.
        options = [str(override.input_line) for override in parsed if self.composer.options(override.key_or_group)]
        for key, choice in self.spelling.implied.items():
            group = key.partition(".")[0]
            if key not in typed or group in typed:
                continue
            if not self.composer.has(options, key):
                self.notes.append(f"note: {key}= calls for {choice}")
                found.append(choice)
        return found


def quoted(text: str) -> str:
    """A text as the value of an override."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _within(group: str, text: str) -> str:
    """The override of a key of a group: `+x=1` becomes `+group.x=1`."""
    key = text.lstrip("+~")
    return f"{text[: len(text) - len(key)]}{group}.{key}"


def _plain(choice: Any) -> Any:
    """An element of a sweep as a value."""
    return getattr(choice, "text", choice)


def _is_text(wanted: Kind, value: Any, typed: str) -> bool:
    """Whether a word that reads as a number, a truth value or null is meant as text: `name=inf`."""
    if not wanted.takes(typed) or not isinstance(wanted.fit(typed), str):
        return False
    return not wanted.takes(value) or (isinstance(wanted.fit(value), str) and shown(value) != typed)
