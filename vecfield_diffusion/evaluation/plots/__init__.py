"""Pictures by theme: filled fields, methods compared, scales, and what a file of velocities is like."""

from vecfield_diffusion.evaluation.plots.animation import MOVING, Moment, check_moving, figure_animation
from vecfield_diffusion.evaluation.plots.drift import figure_drift
from vecfield_diffusion.evaluation.plots.filled import figure_example, figure_inpainting, sample_grid
from vecfield_diffusion.evaluation.plots.inspection import figure_inspection
from vecfield_diffusion.evaluation.plots.methods import (
    Styles,
    figure_calibration,
    figure_cost,
    figure_distance,
    figure_scores,
    method_styles,
)
from vecfield_diffusion.evaluation.plots.scales import figure_generation, figure_series, figure_spectra
from vecfield_diffusion.evaluation.plots.style import NARROW, WIDE, Coordinates, date_of, when
from vecfield_diffusion.evaluation.plots.thermodynamics import figure_thermodynamics

__all__ = [
    "MOVING",
    "NARROW",
    "WIDE",
    "Styles",
    "Coordinates",
    "Moment",
    "check_moving",
    "date_of",
    "figure_animation",
    "figure_calibration",
    "figure_cost",
    "figure_distance",
    "figure_drift",
    "figure_example",
    "figure_generation",
    "figure_inpainting",
    "figure_inspection",
    "figure_scores",
    "figure_series",
    "figure_spectra",
    "figure_thermodynamics",
    "method_styles",
    "sample_grid",
    "when",
]
