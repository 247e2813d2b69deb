"""The command line, checked before anything runs: every mistake is one line that names the nearest right thing.

Hydra composes the configuration; this module composes it once before, and where that fails, finds out which of the
overrides is to blame. In a sweep every choice of every swept key is tried once, beside the first choices of the
others: the sum of the choices, not their product.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from glob import escape, glob
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vecfield_diffusion.errors import UserError, nearest


def plain(config: DictConfig) -> dict[str, Any]:
    """The application's part of a composed configuration in plain Python, interpolations resolved.

    Raises:
        UserError: an interpolation leads nowhere.
    """
    part = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    try:
        return OmegaConf.to_container(part, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error)) from error


def groups(choices: Iterable[object]) -> set[str]:
    """The top-level keys that options fill, from the groups of `hydra.runtime.choices`."""
    tops = {str(key).partition("@")[2].partition(".")[0] or str(key).partition("/")[0] for key in choices}
    return tops - {"hydra"}


# In Hydra a group set to null is a ValueError, and a key added within null an AssertionError.
_FAILURES = (HydraException, OmegaConfBaseException, ValueError, AssertionError)


class Composer:
    """Composes configurations as Hydra does, with messages of our own.

    Args:
        folder: the folder of the configurations.
        name: the primary configuration; None for single options.
        extra: a second folder (`--config-dir`) that adds options.

    Attributes:
        folders: where options lie, the first one first.
    """

    def __init__(self, folder: Path, name: str | None, extra: str | None = None) -> None:
        setup_globals()
        search = create_config_search_path(str(folder))
        if extra is not None:
            if not Path(extra).is_dir():
                raise UserError(f"--config-dir {extra}: there is no such folder")
            anchor = SearchPathQuery(provider="schema")
            search.prepend(provider="command-line", path=f"file://{Path(extra).absolute()}", anchor=anchor)
        self.name = name
        self.folders = [Path(folder) for folder in (extra, folder) if folder is not None]
        self.loader = ConfigLoaderImpl(config_search_path=search)
        self.parser = OverridesParser.create(config_loader=self.loader)

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """The configuration with Hydra's own node.

        Raises:
            UserError: an override is at fault, or a configuration file.
        """
        parsed = [self.parse(text) for text in overrides]
        try:
            return self._load(overrides)
        except _FAILURES as error:
            self._blame_options(parsed)
            self._blame_keys(parsed)
            raise UserError(_one_line(error)) from error

    def _load(self, overrides: Sequence[str]) -> DictConfig:
        return self.loader.load_configuration(self.name, list(overrides), run_mode=RunMode.RUN)

    def parse(self, text: str) -> Override:
        """One override. Raises UserError where it cannot be read."""
        try:
            return self.parser.parse_overrides([text])[0]
        except OverrideParseException as error:
            if "=" not in text:
                raise UserError(f"cannot read '{text}': what is set on the command line is key=value") from error
            raise UserError(
                f"cannot read '{text}': a value that holds one of = , : [ ] {{ }} ( ) or a quote is itself quoted,"
                " as in 'key=\"a=b\"'"
            ) from error

    def variants(self, overrides: Sequence[str], params: Mapping[str, Any] | None = None) -> Iterator[list[str]]:
        """The command lines of single jobs that try every choice of every swept key; first the first choice of each.

        Args:
            overrides: the command line.
            params: what the sweeper sweeps over by configuration (`hydra.sweeper.params`).
        """
        parsed = [self.parse(text) for text in overrides]
        given = {override.get_key_element() for override in parsed}
        parsed += [self.parse(f"{key}={value}") for key, value in (params or {}).items() if key not in given]
        choices = [self._choices(override) for override in parsed]
        first = [texts[0] for texts in choices]
        yield first
        for index, texts in enumerate(choices):
            for choice in texts[1:]:
                yield [*first[:index], choice, *first[index + 1 :]]

    def _choices(self, override: Override) -> list[str]:
        if not override.is_sweep_override():
            return [str(override.input_line)]
        value = override.value()
        if isinstance(value, IntervalSweep):
            texts: Iterable[str] = [str(value.start), str(value.end)]
        else:
            texts = override.sweep_string_iterator()
        found = [f"{override.get_key_element()}={text}" for text in texts]
        if not found:
            raise UserError(f"{override.input_line}: there is nothing to sweep over")
        return found

    def options(self, group: str) -> list[str]:
        """The options of a group; none where there is no such group."""
        if group.startswith("hydra"):
            return self.loader.get_group_options(group)
        # Hydra looks into its own packages too, which takes most of the time that a command needs to be read.
        return sorted(
            {Path(file).stem for folder in self.folders for file in glob(f"{escape(f'{folder}/{group}')}/*.yaml")}
        )

    def nodes(self, group: str) -> dict[str, Any]:
        """Every option of a group by its name, as it is composed by itself. Raises UserError."""
        return _nodes(tuple(self.folders), group)

    def file(self, group: str, name: str) -> Path | None:
        """Where an option lies; the empty group holds the primary configurations."""
        files = [folder / group / f"{name}.yaml" for folder in self.folders]
        return next((file for file in files if file.is_file()), None)

    def has(self, overrides: Sequence[str], path: str) -> bool:
        """Whether the configuration that overrides give has a key; also where they are at fault."""
        try:
            return _present(self._load(overrides), path)
        except _FAILURES:
            return True

    def refuse_unknown(self, group: str, name: Any) -> None:
        """Raises UserError unless `name` is an option of the group."""
        options = self.options(group)
        if name not in options:
            text = "null" if name is None else name
            hint = nearest(str(text), options) + _plugin(group)
            raise UserError(f"{group}={text}: there is no such option.{hint} Options: {', '.join(options)}.")

    def all_groups(self) -> list[str]:
        """The groups of options at the top level."""
        found = {Path(group).name for folder in self.folders for group in glob(f"{escape(str(folder))}/*/")}
        return sorted(found - {"hydra"})

    def _blame_options(self, parsed: Sequence[Override]) -> None:
        """Raises UserError for the first override that chooses an option which a group does not have."""
        chosen = self._groups()
        for override in parsed:
            group = override.key_or_group
            if self.options(group) and chosen and group not in chosen and not group.startswith("hydra/"):
                raise UserError(f"{group}: there is no such group here. The groups are: {', '.join(sorted(chosen))}.")
            if not self.options(group):
                if "/" in group or override.package is not None:
                    raise UserError(f"{group}: there is no such group of options.{nearest(group, self._known(group))}")
                continue
            value = override.value()
            for choice in value if isinstance(value, list) else [value]:
                if not override.is_delete():
                    self.refuse_unknown(group, choice)

    def _groups(self) -> set[str]:
        """The groups that the primary configuration chooses from; none where it cannot be composed."""
        try:
            return groups(self._load([]).hydra.runtime.choices)
        except _FAILURES:
            return set()

    def _known(self, group: str) -> list[str]:
        owner = group.rpartition("/")[0]
        inner = [f"{owner}/{name}" for name in self.loader.list_groups(owner)] if owner else []
        return [*self.all_groups(), *inner]

    def _blame_keys(self, parsed: Sequence[Override]) -> None:
        """Raises UserError for the first override of a key that is not there, or added though it is."""
        kept = [override for override in parsed if self.options(override.key_or_group)]
        try:
            config = self._load([str(override.input_line) for override in kept])
        except _FAILURES:
            return  # no key is to blame
        for override in parsed:
            if override in kept:
                continue
            present = _present(config, override.key_or_group)
            if override.is_add() and present:
                key, value = override.key_or_group, override.get_value_string()
                raise UserError(f"{key} is in the configuration already: write {key}={value}")
            if not present and not override.is_add() and not override.is_force_add():
                raise self._unknown(config, override.key_or_group)

    def _unknown(self, config: DictConfig, path: str) -> UserError:
        """The message for a key that is not there: the nearest in the whole configuration, and its neighbours."""
        owner = path.rpartition(".")[0]
        inside = OmegaConf.select(config, owner) if owner else config
        where = f" of {owner}" if owner else ""
        names = inside if isinstance(inside, DictConfig) else ()
        beside = sorted(str(key) for key in names if key not in ("hydra", "_target_"))
        listed = f" The keys{where} are: {', '.join(beside)}." if beside else f" There are no keys{where}."
        if owner and not _present(config, owner):
            listed = ""
        holders = [name for name, node in self.nodes(owner).items() if path.rpartition(".")[2] in node] if owner else []
        hint = f" It is a key of {owner}={', '.join(holders)}." if holders else ""
        hint = hint or _nearest_path(path, config, beside, self.all_groups())
        return UserError(f"unknown key {path}.{hint}{listed}")


@functools.cache
def _nodes(folders: tuple[Path, ...], group: str) -> dict[str, Any]:
    """The options of a group, composed side by side; files are taken not to change while a program runs."""
    composer = Composer(folders[-1], None, str(folders[0]) if len(folders) > 1 else None)
    names = composer.options(group)
    places = [f"+{group}@options.o{number}={name}" for number, name in enumerate(names)]
    composed = plain(composer.compose(places)).get("options", {})
    return {name: composed.get(f"o{number}", {}) for number, name in enumerate(names)}


def _nearest_path(path: str, config: DictConfig, beside: Sequence[str], names: Sequence[str]) -> str:
    """` Did you mean ...?`: a key beside it, else one of the same name elsewhere, else any that looks like it."""
    owner, _, last = path.rpartition(".")
    prefix = f"{owner}." if owner else ""
    if hint := nearest(path, [prefix + key for key in beside] if nearest(last, beside) else []):
        return hint
    paths = [key for key in _paths(config) if not key.startswith("hydra.")]
    same = [key for key in paths if key.rpartition(".")[2] == last]
    others = [key for key in (*paths, *names) if not path.startswith(key)]
    return f" Did you mean '{same[0]}'?" if same else nearest(path, others)


def _paths(config: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys."""
    if isinstance(config, DictConfig) and not config._is_none():
        for key in config:
            if key == "_target_":
                continue
            yield f"{prefix}{key}"
            yield from _paths(config._get_node(key), f"{prefix}{key}.")


def _present(config: DictConfig, path: str) -> bool:
    """Whether a configuration has a key, be its value null or missing."""
    owner, _, last = path.rpartition(".")
    inside = OmegaConf.select(config, owner) if owner else config
    return isinstance(inside, DictConfig) and last in [str(key) for key in inside]


def _plugin(group: str) -> str:
    """How to get more launchers and sweepers."""
    if group in ("hydra/launcher", "hydra/sweeper"):
        return " More come with: pip install 'vecfield-diffusion[sweep]'."
    return ""


def _one_line(error: BaseException) -> str:
    """What an error and its causes say, without Hydra's advice to add what is not there."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    texts = dict.fromkeys(" ".join(str(cause).partition("To append to your")[0].split()) for cause in causes)
    return ": ".join(text for text in texts if text)
