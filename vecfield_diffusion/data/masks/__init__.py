"""Which cells are observed: families of random masks for training and tests, and the mask of a file.

A mask is a callable `mask(n, valid (H, W), generator) -> (n, 1, H, W)`, boolean, True = observed; a function may stand
for one. It observes valid cells only, and at least one unless emptiness was asked for. All randomness comes from the
generator, so that one seed gives one set of masks. A fraction is a share of the valid cells (of all cells for `Block`,
whose rectangle may lie partly on land); where a range `[low, high]` is accepted every sample draws its own value.

Through a sequence a mask is drawn anew in each frame, fixed in place, or moving: `Mask.sequence`.
"""

from vecfield_diffusion.data.given_masks import load_mask
from vecfield_diffusion.data.masks.base import Drawn, Mask
from vecfield_diffusion.data.masks.file import MaskFile
from vecfield_diffusion.data.masks.frames import Ahead, Missing
from vecfield_diffusion.data.masks.mixture import Mixture
from vecfield_diffusion.data.masks.passing import Clouds, Swath
from vecfield_diffusion.data.masks.spatial import Block, Border, Empty, Full, Pixels
from vecfield_diffusion.data.masks.track import Track

__all__ = [
    "Ahead",
    "Block",
    "Border",
    "Clouds",
    "Drawn",
    "Empty",
    "Full",
    "Mask",
    "MaskFile",
    "Missing",
    "Mixture",
    "Pixels",
    "Swath",
    "Track",
    "load_mask",
]
