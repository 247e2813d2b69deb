"""What can be true of the data: absurd values, magnitudes and masks far from those of training, absurd results."""

from __future__ import annotations

import torch
from torch import Tensor

from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.data.given_masks import unlike_training
from vecfield_diffusion.data.statistics import limit_of
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.cases import Cases
from vecfield_diffusion.inference.method import Method
from vecfield_diffusion.inference.super_observations import Tally, Thinning
from vecfield_diffusion.programs.familiar import TrainingMasks
from vecfield_diffusion.programs.method import Chooser, Observed
from vecfield_diffusion.programs.trained import Trained, check_error

#: The scale of what is observed over that of the training data, outside which its units are doubted.
SLOW, FAST = 0.02, 10.0
#: The standard deviation of a normal law over its median absolute deviation.
MEDIAN = 1.4826


def counted(number: int, noun: str) -> str:
    """Returns a number of things in words."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def anomalies(values: Tensor, trained: Trained) -> Tensor:
    """Returns values `(..., 2, H, W)` less the mean field of training."""
    return values - trained.denoiser.normalizer.mean.to(values)


def absurd(cases: Cases, trained: Trained) -> Tensor:
    """Returns the cells, as `observed`, with an observed or known value that no law of the training data allows."""
    limit = limit_of(trained.statistics)
    cells = torch.zeros_like(cases.observed)
    for values in (cases.y, cases.truth):
        cells = cells | (anomalies(values, trained).abs() > limit).any(dim=-3, keepdim=True)
    if cases.sensor is not None:
        cells = cells | (cases.sensor.magnitude > limit + trained.denoiser.normalizer.mean.abs().max().item())
    return cells


def extreme(cases: Cases, trained: Trained) -> float:
    """Returns the largest anomaly of what is observed or known, in physical units."""
    values = torch.stack((cases.y, cases.truth))
    return anomalies(values, trained).abs().nan_to_num(0.0, torch.inf).max().item()


class Overview:
    """What there is to fill and to fill it from, case by case.

    Arguments:
        trained: The network, fitted to the fields.
        method: How ensembles are made.
        thinning: How what is observed becomes super-observations; None where it does not.

    Attributes:
        chosen: The way to condition of each case, and why; empty where the method has one.
    """

    def __init__(self, trained: Trained, method: Method, thinning: Thinning | None = None) -> None:
        self.trained, self.masks = trained, TrainingMasks(trained)
        self.choose = Chooser(method, trained, self.masks) if method.inpainting is None else None
        self.thinning, self.tally = thinning, Tally()
        self.chosen: list[tuple[str, str]] = []
        self.error = 0.0
        self.shares: list[float] = []
        self.numbers: list[int] = []
        self.known: list[bool] = []
        self.absurd: dict[int, int] = {}
        self.worst = 0.0
        self.scales: list[float] = []
        self.squares = self.values = 0.0
        self.filled = True

    def add(self, measured: Cases) -> None:
        """Takes in cases as they were measured."""
        trained, wrong = self.trained, absurd(measured, self.trained)
        self._measure_scale(measured, wrong)
        for number, cells in zip(measured.numbers, wrong.flatten(1).sum(dim=1).tolist(), strict=True):
            self.absurd |= {number: cells} if cells else {}
        self.worst = max(self.worst, extreme(measured, trained))
        cases = measured.without(wrong)
        if self.thinning is not None:
            before, cases = cases, self.thinning(cases)
            self.tally.add(before, cases)
        for observed in Observed.of(cases):
            self.error = max(self.error, observed.error)
            self.shares.append(observed.cells.sum().item() / max(1, trained.grid.valid.sum().item()))
            self.chosen += [] if self.choose is None else [self.choose(observed)]
        self.numbers += cases.numbers
        self.known += (cases.observed | cases.single.any(dim=1, keepdim=True)).flatten(1).any(dim=1).tolist()
        self.filled = self.filled and bool((cases.observed | ~trained.grid.valid).all())

    def _measure_scale(self, measured: Cases, wrong: Tensor) -> None:
        """The scale of each case by its median, which no single value moves, and the mean square of what is left."""
        for values, cells in zip(anomalies(measured.y, self.trained), wrong, strict=True):
            values = values / self.trained.statistics.std
            finite = values[values.isfinite()].abs()
            if len(finite):
                self.scales.append(MEDIAN * finite.median().item())
            kept = values.masked_fill(cells, torch.nan)
            kept = kept[kept.isfinite()].double()
            self.squares, self.values = self.squares + kept.square().sum().item(), self.values + len(kept)

    def say(self, fields: Fields, *, source: bool, unlike: str) -> None:
        """Prints what is observed, what is left out of it, and what is unlike the training data.

        Arguments:
            fields: The data.
            source: Whether they are the user's own, rather than those of training.
            unlike: `check` refuses a magnitude far from that of the training data, `any` does not.

        Raises:
            UserError: Such a magnitude.
        """
        if source and unlike == "check":
            self._check_magnitude(fields)
        if self.absurd:
            trained, limit = self.trained, limit_of(self.trained.statistics)
            cells, first = counted(sum(self.absurd.values()), "cell"), next(iter(self.absurd))
            count = counted(len(self.absurd), "snapshot")
            print(
                f"note: left out: {cells} in {count}, such as {first}: values up to "
                f"{self.worst:.3g} {fields.units} from the mean, more than {limit / trained.statistics.std:.3g} "
                f"standard deviations ({limit:.3g}) of the training data"
            )
        if self.thinning is not None:
            print(self.tally.words(self.thinning, fields.units))
        check_error(self.error, self.trained)
        self._say_share()

    def _check_magnitude(self, fields: Fields) -> None:
        """Raises UserError where the units of the data are doubtful."""
        if not self.scales:
            return
        scale, rms = torch.tensor(self.scales).median().item(), (self.squares / max(self.values, 1)) ** 0.5
        if rms >= SLOW and scale <= FAST:
            return
        ratio = scale if scale > FAST else rms
        trained = self.trained
        raise UserError(
            f"{fields.source} has velocities of about {ratio * trained.statistics.std:.3g} {fields.units}, "
            f"{ratio:.2g} times the {trained.statistics.std:.3g} that {trained.path} was trained on. Mend its units "
            "(an attribute such as units='cm s-1'), or fill it all the same with magnitude=any"
        )

    def _say_share(self) -> None:
        """Prints the observed share of the domain, with a note where it is unlike that of any training mask."""
        shares = sorted(self.shares)
        if not shares[-1]:
            return
        print(f"observed: {' to '.join(dict.fromkeys((f'{shares[0]:.1%}', f'{shares[-1]:.1%}')))} of the cells")
        try:
            low, high = self.masks.shares
        except UserError:  # a mask of training that is not at hand, or not trusted, is needed for `auto` alone
            return
        if doubt := unlike_training(shares[len(shares) // 2], low, high):
            print(f"note: {doubt}")

    def check_work(self, *, drawn: bool, sensor: bool) -> None:
        """Raises UserError where there is nothing to fill, or nothing to fill it from.

        A network of sequences fills from other times what has no observation of its own.

        Arguments:
            drawn: Whether nothing is meant to be observed.
            sensor: Whether observed cells may still be unknown.
        """
        lacking = [number for number, known in zip(self.numbers, self.known, strict=True) if not known]
        if lacking and not drawn:
            alone = self.trained.frames == 1
            if alone and len(lacking) == len(self.numbers):
                raise UserError(
                    f"snapshot {lacking[0]} has no observed cell: choose another time=, or draw with mask=none"
                )
            count = counted(len(lacking), "snapshot")
            how = "drawn freely" if alone else "filled from other times alone"
            print(f"note: {how}: {count} without an observed cell, such as {lacking[0]}")
        if self.filled and not sensor:
            raise UserError(
                "nothing to fill: every cell is observed (cells that the file never measures are taken for land, "
                "unless domain=FILE marks them). Hide some with mask=block, or hide=0.2"
            )


def check_members(members: Tensor, cases: Cases, trained: Trained) -> None:
    """Looks at members `(M, N, 2, H, W)` before they are written; prints a note where they are beyond the data.

    Raises:
        UserError: Values in the domain that are not finite.
    """
    inside = members[..., trained.grid.valid.cpu()]
    broken = (~inside.isfinite()).flatten(2).any(dim=2).any(dim=0)
    if broken.any():
        number = cases.numbers[int(broken.nonzero()[0])]
        raise UserError(
            f"snapshot {number}: the method gives values that are not finite, and nothing of it is written. Try "
            "inpainting=mmps or more sampler.steps, or look at the observations"
        )
    limit = limit_of(trained.statistics)
    beyond = (anomalies(members, trained).abs() > limit).any(dim=2).any(dim=0).flatten(1).sum(dim=1)
    for number, cells in zip(cases.numbers, beyond.tolist(), strict=True):
        if cells:
            print(
                f"note: snapshot {number}: in {counted(cells, 'cell')} a member is more than "
                f"{limit / trained.statistics.std:.3g} standard deviations of the training data from the mean: do not "
                "trust it there"
            )
