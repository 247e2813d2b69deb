"""`python infer.py`: fills gaps with an ensemble, or draws fields from nothing.

The fields are made by `programs/fill.py`, which the library calls as well; here they become files: `fields.nc`, the
scores where the truth is known, and a picture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vecfield_diffusion import progress
from vecfield_diffusion.atomic import write_text_atomic
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.metrics import sums
from vecfield_diffusion.evaluation.physical import divergence_squares
from vecfield_diffusion.evaluation.scores import columns, derive
from vecfield_diffusion.evaluation.tables import table
from vecfield_diffusion.inference.cases import Cases
from vecfield_diffusion.inference.files import FieldsWriter, check_claim, key_of, member_paths
from vecfield_diffusion.inference.likelihood import nats_per_value
from vecfield_diffusion.inference.locks import shared
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs.fill import opened
from vecfield_diffusion.programs.filling import Filling
from vecfield_diffusion.programs.gaussian import Series
from vecfield_diffusion.programs.layout import key, layout
from vecfield_diffusion.programs.pictures import Files, animate, draw_first, write_page
from vecfield_diffusion.programs.source import files_behind
from vecfield_diffusion.programs.thermodynamics import thermodynamics
from vecfield_diffusion.ranks import together
from vecfield_diffusion.signals import stoppable


def infer(config: dict[str, Any], folder: Path) -> dict[str, float]:
    """Fills the gaps of chosen snapshots, writes fields, scores and a picture, and returns the scores.

    Snapshots are filled a few at a time, and each is kept as soon as it is: the same command goes on where an
    interrupted one stopped.

    Raises:
        UserError: A checkpoint, file or option that does not fit, or a result of another command in the way.
        SystemExit: A signal stopped the run (130 for Ctrl-C, 143 for SIGTERM); what was finished is kept.
    """
    with stoppable(lambda: "nothing is filled yet"):
        filling, work = opened(config)
    files = Files.of(config, folder)
    output = layout(filling, split=config["split"])
    if files.fields.resolve() in [file.resolve() for file in files_behind(filling.fields)]:
        raise UserError(f"output={files.fields}: this is the input, which is never written over. Give another file")
    alone = member_paths(files.fields, config["members"]) if config["split"] else []
    with shared(files.fields, key(filling), files.scores, files.picture, *alone) as share:
        if not config["overwrite"]:
            check_claim(files.fields, key(filling))
        if made_together(files, key(filling)):
            share.finish()
        writer = FieldsWriter.of(files.fields, output, key(filling), share)
        with stoppable(lambda: f"{len(writer.done())} of {len(filling.indices)} snapshots are kept"):
            further = {} if share.finished else work(writer)
            with share.claim("result", wait=True) as ours:
                if ours:
                    assemble(filling, files, writer, further)
                    share.finish()
    names = [files.fields.name, *([f"{alone[0].name} to {alone[-1].name}"] if alone else [])]
    print(f"{files.fields.parent}: {', '.join([*names, files.scores.name, files.picture.name])}")
    return kept_scores(files)


def made_together(files: Files, key: str) -> bool:
    """Returns whether the result is there, made by processes that were started together with this one."""
    return together() and files.fields.exists() and key_of(files.fields) == key and files.scores.exists()


def assemble(filling: Filling | Series, files: Files, writer: FieldsWriter, further: Mapping[str, Any]) -> None:
    """Scores what was filled, writes the fields, the scores and a picture, and prints the scores.

    Arguments:
        filling: What was filled.
        files: What is written.
        writer: Has all snapshots.
        further: Scores of another kind.
    """
    results, drawn = score_filled(filling, writer)
    if files.moves:
        animate(filling, files.picture, writer)
    if files.is_page:
        write_page(filling, files.picture, writer)
    writer.assemble()
    written = without_nan(results | further)
    if filling.config["thermodynamics"]:
        written["thermodynamics"] = thermodynamics(filling, drawn[0], files.paths)
    write_text_atomic(files.scores, json.dumps(written, indent=2) + "\n")
    say(filling, results)
    if not (files.moves or files.is_page):
        draw_first(filling, files.picture, *drawn)
    writer.clear()


def kept_scores(files: Files) -> dict[str, float]:
    """Returns the scores of hidden cells that were written, those without a value as NaN."""
    found = json.loads(files.scores.read_text(encoding="utf-8")).get("hidden", {})
    return {name: math.nan if value is None else value for name, value in found.items()}


def score_filled(filling: Filling | Series, writer: FieldsWriter) -> tuple[dict[str, Any], tuple[Cases, Tensor]]:
    """Returns the scores of all that was filled, and the first case with its members, to be drawn."""
    judged, nats, drawn = Judged(filling.grid), {}, None
    for block in writer.blocks:
        cases, members = filling.cases(block.positions), torch.from_numpy(block.members)
        judged.add(members, cases)
        drawn = drawn or (cases, members[:, 0])
        if filling.config["likelihood"] != "none":
            nats |= zip(map(str, cases.numbers), likelihood(filling, cases).tolist(), strict=True)
    results: dict[str, Any] = judged.results()
    if nats:
        results["all"]["log_likelihood"] = sum(nats.values()) / len(nats)
        results["log_likelihood"] = nats
    return results, drawn


def likelihood(filling: Filling, cases: Cases) -> Tensor:
    """Returns the log-likelihood `(N,)` of the true fields in nats per value.

    Raises:
        UserError: There are no values that were not observed.
    """
    if not cases.hidden.any():
        raise UserError("likelihood is that of values which were not observed, and there are none: add mask=none")
    config, denoiser = filling.config, filling.trained.denoiser
    observation = cases.observation(denoiser.normalizer, denoiser.normalizer.std.device)
    steps = config["likelihood_steps"]
    evaluations = 1 if config["likelihood"] == "energy" else 2 * steps - 1
    with progress.bar(len(observation) * evaluations, "evaluations", "likelihood") as bar:
        return nats_per_value(
            denoiser,
            cases.truth,
            observation,
            filling.trained.grid,
            levels=denoiser.diffusion.levels(steps, "log_snr"),
            mode=config["likelihood"],
            seed=config["seed"],
            numbers=cases.numbers,
            batch=config["batch"],
            progress=bar.update,
        )


class Judged:
    """Scores gathered over blocks of cases: on hidden and on observed cells, and the divergence everywhere."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.sums: dict[str, dict[str, Tensor]] = {}

    def add(self, members: Tensor, cases: Cases) -> None:
        """Takes in members `(M, N, 2, H, W)`."""
        for name, where in (("hidden", cases.hidden), ("observed", cases.observed)):
            if (where & cases.truth.isfinite()).any():
                self._gather(name, sums(members, cases.truth, where))
        everywhere = self.grid.valid.expand_as(cases.observed)
        squares, cells = divergence_squares(members, self.grid, everywhere)
        self._gather("all", {"divergence": squares, "divergence_cells": cells})

    def _gather(self, region: str, found: dict[str, Tensor]) -> None:
        before = self.sums.get(region, {})
        self.sums[region] = {name: before.get(name, 0.0) + value.sum(dim=0) for name, value in found.items()}

    def results(self) -> dict[str, dict[str, float]]:
        """Returns the scores of all blocks together."""
        total = self.sums["all"]
        found = {
            name: {score: float(value) for score, value in derive(part).items()}
            for name, part in self.sums.items()
            if name != "all"
        }
        return found | {"all": {"divergence_rms": float((total["divergence"] / total["divergence_cells"]).sqrt())}}


def say(filling: Filling | Series, results: Mapping[str, Any]) -> None:
    """Prints the scores."""
    if "log_likelihood" in results["all"]:
        print(
            f"log-likelihood: {results['all']['log_likelihood']:.4f} nats per value, in standard deviations of the "
            f"data blurred by {filling.trained.denoiser.diffusion.sigma_min:.3g}"
        )
    regions = [{"cells": name, **results[name]} for name in ("hidden", "observed") if name in results]
    # Where nothing is hidden, values that are kept agree with themselves alone.
    if "hidden" in results or (regions and filling.config["sigma_obs"] != 0):
        print(table(regions, ["cells", *columns("fill")]))
    print(f"divergence of the members: {results['all']['divergence_rms']:.3g} per s (RMS)")


def without_nan(results: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the same with None for what has no value, such as the spread of one member: JSON knows no NaN."""
    return {
        region: {name: value if math.isfinite(value) else None for name, value in values.items()}
        for region, values in results.items()
    }
