"""What few training fields ask for: `auto` of `model.dropout`, `trainer.patience` and `augment.transforms`.

It goes by how many independent fields there are: snapshots that resemble each other are worth fewer
(`data/splits.py`). A network learns few fields by heart, and then goes wrong on others: mirrored copies of their
anomalies keep it from it longest, dropout for a while, and a run whose validation loss no longer falls ends. Mirrored
fields need not be as likely as the others, which is why only networks whose output counts as far as validation asks
for (`models/gate.py`) get them unasked.

With 32 hourly winds of 32x32 cells, the loss on unseen hours, that of the Gaussian part being 1, was least at .957 and
then rose; with dropout .3 it was .958 and rose later; with flips .911 and still falling. With 64 of a wake, which no
mirror leaves as it is, it ended at .667, and with flips at .635 and still falling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vecfield_diffusion.data.augment import obstacle
from vecfield_diffusion.physics.grid import Grid

#: Below so many independent fields, the dropout; 0 for more.
DROPOUT = {30.0: 0.3, 100.0: 0.2, 500.0: 0.1}
#: Below so many independent fields, anomalies are mirrored.
MIRRORED = 100.0
#: Validations without a smaller loss after which a run on fewer fields than these ends.
PATIENCE = 20


@dataclass(frozen=True)
class Regularisation:
    """What `auto` stands for.

    Arguments:
        dropout: Of the network.
        patience: Of the trainer; None for no end.
        mirrored: Whether to train on mirrored anomalies as well.
    """

    dropout: float
    patience: int | None
    mirrored: bool

    @classmethod
    def of(cls, independent: float) -> Regularisation:
        """Returns what a number of independent training fields asks for."""
        dropout = next((value for most, value in DROPOUT.items() if independent < most), 0.0)
        return cls(dropout, PATIENCE if dropout else None, independent < MIRRORED)


def regularised(
    config: Mapping[str, Any],
    independent: float,
    snapshots: int,
    *,
    mirrors: Sequence[str],
    before: Mapping[str, Any],
) -> tuple[dict[str, Any], str]:
    """Returns the configuration without `auto`, and what was chosen and why, in words; none where nothing was.

    Arguments:
        config: The configuration of `train.py`.
        independent: How many independent fields the training snapshots are worth.
        snapshots: How many there are.
        mirrors: The transforms that mirror fields, where they may be chosen.
        before: The configuration with which the run began; empty for a new one. It goes on as it began.
    """
    found = Regularisation.of(independent)
    chosen = {
        ("model", "dropout"): found.dropout,
        ("trainer", "patience"): found.patience,
        ("augment", "transforms"): list(mirrors) if mirrors and found.mirrored else "auto",
    }
    config, said = dict(config), []
    for (group, key), value in chosen.items():
        if config[group].get(key) != "auto":
            continue
        value = before.get(group, {}).get(key, value)
        config[group] = {**config[group], key: value}
        if value and value != "auto":
            said.append(f"{group}.{key}={_shown(value)}")
    few = f"the {snapshots} training snapshots are worth {independent:.3g} independent fields"
    return config, f"{few}: {', '.join(said)}" if said else ""


def mirrors(grid: Grid) -> list[str]:
    """Returns the transforms that mirror fields on a grid, where it has room for them."""
    return [name for name in ("flip_x", "flip_y") if obstacle(name, grid) is None]


def _shown(value: Any) -> str:
    return f"[{','.join(value)}]" if isinstance(value, list) else str(value)
