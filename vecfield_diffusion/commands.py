"""What each command of the command line takes, and the name of its job: all console scripts start here.

The types of the keys stand here, their defaults and what they mean in `conf/<command>.yaml`. Nothing here imports
torch, so that `--help`, `--cfg job` and every tab of completion answer at once; the job, a function
`(configuration, folder) -> scores` of `programs/`, is imported when it is run.
"""

from __future__ import annotations

from vecfield_diffusion.config.program import Program
from vecfield_diffusion.config.spelling import Spelling

_DEVICE = "Literal['auto', 'cpu', 'cuda']"
_GPU = {"device": {"gpu": "cuda"}}
_SEVERAL = (
    "add -m to run each by itself, or score them side by side: python evaluate.py ckpt=RUN 'masks=[track,block,pixels]'"
)

#: Keys that results do not depend on, in the programs that sample.
_FREE = ("batch", "data", "device", "trust", "colour", "figure", "output", "overwrite", "metadata")

#: The keys of every program that samples.
SAMPLING = {
    "ckpt": "str",
    "name": "str",
    "members": "int",
    "seed": "int",
    "batch": "int",
    "sigma_obs": "float | str | list[str]",
    "sigma_scale": "float | str | None",
    "radars": "list[list[float]]",
    "calibrate": "bool",
    "history": "Literal['masked', 'whole']",
    "overlap": "float",
    "device": _DEVICE,
    "trust": "list[str]",
    "data": "str | None",
}

train = Program(
    name="train",
    job="vecfield_diffusion.programs.train:train",
    keys={
        "name": "str",
        "seed": "int",
        "device": _DEVICE,
        "mean_field": "bool | Literal['auto']",
        "start": "str | None",
        "ckpt": "str | None",
        "window": "tuple[int, int] | None",
    },
    spelling=Spelling(
        implied={"dataset.path": "dataset=file"},
        values=_GPU,
        answers={
            "epochs": "training is counted in steps, each of one batch: n epochs are trainer.max_steps = n x snapshots"
            " / trainer.batch_size; 10 epochs of 1024 snapshots in batches of 32 are trainer.max_steps=320"
        },
    ),
    metric="val/crps",
)

infer = Program(
    name="infer",
    job="vecfield_diffusion.programs.infer:infer",
    keys={
        **SAMPLING,
        "ckpt": "str | list[str]",
        "weights": "list[float] | Literal['evidence'] | None",
        "input": "str | None",
        "names": "tuple[str, str] | None",
        "bin": "float | None",
        "error_scales": "tuple[float, float] | None",
        "thin": "int | str | None",
        "domain": "str | None",
        "time": "int | list[int] | str | None",
        "hide": "float",
        "magnitude": "Literal['check', 'any']",
        "zeros": "Literal['gaps', 'land'] | None",
        "quality": "Literal['all', 'good_or_unknown', 'good'] | None",
        "output": "str | None",
        "overwrite": "bool",
        "figure": "str",
        "colour": "Literal['speed', 'vorticity']",
        "likelihood": "Literal['none', 'hutchinson', 'exact', 'energy']",
        "likelihood_steps": "int",
        "thermodynamics": "bool",
        "time_context": "Literal['both', 'past']",
        "horizon": "int",
        "metadata": "dict[str, str | float | None]",
        "products": "list[Literal['quantiles', 'exceedance', 'direction', 'energy', 'vorticity', 'strain']]",
        "quantiles": "list[float]",
        "exceed": "dict[str, float | str | list[float | str]] | None",
        "split": "bool",
    },
    examples={
        "ckpt": "python infer.py ckpt=outputs/train/run mask=block; or without a network, the series of a file from "
        "itself: python infer.py ckpt=none input=my.nc"
    },
    resolves=("mask", "inpainting"),
    spelling=Spelling(files={"mask": "file"}, values=_GPU, answers={"mask": _SEVERAL}),
    free=_FREE,
    metric="crps",
)

_SCORING = {**SAMPLING, "ckpt": "str | list[str]", "masks": "list[str]", "cases": "int", "baselines": "str | list[str]"}
_SCORING |= {
    "time_context": "Literal['both', 'past']",
    "series": "bool",
    "horizon": "int | list[int]",
    "exceed": "float | None",
}
_MASKS = Spelling(instead={"mask": "masks"}, values=_GPU)

evaluate = Program(
    name="evaluate",
    job="vecfield_diffusion.programs.evaluate:evaluate",
    keys=_SCORING,
    examples={"ckpt": "python evaluate.py ckpt=outputs/train/run 'masks=[track,block,pixels]'"},
    lists={"masks": "mask"},
    resolves=("mask", "inpainting"),
    spelling=_MASKS,
    free=_FREE,
    metric="crps",
)

calibrate = Program(
    name="calibrate",
    job="vecfield_diffusion.programs.calibrate:calibrate",
    keys=_SCORING,
    examples={"ckpt": "vecfield-calibrate ckpt=outputs/train/run 'masks=[track,block]'"},
    lists={"masks": "mask"},
    resolves=("mask", "inpainting"),
    spelling=_MASKS,
    folder=False,
)

export = Program(
    name="export",
    job="vecfield_diffusion.programs.export:export",
    keys={
        "ckpt": "str | None",
        "from": "str | None",
        "format": "Literal['safetensors', 'program']",
        "dtype": "Literal['float32', 'float16']",
        "data": "str | None",
        "out": "str | None",
        "trust": "list[str]",
    },
    folder=False,
)

drift = Program(
    name="drift",
    job="vecfield_diffusion.programs.drift:drift",
    keys={
        "input": "str",
        "name": "str",
        "overwrite": "bool",
        "at": "list[float | list[float]] | None",
        "starts": "int",
        "radius": "float",
        "drifters": "int",
        "time": "int | str",
        "hours": "float | None",
        "diffusivity": "float",
        "substeps": "int",
        "levels": "list[float]",
        "place": "list[float] | None",
        "figure": "str",
        "seed": "int",
    },
    examples={"input": "vecfield-drift input=outputs/infer/run/fields.nc at=[18.5,-35.2] hours=72"},
    free=("figure", "overwrite"),
    metric="arrival",
)

inspect = Program(
    name="inspect",
    job="vecfield_diffusion.programs.inspect:inspect_file",
    keys={},
    examples={"dataset.path": "vecfield-inspect my.nc"},
    resolves=("dataset",),
    spelling=Spelling(subject="dataset"),
    folder=False,
)
