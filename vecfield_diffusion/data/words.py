"""How messages name the options of a source: as the command that opens it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Words:
    """The spellings of one command.

    Arguments:
        usual: An option with its value, such as `dataset.{}={}`.
        special: Options, or one with its value, that are called otherwise; `components` are u and v in one.
    """

    usual: str
    special: Mapping[str, str] = field(default_factory=dict)

    def say(self, option: str, *values: object) -> str:
        """The option with its value or values."""
        for name in (f"{option}={values[0]}", option):
            if name in self.special:
                return self.special[name].format(*values)
        return self.usual.format(option, *values)


TRAINING = Words("dataset.{}={}", {"components": "dataset.u={} dataset.v={}"})
#: `infer.py`: what it does not take can be said in Python, of the fields to be filled.
INPUT = Words(
    "vf.open(FILE, {}={})",
    {
        "path": "input={}",
        "u": "names=[{},V]",
        "v": "names=[U,{}]",
        "components": "names=[{},{}]",
        "components=...": "names=[U,V]",
        "quality": "quality={}",
        "land=zero": "zeros=land",
        "land=gap": "zeros=gaps",
    },
)
_WORDS = ContextVar("words", default=TRAINING)


@contextmanager
def called(words: Words) -> Iterator[None]:
    """Messages in the block name the options of a source by these words."""
    token = _WORDS.set(words)
    try:
        yield
    finally:
        _WORDS.reset(token)


def option(name: str, value: object = "...") -> str:
    """An option of a source with its value, such as `dataset.dx=...`."""
    return _WORDS.get().say(name, value)


def components(u: object = "...", v: object = "...") -> str:
    """The options that name both components, such as `dataset.u=... dataset.v=...`."""
    return _WORDS.get().say("components", u, v)
