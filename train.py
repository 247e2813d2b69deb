"""Trains a model: `python train.py --help`. Tab completion looks for the text @hydra.main."""

from vecfield_diffusion.commands import train

if __name__ == "__main__":
    train()
