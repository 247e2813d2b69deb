# What type checkers and editors see of the lazy imports of __init__.py.
from vecfield_diffusion.library import evaluate as evaluate
from vecfield_diffusion.library import fill as fill
from vecfield_diffusion.library import inspect as inspect
from vecfield_diffusion.library import load as load
from vecfield_diffusion.library import open as open
from vecfield_diffusion.library import train as train

__version__: str
__all__ = ["evaluate", "fill", "inspect", "load", "open", "train"]
