"""The programs as Hydra runs them: where the configuration lies, how it is checked, how a run ends.

`Program` makes a `main` of a function `job(config, folder) -> metrics` that knows no Hydra: it gets the configuration
in plain Python, each value as the annotation of its constructor says, and the folder of its run. Options that the job
may choose from stand resolved in `config["options"][group][name]`. The function is named, not passed, so that it is
imported, and torch with it, when a job really runs.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal import utils
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from vecfield_diffusion import __version__
from vecfield_diffusion.config import sweep
from vecfield_diffusion.config.ending import guarded, or_exit
from vecfield_diffusion.config.help import Help
from vecfield_diffusion.config.jobs import BASIC, raising, seeded, swept, words_of
from vecfield_diffusion.config.moved import say_once
from vecfield_diffusion.config.naming import name_of
from vecfield_diffusion.config.overrides import Composer, groups, plain
from vecfield_diffusion.config.schema import Checker
from vecfield_diffusion.config.spelling import Reader, Spelling, joined, quoted
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.ranks import rank, world_size
from vecfield_diffusion.resources import resource
from vecfield_diffusion.threads import wait_passively

CONF = resource("conf")
#: The reserved key of a configuration under which whole groups of options stand.
OPTIONS = "options"

_NAME = re.compile(r"[\w+-][\w.+-]*(/[\w+-][\w.+-]*)*")

Job = Callable[[dict[str, Any], Path], Mapping[str, float] | None]


def option(group: str, name: str) -> dict[str, Any]:
    """One option of a group by itself, such as `conf/mask/track.yaml`, checked. Raises UserError.

    To be deleted: a job finds it in `config["options"]`.
    """
    composer = Composer(CONF, None, _sources().get("command-line"))
    composer.refuse_unknown(group, name)
    return Checker().node(plain(composer.compose([f"+{group}={name}"])).get(group, {}), group)


def _sources() -> dict[str, str]:
    """The folders of configurations in a running job: `main`, and `command-line` for that of `--config-dir`."""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else ()
    return {source.provider: source.path for source in sources if source.schema == "file"}


@dataclass(frozen=True)
class _Plan:
    """What the command line asks for.

    Attributes:
        arguments: those for Hydra; None where it has nothing to do.
        sweep: the folder where a sweep leaves its table.
        config: the configuration of a command that leaves no folder of its own.
    """

    arguments: list[str] | None
    sweep: Path | None = None
    config: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program: calling it reads the command line, runs the job or the sweep, and exits.

    Args:
        name: the primary configuration, `conf/<name>.yaml`.
        job: `module:function` of the job.
        keys: the annotations of the keys outside every `_target_`, such as `{"seed": "int"}`.
        examples: for a key that must be given, a command that gives it.
        lists: keys that hold names of options, with their group: `{"masks": "mask"}`.
        resolves: groups of which the job gets every option, resolved, in `config["options"]`.
        spelling: the freedoms of the command line.
        free: keys that results do not depend on: where no `name=` is given, it is made of all others; None where the
            configuration has a name.
        metric: the entry of the metrics that sorts the table of a sweep, lower is better.
        folder: whether a run has a folder of its own, and may be part of a sweep; else the job writes where it says.
    """

    name: str
    job: str
    keys: Mapping[str, str]
    examples: Mapping[str, str] = field(default_factory=dict)
    lists: Mapping[str, str] = field(default_factory=dict)
    resolves: Sequence[str] = ()
    spelling: Spelling = field(default_factory=Spelling)
    free: Sequence[str] | None = None
    metric: str = "loss"
    folder: bool = True

    def __call__(self) -> NoReturn:
        sys.stdout.reconfigure(line_buffering=True)  # what a killed run said is in its log
        wait_passively()
        with contextlib.ExitStack() as stack:
            if rank() > 0:  # of several processes the first one speaks
                sys.stdout = stack.enter_context(open(os.devnull, "w"))
            sys.exit(guarded(self._main))

    def config(self, *overrides: str, complete: bool = True) -> dict[str, Any]:
        """The configuration that a command line gives the job, checked; nothing is run. Raises UserError."""
        composer = Composer(CONF, self.name)
        reader = Reader(self.spelling, self.keys, composer, multirun=False)
        meant = self._named(reader.read(joined(overrides)), composer)
        for note in reader.notes:
            say_once(note)
        return self._check(composer.compose(meant), composer, complete)

    def _main(self) -> int:
        plan = self._plan(joined(sys.argv[1:]))
        if plan.config is not None:
            _import(self.job)(plan.config, Path("outputs") / self.name)
        if plan.arguments is None:
            return 0
        sys.argv[1:] = plan.arguments
        run = hydra.main(version_base="1.3", config_path=str(CONF), config_name=self.name)(self.task)
        return _code(run) if plan.sweep is None else self._run_all(run, plan.sweep)

    def _run_all(self, run: Callable[[], Any], folder: Path) -> int:
        """Runs the jobs of a sweep and prints their table, also where what launches them was stopped."""
        stopped = None
        try:
            with raising():
                if code := _code(run):
                    return code
        except Exception as error:  # of a launcher or a sweeper: a job that was killed, a search without any result
            stopped = error
        done = sweep.summarise(folder, self.metric)
        if stopped is not None:
            raise UserError(words_of(stopped)) from stopped
        return 0 if done else 1

    def _plan(self, arguments: list[str]) -> _Plan:
        """Checks the command line, answers questions, and makes the folder of the run. Raises UserError, OSError."""
        if "--version" in arguments:
            print(f"vecfield-diffusion {__version__}")
            return _Plan(None)
        flags = _flags(arguments)
        if flags.shell_completion or flags.hydra_help or flags.info or flags.experimental_rerun:
            return _Plan(arguments)
        folder = Path(flags.config_path).absolute() if flags.config_path else CONF
        composer = Composer(folder, flags.config_name or self.name, flags.config_dir)
        if flags.help or (self.spelling.subject is not None and not flags.overrides and flags.cfg is None):
            print(self._help(flags.overrides, composer))
            return _Plan(None)
        return self._plan_run(arguments, flags, composer)

    def _plan_run(self, arguments: list[str], flags: Any, composer: Composer) -> _Plan:
        reader = Reader(self.spelling, self.keys, composer, flags.multirun)
        overrides = self._named(reader.read(flags.overrides), composer)
        start = next(composer.variants(overrides))
        first = composer.compose(start)
        multirun = flags.multirun or first.hydra.mode == RunMode.MULTIRUN
        _refuse_sweeps(overrides, composer, multirun, first.hydra.sweeper._target_ == BASIC)
        if multirun and world_size() > 1:
            raise UserError(
                "-m: each process of torchrun would run all jobs. Start them without it, with trainer.devices=N "
                "processes each"
            )
        if multirun and not self.folder:
            raise UserError("-m: this command runs once; sweeps are for train, infer and evaluate")
        only_shown = flags.cfg is not None
        if multirun and only_shown:
            raise UserError("-m and --cfg: what is shown is one configuration. Leave one of them out")
        params = first.hydra.sweeper.get("params") if multirun else None
        for variant in composer.variants(overrides, params):
            composed = first if variant == start else composer.compose(variant)
            checked = self._check(composed, composer, complete=not only_shown)
        plan = [*_without(arguments, flags.overrides), *overrides, *(seeded(first.hydra.sweeper) if multirun else ())]
        if only_shown:
            return _Plan(plan)
        for note in reader.notes:
            print(note)
        if not self.folder:
            return _Plan(None, config=checked)
        target = _made(Path(first.hydra.sweep.dir if multirun else first.hydra.run.dir))
        if not multirun:
            return _Plan(plan)
        # Pinned, for a job whose own choices set another name would leave its result where no table is made.
        return _Plan([*plan, f"hydra.sweep.dir={quoted(str(target))}"], target)

    def _named(self, overrides: list[str], composer: Composer) -> list[str]:
        """The overrides with a name made of them, where there is none."""
        if self.free is None or any(composer.parse(text).key_or_group == "name" for text in overrides):
            return overrides
        name = name_of(overrides, composer, self.free)
        return [*overrides, f"name={quoted(name)}"] if name else overrides

    def _help(self, typed: Sequence[str], composer: Composer) -> str:
        """The help, or with words beside it what is known of each. Raises UserError."""
        words = [text for text in typed if "=" not in text and not text.startswith("~")]
        given = [text for text in typed if text not in words]
        if self.spelling.subject is not None:  # neither the file nor its keys matter
            words, given = [word for word in words if not Path(word).suffix and not Path(word).exists()], []
        composed = composer.compose(Reader(self.spelling, self.keys, composer, multirun=False).read(given))
        chosen = {str(key): str(name) for key, name in composed.hydra.runtime.choices.items()}
        text = Help(
            composer,
            Checker(self.keys),
            plain(composed),
            {key: name for key, name in chosen.items() if "/" not in key and "@" not in key},
            header=composed.hydra.help.header,
            subject=self.spelling.subject,
        )
        return "\n\n".join(map(text.explain, words)) if words else text.overview()

    def _check(self, config: DictConfig, composer: Composer, complete: bool) -> dict[str, Any]:
        known = groups(config.hydra.runtime.choices) | set(composer.all_groups())
        return self._checked(plain(config), known, composer, complete)

    def _checked(
        self, config: dict[str, Any], known: set[str], composer: Composer, complete: bool = True
    ) -> dict[str, Any]:
        """The configuration with each value as its constructor receives it, and the options. Raises UserError."""
        if OPTIONS in config:
            raise UserError(f"unknown key {OPTIONS}: it is kept for the options of the groups")
        checked = Checker(self.keys, known, self.examples, complete).root(config)
        name = checked.get("name")
        if name is not None and not _NAME.fullmatch(str(name)):
            raise UserError(f"name={name}: a folder is called so: expected letters, digits and . _ - + only")
        options = self._options(composer)
        for key, group in self.lists.items():
            for option_name in checked.get(key) or ():
                composer.refuse_unknown(group, option_name)
                Checker().node(options[group][option_name], group)
        return checked | {OPTIONS: options} if options else checked

    def _options(self, composer: Composer) -> dict[str, dict[str, Any]]:
        """Every option of the groups that the job chooses from; what is missing in one may stay missing."""
        checker = Checker(complete=False)
        wanted = dict.fromkeys([*self.resolves, *self.lists.values()])
        return {
            group: {name: checker.node(node, group) for name, node in composer.nodes(group).items()} for group in wanted
        }

    # In the job's process, which may be another one than that of the sweep.

    def task(self, config: DictConfig) -> float | None:
        """What Hydra calls for each job."""
        settings = HydraConfig.get()
        folder = Path(settings.runtime.output_dir)
        folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder

        def run() -> Mapping[str, float] | None:
            places = _sources()
            composer = Composer(Path(places.get("main", CONF)), self.name, places.get("command-line"))
            checked = self._checked(plain(config), groups(settings.runtime.choices), composer)
            return _import(self.job)(checked, folder)

        if settings.mode == RunMode.MULTIRUN:
            return swept(run, folder, settings, self.metric)
        _alone(run, folder)
        return None


