"""What is to be filled, and how: the network, the data, the mask and the method of every snapshot, all checked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vecfield_diffusion.config.build import build
from vecfield_diffusion.data.draws import MaskFunction, goes_on, says_so
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.masks import Empty
from vecfield_diffusion.data.sequences import Integers
from vecfield_diffusion.ellipses import is_known
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.plots import MOVING, check_moving
from vecfield_diffusion.evaluation.viewer import PAGE, check_page
from vecfield_diffusion.guidance.inpainting import Conditional
from vecfield_diffusion.guidance.sensors import Sensor
from vecfield_diffusion.inference.calibration import find_factor
from vecfield_diffusion.inference.cases import Cases, make_cases, shown_cells, with_context
from vecfield_diffusion.inference.method import Method
from vecfield_diffusion.inference.super_observations import Thinning
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs.accuracy import errors, thinning
from vecfield_diffusion.programs.balances import with_balances
from vecfield_diffusion.programs.fitted import fit_size
from vecfield_diffusion.programs.method import agreed, build_method, choices, fit_method, node_of, process_of
from vecfield_diffusion.programs.mixture import NetworkMixture, check_options
from vecfield_diffusion.programs.plausible import Overview, absurd
from vecfield_diffusion.programs.series import VALUES, Piece, Plan
from vecfield_diffusion.programs.source import Source, chosen_snapshots, files_behind, read_variable
from vecfield_diffusion.programs.trained import Trained, choose_device, load_trained

#: Snapshots that are looked at together before the sampling.
LOOKED = 64


@dataclass(frozen=True)
class Filling:
    """What is to be filled, and how.

    Arguments:
        config: The configuration of `infer.py`.
        trained: The network, fitted to the size of the fields.
        fields: The data.
        indices: The snapshots.
        mask: What is observed of what is measured.
        method: How ensembles are made, `inpainting` as the configuration has it.
        twin: Whether known fields are hidden, rather than the gaps of a source filled.
        names: The way to condition of each snapshot.
        methods: The method of each of these names, with nothing left open.
        factors: That of the spread by the same names.
        offered: The snapshots whose observations count; None for all.
        ahead: Of forecasts, how many steps before each snapshot the last observation lies; see `Plan`.
        mixture: Several networks that draw the members by weight; None for the one.
        thinning: How what is observed becomes super-observations; None where it does not.
    """

    config: dict[str, Any]
    trained: Trained
    fields: Fields
    indices: list[int]
    mask: MaskFunction
    method: Method
    twin: bool
    names: list[str] = field(default_factory=list)
    methods: Mapping[str, Method] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    offered: Sequence[int] | None = None
    ahead: int = 0
    mixture: NetworkMixture | None = None
    thinning: Thinning | None = None

    @property
    def parts(self) -> Sequence[Trained]:
        """The networks that draw members."""
        return [self.trained] if self.mixture is None else self.mixture.parts

    @property
    def grid(self) -> Grid:
        """The grid."""
        return self.trained.grid

    @property
    def sensor(self) -> Sensor | None:
        """What an observation measures, where not both components of single cells."""
        return self.method.sensor

    @property
    def origin(self) -> str:
        """Where the network comes from."""
        return ", ".join(str(part.path) for part in self.parts)

    @property
    def files(self) -> list[Path]:
        """The files that the result depends on."""
        weak = [] if self.method.weak is None else [self.method.weak.path]
        mask = filter(None, [getattr(self.mask, "path", None)])
        return [*(part.path for part in self.parts), *files_behind(self.fields), *mask, *weak]

    def cases(self, positions: Sequence[int]) -> Cases:
        """Returns the cases of some of the snapshots that are filled, always the same."""
        return self.known([self.indices[position] for position in positions])

    def known(self, snapshots: Sequence[int] | Integers) -> Cases:
        """Returns the cases of snapshots `(N,)`, or of sequences of them `(N, P)`, with all that is known of them.

        Values that no law of the data allows are left out.
        """
        cases = self.measured(snapshots)
        if self.ahead:
            frames = cases.y.shape[1]
            cases = cases.blind((torch.arange(frames) >= frames - self.plan.unseen).view(-1, 1, 1, 1))
        return self.informed(cases.without(absurd(cases, self.trained)))

    def thinned(self, cases: Cases) -> Cases:
        """Returns what the members of cases are drawn from: the same, or their super-observations."""
        return cases if self.thinning is None else self.thinning(cases)

    @property
    def goes_on(self) -> bool:
        """Whether the mask of a snapshot has to do with those of others: a network of snapshots is told so."""
        return goes_on(self.mask) if self.trained.frames > 1 else says_so(self.mask)

    def measured(self, snapshots: Sequence[int] | Integers) -> Cases:
        """Returns the cases of snapshots or sequences as the source and the mask have them."""
        snapshots = np.asarray(snapshots, dtype=np.int64)
        config, trained, sensor = self.config, self.trained, self.method.sensor
        cases = make_cases(
            self.fields,
            snapshots,
            self.mask,
            seed=config["seed"],
            sigma_obs=errors(config, self.fields, snapshots),
            add_error=self.twin,
            grid=trained.grid,
            sensor=sensor,
            hide=config["hide"],
            through=self.goes_on,
        )
        if sensor is None or not sensor.velocity:
            return cases
        # The fields of the file stand for their coordinates alone.
        sensor = sensor.recorded(lambda name: read_variable(self.fields, name, snapshots))
        known = sensor.cells & trained.grid.valid & is_known(cases.sigma_obs).all(dim=-3, keepdim=True)
        given = {"valid": trained.grid.valid, "seed": config["seed"], "hide": config["hide"], "through": self.goes_on}
        shown = shown_cells(self.fields, snapshots, self.mask, known, **given)
        return cases.seen_through(sensor.within(shown))

    def informed(self, cases: Cases) -> Cases:
        """Returns the cases with what the network is conditioned on beside the observation."""
        past = self.mask if self.config["history"] == "masked" else None
        trained, seed = self.trained, self.config["seed"]
        normalizer = trained.denoiser.normalizer
        cases = with_context(cases, self.fields, trained.context, normalizer, seed=seed, past=past, twin=self.twin)
        return with_balances(cases, self.method, self.fields)

    @cached_property
    def place(self) -> dict[int, int]:
        """The position of each snapshot among those that are filled."""
        return {number: position for position, number in enumerate(self.indices)}

    @property
    def plan(self) -> Plan:
        """How a network of sequences fills them."""
        config, trained, count = self.config, self.trained, len(self.fields)
        values = config["members"] * 2 * trained.grid.valid.numel()
        return Plan(
            self.fields,
            trained.frames,
            trained.stride,
            past=config["time_context"] == "past",
            length=max(1, VALUES // values),
            offered=range(count) if self.offered is None else self.offered,
            ahead=self.ahead,
        )

    def pieces(self, done: set[int]) -> Iterator[tuple[str, Piece]]:
        """Yields what is filled at once, and the name of its method, but for what is all `done`.

        What is filled at once is the same whatever is done: the rounding of a network depends on its batch.
        """
        if self.trained.frames > 1:
            yield from ((self.names[0], piece) for piece in self.plan.pieces(self.indices)
                        if not done.issuperset(piece.positions(self.place)))  # fmt: skip
            return
        size = max(1, at_once(self.config, self.trained) // self.config["members"])
        for first in range(0, len(self.indices), size):
            block = range(first, min(first + size, len(self.indices)))
            for name in dict.fromkeys(self.names[place] for place in block):
                alike = [place for place in block if self.names[place] == name]
                if not done.issuperset(alike):
                    yield name, Piece.of([self.indices[place] for place in alike])


def open_filling(
    config: dict[str, Any],
    *,
    source: Source | Fields | None = None,
    trained: Trained | None = None,
    mask: MaskFunction | None = None,
) -> Filling:
    """Returns what a configuration of `infer.py` says, with everything checked and nothing left open.

    Arguments:
        config: The configuration.
        source: The data, where `input=` does not name them.
        trained: The network, where `ckpt=` has been loaded already.
        mask: What is observed, where `mask=` does not say it.

    Raises:
        UserError: A checkpoint, source or option that does not fit.
    """
    check_ranges(config)
    device = choose_device(config["device"])
    mask = mask or build(config["mask"], "mask", trusted=True)
    parts = [trained] if trained else load_parts(config, device)
    trained = parts[0]
    method = build_method(config, trained, device)
    mixture = NetworkMixture.of(parts, config["weights"]) if len(parts) > 1 else None
    if mixture is not None:
        check_options(config, mixture, method)
    check_likelihood(config, method, mask, trained)
    source = config["input"] if source is None else source
    check_time(config, trained)
    for part in parts:
        print(f"{part.path}: step {part.step}, {type(part.denoiser.diffusion).__name__}")
    fields, indices, offered = chosen_snapshots(config, trained, source)
    sizes = {"overlap": config["overlap"], "batch": config["batch"]}
    parts = [fit_size(part, fields, **sizes) for part in parts]
    method = fit_method(method, fields, seen=trained.split["train"] if source is None else None, **sizes)
    trained, mixture = parts[0], None if mixture is None else replace(mixture, parts=parts)
    if config["likelihood"] != "none":
        check_energy(config, trained)
    if config["likelihood"] != "none" or config["thermodynamics"]:
        method = replace(method, inpainting=Conditional())
    default = "block" if source is None else "gaps"
    node = config["mask"] or node_of(config, "mask", default)
    mask = mask or build(node, "mask", trusted=True)
    filling = Filling(
        config,
        trained,
        fields,
        indices,
        mask,
        method,
        twin=source is None,
        offered=offered,
        mixture=mixture,
        thinning=thinning(config, source, fields.grid),
    )
    return resolved(filling, node)


def load_parts(config: Mapping[str, Any], device: torch.device) -> list[Trained]:
    """Returns the networks that `ckpt=` names. Raises UserError where there are none, or weights of a single one."""
    named = [config["ckpt"]] if isinstance(config["ckpt"], str) else config["ckpt"]
    if not named or "none" in named:
        raise UserError(f"ckpt={config['ckpt']}: expected run folders or checkpoint files")
    if len(named) == 1 and config["weights"] is not None:
        raise UserError("weights are those of several checkpoints: ckpt=[a,b], or leave them out")
    return [load_trained(ckpt, device, config["trust"]) for ckpt in named]


def resolved(filling: Filling, node: Mapping[str, Any]) -> Filling:
    """Returns the same with the method of every snapshot chosen; `node` is that of the mask.

    Raises:
        UserError: There is nothing to fill or nothing to fill it from, a magnitude far from the training data, or no
            factor of the spread where one is asked for.
    """
    config, trained = filling.config, filling.trained
    overview = Overview(trained, filling.method, filling.thinning)
    for first in range(0, len(filling.indices), LOOKED):
        overview.add(filling.measured(filling.indices[first : first + LOOKED]))
    overview.say(filling.fields, source=not filling.twin, unlike=config["magnitude"])
    overview.check_work(drawn=isinstance(filling.mask, Empty), sensor=filling.method.sensor is not None)
    if trained.context is not None and (lacking := trained.context.lacking(filling.fields)):
        print(f"note: {filling.fields.source} does not have {', '.join(lacking)}, which the network was trained with")
    chosen = overview.chosen if trained.frames == 1 else agreed(overview.chosen)
    names, methods = choices(config, filling.method, trained, chosen=chosen)
    factors = {}
    for name, method in methods.items() if config["calibrate"] else ():
        factors[name] = find_factor(trained.calibration, process_of(config, node, method), trained.path)
        print(f"spread times {factors[name]:.3f}, as fitted on the validation snapshots")
    names = names or list(methods) * len(filling.indices)
    return replace(filling, names=names, methods=methods, factors=factors)


def check_ranges(config: Mapping[str, Any]) -> None:
    """Raises UserError for a number out of range."""
    for key, least in (("members", 1), ("batch", 1), ("cases", 1), ("seed", 0), ("sigma_obs", 0.0), ("hide", 0.0)):
        if isinstance(config.get(key), int | float) and config[key] < least:
            raise UserError(f"{key} must be >= {least}, got {config[key]}")
    for key in ("hide", "overlap"):
        if not 0 <= config.get(key, 0.0) < 1:
            raise UserError(f"{key} must be in [0, 1), got {config[key]}")
    if config.get("bin") is not None and config["bin"] <= 0:
        raise UserError(f"bin must be > 0, got {config['bin']}")
    for key, endings in (("output", (".nc",)), ("figure", (".png", ".pdf", ".svg", PAGE, *MOVING))):
        if config.get(key) is not None and not config[key].endswith(endings):
            raise UserError(f"{key}={config[key]}: a file that ends in {' or '.join(endings)} is expected")
    check_moving(config.get("figure") or "")
    check_page(config.get("figure") or "")


def check_time(config: Mapping[str, Any], trained: Trained) -> None:
    """Raises UserError where something is asked of a network of snapshots that takes one of sequences."""
    for key, plain in (("horizon", 0), ("time_context", "both")):
        if config[key] != plain and trained.frames == 1:
            raise UserError(
                f"{key}={config[key]}: {trained.path} fills snapshot by snapshot. Give ckpt=none, or a network that "
                "was trained with dataset.frames=5 or so"
            )
    if config["horizon"] < 0:
        raise UserError(f"horizon must be >= 0, got {config['horizon']}")


def check_likelihood(config: Mapping[str, Any], method: Method, mask: MaskFunction | None, trained: Trained) -> None:
    """Raises UserError where a density is asked for that there is not."""
    name = "thermodynamics" if config["thermodynamics"] else "likelihood"
    if name == "likelihood" and config["likelihood"] == "none":
        return
    if trained.frames > 1:
        raise UserError(
            f"{name} is that of snapshots, and {trained.path} is a network of sequences of {trained.frames}: leave "
            "it out, or give a network that was trained with dataset.frames=1"
        )
    if not method.plain:
        raise UserError(
            f"{name} is that of the network: it goes with inpainting=conditional physics=none guidance=none alone"
        )
    if config["sigma_obs"] == 0 and not isinstance(mask, Empty):
        raise UserError(
            f"{name}: cells observed without error have no density. Add sigma_obs=... (the error of the "
            "observations), or mask=none for that of the prior"
        )
    if config["thermodynamics"] and (method.sampler.evaluations is None or method.sampler.steps < 3):
        raise UserError("thermodynamics follows members from level to level: use sampler.steps=3 or more, not adaptive")
    if config["likelihood_steps"] < 2:
        raise UserError(f"likelihood_steps must be >= 2, got {config['likelihood_steps']}")


def check_energy(config: Mapping[str, Any], trained: Trained) -> None:
    """Raises UserError where the likelihood is asked of an energy that these fields have not."""
    if config["likelihood"] == "energy" and not trained.denoiser.has_energy:
        raise UserError(
            f"likelihood=energy: {trained.path} has no energy of these fields. It takes a network trained with "
            "model=energy_gaussian loss.dual=1 and fields of its own size, for a blend of windows has none. Use "
            "likelihood=exact"
        )


def at_once(config: Mapping[str, Any], trained: Trained) -> int:
    """Returns the fields computed at once: `batch`, fewer where they are larger than those of the network."""
    larger = trained.grid.valid.numel() / math.prod(trained.window)
    return max(1, int(config["batch"] / max(1.0, larger)))
