"""What few training fields ask for: `auto` of `model.dropout` and `trainer.patience`, by how many independent ones.

Snapshots that resemble each other are worth fewer (`data/splits.py`). A network learns few fields by heart, and then
goes wrong on others: dropout keeps it from it, and a run whose validation loss no longer falls ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Below so many independent fields, the dropout; 0 for more.
DROPOUT = {30.0: 0.3, 100.0: 0.2, 500.0: 0.1}
#: Validations without a smaller loss after which a run on fewer fields than these ends.
PATIENCE = 20


@dataclass(frozen=True)
class Regularisation:
    """What `auto` stands for.

    Arguments:
        dropout: Of the network.
        patience: Of the trainer; None for no end.
    """

    dropout: float
    patience: int | None

    @classmethod
    def of(cls, independent: float) -> Regularisation:
        """Returns what a number of independent training fields asks for."""
        dropout = next((value for most, value in DROPOUT.items() if independent < most), 0.0)
        return cls(dropout, PATIENCE if dropout else None)


def regularised(
    config: Mapping[str, Any], independent: float, snapshots: int, before: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """Returns the configuration without `auto`, and what was chosen and why, in words; none where nothing was.

    Arguments:
        config: The configuration of `train.py`.
        independent: How many independent fields the training snapshots are worth.
        snapshots: How many there are.
        before: The configuration with which the run began; empty for a new one. It goes on as it began.
    """
    chosen, said = Regularisation.of(independent), []
    config = dict(config)
    for group, key, value in (("model", "dropout", chosen.dropout), ("trainer", "patience", chosen.patience)):
        if config[group].get(key) != "auto":
            continue
        value = before.get(group, {}).get(key, value)
        config[group] = {**config[group], key: value}
        said += [f"{group}.{key}={value}"] if value else []
    few = f"the {snapshots} training snapshots are worth {independent:.3g} independent fields"
    return config, f"{few}: {', '.join(said)}" if said else ""
