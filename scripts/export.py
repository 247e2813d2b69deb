"""A trained model in one file, and back: `python scripts/export.py --help`."""

from vecfield_diffusion.commands import export

if __name__ == "__main__":
    export()
