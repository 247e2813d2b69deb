"""Fills the gaps of fields: `python infer.py --help`. Tab completion looks for the text @hydra.main."""

from vecfield_diffusion.commands import infer

if __name__ == "__main__":
    infer()
