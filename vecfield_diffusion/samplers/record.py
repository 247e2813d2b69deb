"""What a run of a sampler says of itself: named series, such as how often its proposals were accepted.

Values stay on the device while the run goes on, so that no step waits for it; they are read at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Record:
    """Named series of a run.

    Attributes:
        series: For each name values `(B,)`, in the order in which they were added.
        notes: What is to be said in words.
        chains: Energies `(B, n)`, of n states one after another that one chain of each sample took.
    """

    series: dict[str, list[Tensor]] = field(default_factory=dict)
    chains: list[Tensor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        """Takes in a line, once."""
        if line not in self.notes:
            self.notes.append(line)

    def add(self, name: str, values: Tensor) -> None:
        """Takes in one value of each sample, `(B,)`."""
        self.series.setdefault(name, []).append(values.detach())

    def last(self, name: str) -> Tensor:
        """Returns the values `(B,)` that were added last."""
        return self.series[name][-1]

    def follow(self, energies: list[Tensor]) -> None:
        """Takes in the energies `(B,)` of a chain, state by state, up to a constant for each sample."""
        if len(energies) > 1:
            self.chains.append(torch.stack(energies, dim=1).detach())

    def numbers(self) -> dict[str, float]:
        """Returns the mean of each series and, of chains, the autocorrelation time and the effective sample size."""
        found = {name: torch.cat(values).double().mean().item() for name, values in self.series.items()}
        if self.chains:
            time = autocorrelation_time(self.chains)
            length = sum(chain.shape[1] for chain in self.chains) / len(self.chains)
            found |= {"autocorrelation_time": time, "effective_states": length / time}
        return found

    def clear(self) -> None:
        """Forgets all."""
        self.series, self.chains, self.notes = {}, [], []

    def summary(self) -> str | None:
        """Returns the numbers in one line, and the notes; None where nothing was recorded."""
        numbers = [f"{name.replace('_', ' ')} {value:.3g}" for name, value in self.numbers().items()]
        lines = ["sampler: " + ", ".join(numbers)] if numbers else []
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)]) or None


def autocorrelation_time(chains: list[Tensor]) -> float:
    """Returns 1 + 2 sum of the autocorrelations, in steps, of chains `(B, n)` each about its own mean.

    All chains count as draws of one process; the sum ends before the first pair of neighbouring lags whose sum is not
    positive (Geyer, Statistical Science 7, 473, 1992). The means of short chains hide slow parts: it is a lower bound
    unless a chain is many times as long. At least 1.
    """
    parts = [(chain - chain.mean(dim=1, keepdim=True)).double() for chain in chains]
    length = min(part.shape[1] for part in parts)
    products = [
        sum((part[:, : part.shape[1] - lag] * part[:, lag:]).sum() / (part.shape[1] - lag) for part in parts)
        for lag in range(length - 1)
    ]
    if not products or float(products[0]) == 0:
        return 1.0
    rho = [float(product / products[0]) for product in products]
    time = -1.0
    for even, odd in zip(rho[::2], [*rho[1::2], 0.0], strict=False):
        if even + odd <= 0:
            break
        time += 2 * (even + odd)
    return max(time, 1.0)
