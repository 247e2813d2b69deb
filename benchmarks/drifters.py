"""What the regions of drifters hold: `python benchmarks/drifters.py daily.nc [--pieces 12] [keys of infer.py ...]`.

Pieces of four days, spread evenly over those from `--first` on, are filled by `infer.py` (`ckpt=none mask=track
members=40` unless keys say else), and `drift.py` follows drifters from 200 places for three days in each member and in
the hidden truth. Printed is the share of the ends in the truth that the regions of 50 and 90 % hold, the mean over the
pieces with its standard error, and the least and the most. Drifters on whose way all was observed are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from vecfield_diffusion import commands
from vecfield_diffusion.data.readers import open_fields
from vecfield_diffusion.programs.drift import drift
from vecfield_diffusion.programs.infer import infer

DAYS, FOLDER = 4, Path("outputs/drifters")


def main() -> None:
    """Prints a line for each region."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--pieces", type=int, default=12)
    parser.add_argument("--first", type=int, default=0, help="the first day that a network has not seen")
    options, keys = parser.parse_known_args()
    starts = np.linspace(options.first, len(open_fields(options.path)) - DAYS, options.pieces).astype(int)
    days = [int(start) + day for start in starts for day in range(DAYS)]
    keys = ["ckpt=none", "mask=track", "members=40", *keys, f"input={options.path}", f"time={days}", "overwrite=true"]
    infer(commands.infer.config(*keys), FOLDER)
    found = []
    for piece in range(options.pieces):
        way = [f"time={DAYS * piece}", f"hours={24 * (DAYS - 1)}", f"seed={piece}", "overwrite=true"]
        drift(commands.drift.config(f"input={FOLDER}", *way), FOLDER / f"{piece}")
        found.append(json.loads((FOLDER / f"{piece}" / "metrics.json").read_text()))
    print(f"{sum(piece['true_drifters'] for piece in found)} drifters in {options.pieces} pieces")
    for level in (0.5, 0.9):
        held = np.array([piece[f"held_by_{level}"] for piece in found])
        error = held.std(ddof=1) / np.sqrt(len(held))
        print(f"region of {level:.0%}: {held.mean():.1%} +- {error:.1%}, {held.min():.0%} to {held.max():.0%}")


if __name__ == "__main__":
    main()
