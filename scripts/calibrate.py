"""Fits the spread of a network's ensembles, one factor a way to observe: `python scripts/calibrate.py --help`."""

import sys

from vecfield_diffusion.config.program import guarded
from vecfield_diffusion.programs.calibrate import main

if __name__ == "__main__":
    sys.exit(guarded(main))
