"""Scores a model beside the baselines: `python evaluate.py --help`. Tab completion looks for the text @hydra.main."""

from vecfield_diffusion.commands import evaluate

if __name__ == "__main__":
    evaluate()
