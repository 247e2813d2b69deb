"""The jobs of a sweep as Hydra's launchers run them, in this process, in others beside it, or on a cluster."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra._internal import utils
from omegaconf import DictConfig

from vecfield_diffusion.config import sweep
from vecfield_diffusion.config.ending import or_exit, report
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.locks import in_use, owned

#: The sweeper that tries all choices; all others search.
BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


def swept(run: Callable[[], Mapping[str, float] | None], folder: Path, settings: Any, metric: str) -> float | None:
    """Runs a job, unless it is done or another process works on it, and gives its metric.

    Args:
        run: the job.
        folder: where it leaves its result.
        settings: Hydra's.
        metric: the entry of the metrics that a search minimises.

    Raises:
        UserError: a search needs the metric, and another process works on it.
    """
    overrides = [str(text) for text in settings.overrides.task]
    title = f"job {settings.job.num} ({' '.join(overrides)})"
    searched = settings.sweeper._target_ != BASIC
    if in_use(folder / sweep.RESULT):
        print(f"{title}: another process works on it", flush=True)
        if searched:
            raise UserError(f"another process works on {folder}: wait for it, or choose another name=...")
        return None
    with contextlib.ExitStack() as stack:
        or_exit(lambda: stack.enter_context(owned(folder / sweep.RESULT)))
        metrics = or_exit(lambda: sweep.finished(folder, overrides))
        if metrics is None:
            print(f"\n{title}", flush=True)
            metrics = _ended(run, folder, overrides, metric)
        else:
            print(f"{title}: done already", flush=True)
    # A search learns where nothing good is to be found.
    return metrics.get(metric, math.inf if searched else None)


def _ended(
    run: Callable[[], Mapping[str, float] | None], folder: Path, overrides: list[str], metric: str
) -> dict[str, float]:
    """The metrics of a job that is run; none of one that fails. Its result says how it ended."""

    def note(status: str, **entries: Any) -> None:
        or_exit(lambda: sweep.write(folder, overrides, status, **entries))

    note("running")
    try:
        metrics = {key: float(value) for key, value in (run() or {}).items()}
        if not math.isfinite(metrics.get(metric, 0.0)):
            raise UserError(f"the job ended with {metric} = {metrics[metric]}")
    except Exception as error:  # whatever it was, the other jobs go on, and the table says that this one failed
        report(error)
        note("failed", error=" ".join(f"{type(error).__name__}: {error}".split()))
        return {}
    note("done", metrics=metrics)
    return metrics


def seeded(sweeper: DictConfig) -> list[str]:
    """The override that lets a sweeper which searches ask for the same jobs when its sweep is gone on with."""
    sampler = sweeper.get("sampler") or {}
    return ["hydra.sweeper.sampler.seed=0"] if "seed" in sampler and sampler["seed"] is None else []


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Within the block Hydra raises what stops a sweep, and prints no traceback of its own."""
    printing, utils.run_and_report = utils.run_and_report, lambda run: run()
    try:
        yield
    finally:
        utils.run_and_report = printing


def words_of(error: Exception) -> str:
    """What to say where a launcher or a sweeper ended before all jobs had."""
    reason = str(error).strip().split("\n")[0].rstrip(".") or "no reason given"
    return (
        f"the sweep was stopped ({type(error).__name__}: {reason}). Jobs that are still running end by themselves. "
        "HYDRA_FULL_ERROR=1 shows more"
    )
