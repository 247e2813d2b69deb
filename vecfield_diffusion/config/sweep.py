"""A sweep: what each job leaves in its folder, and the table made of it.

Each job writes `result.json`: its overrides, its status and, at the end, its metrics. The table is read from these
files, so that it does not matter which launcher ran the jobs, or whether all of them ran in one go: a job whose
folder already holds its result is not run again, which is how a sweep resumes. A job holds a lock beside its file that
dies with its process: one that has begun and holds it no longer was killed.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vecfield_diffusion.atomic import write_text_atomic
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.locks import in_use

RESULT = "result.json"
TABLE = "results.csv"


def write(folder: Path, overrides: Sequence[str], status: str, **entries: Any) -> None:
    """Writes the state of a job: `status` is `running`, `done` (with `metrics`) or `failed` (with `error`).

    Raises:
        UserError: the file cannot be written.
    """
    state = {"overrides": list(overrides), "status": status} | entries
    _write_whole(folder / RESULT, json.dumps(state, indent=1) + "\n")


def read(folder: Path) -> dict[str, Any] | None:
    """The state of the job in a folder; None where there is none. Raises UserError for a file that is no state."""
    file = folder / RESULT
    if not file.exists():
        return None
    try:
        result = json.loads(file.read_text())
        return {"overrides": [*result["overrides"]], "status": str(result["status"])} | result
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not the result of a job: remove it, or choose another name=...") from None


def finished(folder: Path, overrides: Sequence[str]) -> dict[str, float] | None:
    """The metrics of this very job when it is done already, else None.

    Raises:
        UserError: the folder holds a job with other overrides, whose checkpoints this one would take for its own.
    """
    result = read(folder)
    if result is None:
        return None
    if sorted(result["overrides"]) != sorted(overrides):
        raise UserError(
            f"{folder} holds a job with other overrides ({' '.join(result['overrides']) or 'none'}):"
            " choose another name=... or remove the folder"
        )
    return dict(result["metrics"]) if result["status"] == "done" else None


def rows(sweep: Path, metric: str) -> list[dict[str, Any]]:
    """One row for each job: number, status, overrides, metrics; the lowest value of `metric` first, failures last.

    The status is `done`, `failed`, `running` (in a process that is alive) or `killed`.
    """
    found = []
    for folder in sweep.iterdir() if sweep.is_dir() else ():
        result = read(folder) if folder.name.isdigit() else None
        if result is not None:
            killed = result["status"] == "running" and not in_use(folder / RESULT)
            status = "killed" if killed else result["status"]
            chosen = dict(override.lstrip("+").partition("=")[::2] for override in result["overrides"])
            metrics = result.get("metrics", {})
            row = {"job": int(folder.name), "status": status, "overrides": chosen, "metrics": metrics}
            found.append(row | {"error": result.get("error", "")})

    def order(row: Mapping[str, Any]) -> tuple[bool, float, int]:
        value = row["metrics"].get(metric, math.nan)
        return row["status"] != "done", math.inf if math.isnan(value) else value, row["job"]

    return sorted(found, key=order)


def _columns(found: Sequence[Mapping[str, Any]], part: str) -> list[str]:
    return list(dict.fromkeys(key for row in found for key in row[part]))


def save(sweep: Path, found: Sequence[Mapping[str, Any]]) -> Path:
    """Writes the rows as `results.csv`, numbers in full. Raises UserError."""
    overrides, metrics = _columns(found, "overrides"), _columns(found, "metrics")
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["job", "status", *overrides, *metrics, "error"])
    for row in found:
        chosen = [row["overrides"].get(key, "") for key in overrides]
        values = [row["metrics"].get(key, "") for key in metrics]
        writer.writerow([row["job"], row["status"], *chosen, *values, row["error"]])
    return _write_whole(sweep / TABLE, text.getvalue())


def _write_whole(file: Path, text: str) -> Path:
    advice = "Free some space or mend the folder; the same command then goes on with the jobs that are not done"
    write_text_atomic(file, text, advice)
    return file


def table(found: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The rows for a terminal: what differs between the jobs, the metric that sorts them first."""
    differing = [
        key for key in _columns(found, "overrides") if len({row["overrides"].get(key, "") for row in found}) > 1
    ]
    metrics = sorted(_columns(found, "metrics"), key=lambda key: key != metric)
    lines = [["job", *differing, *metrics, "status"]]
    for row in found:
        values = [f"{row['metrics'][key]:.5g}" if key in row["metrics"] else "-" for key in metrics]
        chosen = [row["overrides"].get(key, "") for key in differing]
        lines.append([str(row["job"]), *chosen, *values, row["status"]])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def summarise(sweep: Path, metric: str) -> bool:
    """Prints the table of a sweep and saves it; whether every job is done."""
    found = rows(sweep, metric)
    if not found:
        return False
    file = save(sweep, found)
    print(f"\n{table(found, metric)}\n\n{len(found)} jobs, saved as {file}", flush=True)
    left = [row for row in found if row["status"] != "done"]
    for row in left:
        print(f"job {row['job']}: {row['error'] or row['status']}")
    if left:
        print("the same command goes on with what is not done")
    return not left
