"""What a file of velocities holds and how to train on it: `python scripts/inspect_data.py --help`."""

import sys

from vecfield_diffusion.config.program import guarded
from vecfield_diffusion.programs.inspect import main

if __name__ == "__main__":
    sys.exit(guarded(main))
