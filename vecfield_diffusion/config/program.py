"""The programs as Hydra runs them: where the configuration lies, how it is checked, how a run ends.

`Program` makes a `main` of a function `job(config, folder) -> metrics` that knows no Hydra: it gets the configuration
in plain Python, each value as the annotation of its constructor says, and the folder of its run. The function is
named, not passed, so that it is imported, and torch with it, when a job really runs.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from vecfield_diffusion.config import sweep
from vecfield_diffusion.config.overrides import Composer, groups, plain
from vecfield_diffusion.config.schema import Checker
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.threads import wait_passively

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel carries the folder inside the package; a checkout, installed editable or not, has it beside the package.
CONF = next((each for each in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if each.is_dir()), _PACKAGE / "conf")

_NAME = re.compile(r"[\w+-][\w.+-]*(/[\w+-][\w.+-]*)*")
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG}
_BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"

Job = Callable[[dict[str, Any], Path], Mapping[str, float] | None]
Result = TypeVar("Result")


def option(group: str, name: str) -> dict[str, Any]:
    """One option of a group by itself, such as `conf/mask/track.yaml`, checked. Raises UserError."""
    composer = Composer(CONF, None, _overlay())
    composer.refuse_unknown(group, name)
    return Checker().node(plain(composer.compose([f"+{group}={name}"])).get(group, {}), group)


def _overlay() -> str | None:
    """The folder that `--config-dir` named, in a running job."""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else ()
    return next((source.path for source in sources if source.provider == "command-line"), None)


@dataclass(frozen=True)
class _Plan:
    """What the command line asks for: the arguments for Hydra, and the folder where a sweep leaves its table."""

    arguments: list[str]
    sweep: Path | None = None


@dataclass(frozen=True)
class Program:
    """A program: calling it reads the command line, runs the job or the sweep, and exits.

    Args:
        name: the primary configuration, `conf/<name>.yaml`.
        job: `module:function` of the job.
        keys: the annotations of the keys outside every `_target_`, such as `{"seed": "int"}`.
        examples: for a key that must be given, a command that gives it.
        files: groups whose option may also be a file, with the option that reads its `path`:
            `{"mask": "file"}` makes `mask=file mask.path=m.npy` of `mask=m.npy`.
        lists: keys that hold names of options, with their group: `{"masks": "mask"}`.
        metric: the entry of the metrics that sorts the table of a sweep, lower is better.
    """

    name: str
    job: str
    keys: Mapping[str, str]
    examples: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    lists: Mapping[str, str] = field(default_factory=dict)
    metric: str = "loss"

    def __call__(self) -> NoReturn:
        sys.stdout.reconfigure(line_buffering=True)  # what a killed run said is in its log
        wait_passively()
        sys.exit(guarded(self._main))

    def config(self, *overrides: str, complete: bool = True) -> dict[str, Any]:
        """The configuration that a command line gives the job, checked; nothing is run. Raises UserError."""
        composer = Composer(CONF, self.name)
        return self._check(composer.compose(self._with_files(overrides, composer)), composer, complete)

    def _main(self) -> int:
        plan = self._plan(sys.argv[1:])
        sys.argv[1:] = plan.arguments
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=self.name)(self.task)()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        return 0 if plan.sweep is None or sweep.summarise(plan.sweep, self.metric) else 1

    def _plan(self, arguments: list[str]) -> _Plan:
        """Checks the command line and makes the folder of the run. Raises UserError, OSError."""
        flags = _flags(arguments)
        if flags.shell_completion or flags.hydra_help or flags.info or flags.experimental_rerun:
            return _Plan(arguments)
        folder = Path(flags.config_path).absolute() if flags.config_path else CONF
        composer = Composer(folder, flags.config_name or self.name, flags.config_dir)
        overrides = self._with_files(flags.overrides, composer)
        start = next(composer.variants(overrides))
        first = composer.compose(start)
        only_shown = flags.help or flags.cfg is not None
        multirun = flags.multirun or first.hydra.mode == RunMode.MULTIRUN
        _refuse_sweeps(overrides, composer, multirun, first.hydra.sweeper._target_ == _BASIC)
        params = first.hydra.sweeper.get("params") if multirun else None
        for variant in composer.variants(overrides, params):
            composed = first if variant == start else composer.compose(variant)
            self._check(composed, composer, complete=not only_shown)
        plan = [*_without(arguments, flags.overrides), *overrides]
        if only_shown:
            return _Plan(plan)
        target = Path(first.hydra.sweep.dir if multirun else first.hydra.run.dir)
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the folder {target} cannot be made: {error.strerror}") from error
        if not multirun:
            return _Plan(plan)
        # Pinned, for a job whose own choices set another name would leave its result where no table is made.
        quoted = str(target).replace("\\", "\\\\").replace("'", "\\'")
        return _Plan([*plan, f"hydra.sweep.dir='{quoted}'"], target)

    def _with_files(self, overrides: Sequence[str], composer: Composer) -> list[str]:
        result = []
        for text in overrides:
            override = composer.parse(text)
            group, value = override.key_or_group, override.value()
            named = group in self.files and isinstance(value, str) and value not in composer.options(group)
            if named and (Path(value).suffix or Path(value).is_file()):
                result += [f"{group}={self.files[group]}", f"{group}.path={override.get_value_string()}"]
            else:
                result.append(text)
        return result

    def _check(self, config: DictConfig, composer: Composer, complete: bool) -> dict[str, Any]:
        known = groups(config.hydra.runtime.choices) | set(composer.all_groups())
        checked = self._checked(plain(config), known, complete)
        for key, group in self.lists.items():
            for name in checked.get(key) or ():
                composer.refuse_unknown(group, name)
        return checked

    def _checked(self, config: dict[str, Any], known: set[str], complete: bool = True) -> dict[str, Any]:
        checked = Checker(self.keys, known, self.examples, complete).root(config)
        name = checked.get("name")
        if name is not None and not _NAME.fullmatch(str(name)):
            raise UserError(f"name={name}: a folder is called so: expected letters, digits and . _ - + only")
        return checked

    # In the job's process, which may be another one than that of the sweep.

    def task(self, config: DictConfig) -> float | None:
        """What Hydra calls for each job."""
        settings = HydraConfig.get()
        folder = Path(settings.runtime.output_dir)
        folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder

        def run() -> Mapping[str, float] | None:
            checked = self._checked(plain(config), groups(settings.runtime.choices))
            return _import(self.job)(checked, folder)

        if settings.mode == RunMode.MULTIRUN:
            return self._swept(run, folder, settings)
        _alone(run, folder)
        return None

    def _swept(self, run: Callable[[], Mapping[str, float] | None], folder: Path, settings: Any) -> float | None:
        overrides = [str(each) for each in settings.overrides.task]
        title = f"job {settings.job.num} ({' '.join(overrides)})"

        def note(status: str, **entries: Any) -> None:
            _or_exit(lambda: sweep.write(folder, overrides, status, **entries))

        metrics = _or_exit(lambda: sweep.finished(folder, overrides))
        if metrics is not None:
            print(f"{title}: done already", flush=True)
            return metrics.get(self.metric)
        print(f"\n{title}", flush=True)
        note("running")
        try:
            metrics = self._scores(run())
        except Exception as error:  # whatever it was, the other jobs go on, and the table says that this one failed
            _report(error)
            note("failed", error=" ".join(f"{type(error).__name__}: {error}".split()))
            if settings.sweeper._target_ != _BASIC:
                raise  # a sweeper that searches must know
            return None
        note("done", metrics=metrics)
        return metrics.get(self.metric)

    def _scores(self, metrics: Mapping[str, float] | None) -> dict[str, float]:
        scores = {key: float(value) for key, value in (metrics or {}).items()}
        if not math.isfinite(scores.get(self.metric, 0.0)):
            raise UserError(f"the job ended with {self.metric} = {scores[self.metric]}")
        return scores


def _import(job: str) -> Job:
    module, _, function = job.partition(":")
    return getattr(importlib.import_module(module), function)


def _alone(run: Callable[[], Any], folder: Path) -> None:
    """Runs a single job; where it fails with a message, a folder that it left empty goes."""
    try:
        _or_exit(run)
    except SystemExit:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise


def _or_exit(run: Callable[[], Result]) -> Result:
    """What `run` gives. Where it ends with a message, so does the program, past Hydra's traceback.

    In a sweep the other jobs would meet the same: the folder of another sweep, a full disk.
    """
    results: list[Result] = []

    def once() -> int:
        results.append(run())
        return 0

    if code := guarded(once):
        raise SystemExit(code)
    return results[0]


# The command line.


def _flags(arguments: list[str]) -> Any:
    """Hydra's own flags, before or after the overrides."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; what is set on the command line is key=value, flags are in --help")

    parser.error = refuse
    return parser.parse_intermixed_args(arguments)


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
            raise UserError(
                f"{override.input_line} holds several values: add -m to run each, or write"
                f" {override.get_key_element()}=[...] for a list"
            )
        if override.key_or_group == "name":
            raise UserError(f"{override.input_line}: a sweep has one name, its jobs are numbered")
        if basic and override.is_interval_sweep():
            raise UserError(f"{override.input_line}: an interval is for a sweeper that searches: hydra/sweeper=optuna")


# How a run ends.


def guarded(run: Callable[[], int]) -> int:
    """Runs, and turns what only the user can mend into one message: gives the exit code.

    `UserError` and a disk or folder that refuses to be written end with 1, Ctrl-C with 130. Any other exception is
    an error of the program and keeps its traceback.
    """
    try:
        return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `--help | head`: nobody reads on, not even what is left in the buffer
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        if not _is_message(error):
            raise
        _report(error)
        return 1


def _is_message(error: Exception) -> bool:
    return isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in _REFUSED)


def _report(error: Exception) -> None:
    """One line for what the user can mend, a traceback for the rest, or for all with HYDRA_FULL_ERROR=1."""
    if not _is_message(error) or os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exception(error)
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
    else:
        print(f"error: {error}", file=sys.stderr)
