"""How the ensemble of a command is made: the sampler, the observations, the physics and the guidance, settled together.

First each part is built and checked against the others, before data are read; then, with the cases at hand, what was
left to `auto` is chosen.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vecfield_diffusion.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vecfield_diffusion.guidance.cfg import Guidance
    from vecfield_diffusion.guidance.inpainting import Inpainting
    from vecfield_diffusion.guidance.physics import NoPhysics
    from vecfield_diffusion.guidance.sensors import Sensor
    from vecfield_diffusion.inference.cases import Cases
    from vecfield_diffusion.programs.trained import Trained
    from vecfield_diffusion.samplers.base import Sampler

#: Masks of training that those of a command are compared with.
DRAWS = 256


@dataclass(frozen=True)
class Posterior:
    """All that `sample_ensemble` is told beside the data; `inpainting` is None where it is left to `auto`.

    `weak` is the weaker network of autoguidance.
    """

    sampler: Sampler
    inpainting: Inpainting | None
    physics: NoPhysics
    guidance: Guidance
    sensor: Sensor | None = None
    weak: Trained | None = None

    @property
    def evaluations(self) -> int | None:
        """Evaluations of the denoiser for each field; None where they are decided on the way."""
        sampler, repeats = self.sampler, 1 if self.inpainting is None else self.inpainting.repeats
        if sampler.evaluations is None or repeats == 1:
            return sampler.evaluations
        last = copy.copy(sampler)  # the last step is taken once
        last.steps = 1
        return repeats * (sampler.evaluations - last.evaluations) + last.evaluations


def build_posterior(config: dict[str, Any], trained: Trained, device: torch.device) -> Posterior:
    """The parts that a configuration names, checked against each other and the checkpoint.

    Raises:
        UserError: Parts that do not go together.
    """
    from vecfield_diffusion.config.build import build
    from vecfield_diffusion.guidance.cfg import AutoGuidance
    from vecfield_diffusion.programs.trained import check_combination, load_trained

    names = ("sampler", "inpainting", "physics", "guidance", "sensor")
    parts = Posterior(**{name: build(config.get(name), name, trusted=True) for name in names})
    check_combination(trained.denoiser.diffusion, parts)
    if isinstance(parts.guidance, AutoGuidance):
        weak = load_trained(parts.guidance.ckpt, device, config["trust"])
        alike = weak.units == trained.units and weak.grid.shape == trained.grid.shape
        if not (alike and bool((weak.grid.valid == trained.grid.valid).all())):
            raise UserError(f"guidance.ckpt={parts.guidance.ckpt}: it was trained on another grid or in other units")
        if weak.denoiser.diffusion.coupled != trained.denoiser.diffusion.coupled:
            raise UserError(f"guidance.ckpt={parts.guidance.ckpt}: one of both networks is an interpolant, one is not")
        if weak.context != trained.context:
            raise UserError(f"guidance.ckpt={parts.guidance.ckpt}: both networks must be told the same dataset.context")
        parts.guidance.weak = weak.denoiser
        parts = replace(parts, weak=weak)
    return parts


@dataclass
class Seen:
    """What is observed of cases: some of the masks, the largest error, whether single components are among it."""

    observed: list[Tensor] = field(default_factory=list)
    worst: float = 0.0
    single: bool = False

    def add(self, cases: Cases, keep: Sequence[bool] | None = None) -> Seen:
        """Takes in further cases, and the masks of those to `keep`; all by default."""
        known = (cases.observed | cases.single) & cases.sigma_obs.isfinite()
        self.worst = max(self.worst, cases.sigma_obs.where(known, 0.0).max().item())
        self.single = self.single or bool(cases.single.any())
        chosen = [True] * len(cases.numbers) if keep is None else keep
        self.observed += [mask for mask, kept in zip(cases.observed, chosen, strict=True) if kept]
        return self


def settle(parts: Posterior, trained: Trained, seen: Seen, sigma_obs: float | str | Sequence[str] = 0.0) -> Posterior:
    """The same with nothing left open, for what is observed with `sigma_obs`; says what was chosen and why.

    Raises:
        UserError: A way to inpaint that cannot take the errors.
    """
    from vecfield_diffusion.config.build import build
    from vecfield_diffusion.config.program import option
    from vecfield_diffusion.guidance.physics import Physics
    from vecfield_diffusion.guidance.posterior import DPS
    from vecfield_diffusion.samplers.stochastic import DDIM, Ancestral

    if parts.inpainting is None:
        name, reason = choose(parts, trained, seen)
        print(f"inpainting={name}: {reason}")
        parts = replace(parts, inpainting=build(option("inpainting", name), "inpainting", trusted=True))
    if isinstance(parts.physics, Physics):
        try:
            physics = parts.physics.resolve(parts.inpainting.weighs_rows, trained.statistics)
        except ValueError as error:
            raise UserError(f"physics.{error}") from error
        said = ", ".join(f"{term.name} (tau {term.tau:.3g})" for term in physics.terms)
        print(f"physics.mode={physics.mode}: {said}")
        parts = replace(parts, physics=physics)
    if parts.inpainting.repeats > 1 and not isinstance(sigma_obs, int | float):
        raise UserError("inpainting=repaint takes one error for all cells: give sigma_obs as a number, or use mmps")
    if isinstance(parts.inpainting, DPS) and parts.sampler.steps < 50:
        print("note: dps takes long strides in few steps; give sampler.steps=100 or more")
    if parts.inpainting.repeats > 1 and not isinstance(parts.sampler, Ancestral | DDIM):
        print("note: repaint tends to the posterior with sampler=ddpm, not with a deterministic sampler")
    return parts


def choose(parts: Posterior, trained: Trained, seen: Seen) -> tuple[str, str]:
    """`conditional` or `mmps`, and the reason."""
    import torch

    from vecfield_diffusion.diffusion.formulations import Regression
    from vecfield_diffusion.guidance.cfg import ClassifierFree
    from vecfield_diffusion.guidance.physics import Physics

    if isinstance(trained.denoiser.diffusion, Regression):
        return "conditional", "a regression is no prior"
    if isinstance(parts.guidance, ClassifierFree):
        return "conditional", "guidance=cfg needs it"
    if trained.config["trainer"]["condition_dropout"] == 0 and parts.sensor is None:
        return "conditional", "the network was trained without condition dropout and is no prior"
    if parts.sensor is not None:
        return "mmps", f"the network was not trained on what sensor={type(parts.sensor).__name__.lower()} measures"
    if isinstance(parts.physics, Physics) and parts.physics.mode == "rows":
        return "mmps", "physics as observations needs it"
    if parts.sampler.needs_variance:
        return "conditional", "sampler.variance=learned needs it"
    if seen.single:
        return "mmps", "some cells lack one component, which the network was not trained on"
    if not any(mask.any() for mask in seen.observed):
        return "conditional", "nothing is observed"
    if seen.worst > 1.01 * trained.config["trainer"]["sigma_obs"] * trained.statistics.std:
        return "mmps", f"sigma_obs={seen.worst:g} is beyond the errors that the network was trained with"
    unlike, asked = unfamiliar(trained, torch.stack(seen.observed))
    # One in a hundred masks of training would be counted as well.
    if unlike > 0.1 * asked:
        return "mmps", f"{unlike} of {asked} masks are unlike those that the network was trained on"
    return "conditional", "the masks resemble those that the network was trained on"


def unfamiliar(trained: Trained, observed: Tensor) -> tuple[int, int]:
    """How many of the masks `(N, 1, H, W)` are unlike those of training, of how many that were compared.

    Masks are compared by their `features`; far is beyond the 99th percentile of the nearest-neighbour distance among
    training masks. Where the network works in windows, so does the comparison.
    """
    import torch

    from vecfield_diffusion.config.build import build
    from vecfield_diffusion.training.batches import draw, windows

    mask = build(trained.config["mask"], "mask", trust=trained.trust, paths=trained.files)
    generator = torch.Generator().manual_seed(0)
    grid = trained.grid.to("cpu")
    size, domain = tuple(map(min, trained.window, grid.shape)), grid.valid
    if size != grid.shape:
        cut = windows(grid, size, DRAWS, generator)
        observed = cut(observed[torch.arange(DRAWS) % len(observed)])
        domain = cut(domain.expand(DRAWS, 1, *grid.shape))[:, 0]
    drawn = features(draw(mask, DRAWS, domain, generator), domain)
    asked = features(observed, domain)
    scale = drawn.std(dim=0).clamp(min=1e-3)
    among = torch.cdist(drawn / scale, drawn / scale).fill_diagonal_(torch.inf).min(dim=1).values
    far = torch.cdist(asked / scale, drawn / scale).min(dim=1).values > among.quantile(0.99)
    return int(far.sum()), len(far)


def features(observed: Tensor, valid: Tensor) -> Tensor:
    """What masks `(N, 1, H, W)` are like, `(N, 5)`, on one domain `(H, W)` or one each; the empty one is far from all.

    The logarithms of the observed share and of the mean and largest distances of hidden cells from the observed ones;
    how many neighbours of an observed cell are observed, too; how far the centre of the observed cells is from that of
    the domain, over its length.
    """
    import numpy as np
    import torch
    from scipy.ndimage import distance_transform_edt

    rows, domains = [], valid.expand(len(observed), *observed.shape[-2:])
    for seen, wet in zip(observed[:, 0].cpu().numpy(), domains.cpu().numpy(), strict=True):
        if not seen.any():
            rows.append([-20.0, 10.0, 10.0, 0.0, 0.0])
            continue
        distance = distance_transform_edt(~seen)[wet]
        together = ((seen[1:] & seen[:-1]).sum() + (seen[:, 1:] & seen[:, :-1]).sum()) / (2 * seen.sum())
        centre = np.argwhere(seen).mean(axis=0) - np.argwhere(wet).mean(axis=0)
        offset = np.linalg.norm(centre / wet.shape)
        share = np.log(seen.sum() / wet.sum())
        rows.append([share, np.log1p(distance.mean()), np.log1p(distance.max()), together, offset])
    return torch.tensor(rows, dtype=torch.float64)
