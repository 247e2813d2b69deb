"""A trained model in one file, and back: `python scripts/export.py --help`."""

import sys

from vecfield_diffusion.config.program import guarded
from vecfield_diffusion.programs.export import main

if __name__ == "__main__":
    sys.exit(guarded(main))
