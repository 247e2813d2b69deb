"""Where things drift in a filled series: `python scripts/drift.py --help`."""

from vecfield_diffusion.commands import drift

if __name__ == "__main__":
    drift()