def _code(run: Callable[[], Any]) -> int:
    """The exit code of what Hydra runs."""
    try:
        run()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _import(job: str) -> Job:
    module, _, function = job.partition(":")
    return getattr(importlib.import_module(module), function)


def _alone(run: Callable[[], Any], folder: Path) -> None:
    """Runs a single job; where it fails with a message, a folder that it left empty goes."""
    try:
        or_exit(run)
    except SystemExit:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise


# The command line.


def _flags(arguments: list[str]) -> Any:
    """Hydra's own flags, before or after the overrides."""
    parser = utils.get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; what is set on the command line is key=value, flags are in --help")

    parser.error = refuse
    return parser.parse_intermixed_args(arguments)


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made: {error.strerror}") from error
    return folder


def _without(arguments: list[str], overrides: list[str]) -> list[str]:
    rest = list(arguments)
    for override in overrides:
        rest.remove(override)
    return rest


def _refuse_sweeps(overrides: list[str], composer: Composer, multirun: bool, basic: bool) -> None:
    """A key with several values is swept with -m alone; the name, which is the sweep's folder, never."""
    for override in map(composer.parse, overrides):
        if not override.is_sweep_override():
            continue
        if not multirun:
            key = override.get_key_element()
            as_list = "" if composer.options(override.key_or_group) else f", or write {key}=[...] for a list"
            raise UserError(f"{override.input_line} holds several values: add -m to run each{as_list}")
        if override.key_or_group == "name":
            raise UserError(f"{override.input_line}: a sweep has one name, its jobs are numbered")
        if basic and override.is_interval_sweep():
            raise UserError(f"{override.input_line}: an interval is for a sweeper that searches: hydra/sweeper=optuna")
