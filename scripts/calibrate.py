"""Fits the spread of a network's ensembles, one factor for each mask: `python scripts/calibrate.py --help`."""

from vecfield_diffusion.commands import calibrate

if __name__ == "__main__":
    calibrate()
