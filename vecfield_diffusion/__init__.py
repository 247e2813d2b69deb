"""Diffusion models that fill the gaps of two-component vector fields."""

__version__ = "0.1.0"
