"""The formulations of the literature; `base.py` says what a formulation is, and how to write one.

    formulation   alpha(t)                          sigma(t)              training times             prediction
    EDM           1                                 t                     ln t normal or uniform     edm
    VE            1                                 geometric in t        uniform                    score
    VP            exp(-(beta_d t^2 / 2 + beta_min t) / 2)   sqrt(1 - alpha^2)   uniform              noise
    DDPM          sqrt(abar_t)                      sqrt(1 - abar_t)      uniform integers           noise
    IDDPM         1                                 t, from a table       uniform over the table     noise
    Flow          1 - t                             t                     uniform or logit-normal    velocity
    OU            sqrt(1 - t^2)                     t                     uniform                    noise
    Interpolant   1 - t                             gamma sqrt(t (1 - t))  uniform                   velocity
    Thermodynamic exp(-integral of T)               sqrt(1 - alpha^2)     uniform                    noise
    Regression    1                                 t                     the last alone             sample

`inputs=published` keeps c_in and c_noise of the paper, for networks that were made for them; `inputs=unit` takes an
input of unit variance and ln(s) / 4 for all.

    exploding.py      alpha = 1: EDM, VE, IDDPM            preserving.py   alpha^2 + sigma^2 = 1: VP, OU, DDPM
    interpolants.py   alpha = 1 - t: Flow, Interpolant     regression.py   no diffusion: Regression
    thermodynamic.py  alpha^2 + sigma^2 = 1, by a temperature
"""

from vecfield_diffusion.diffusion.formulations.exploding import EDM, IDDPM, VE
from vecfield_diffusion.diffusion.formulations.interpolants import Flow, Interpolant
from vecfield_diffusion.diffusion.formulations.preserving import DDPM, OU, VP
from vecfield_diffusion.diffusion.formulations.regression import Regression
from vecfield_diffusion.diffusion.formulations.thermodynamic import Thermodynamic

__all__ = ["DDPM", "EDM", "IDDPM", "OU", "VE", "VP", "Flow", "Interpolant", "Regression", "Thermodynamic"]
