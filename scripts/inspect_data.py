"""What a file of velocities holds and how to train on it: `python scripts/inspect_data.py --help`."""

from vecfield_diffusion.commands import inspect

if __name__ == "__main__":
    inspect()
