"""What each command of the command line takes, and the name of its job: all console scripts start here.

Nothing here imports torch, so that `--help`, `--cfg job` and every tab of completion answer at once; the job, a
function `(configuration, folder) -> scores` of `programs/`, is imported when it is run.
"""

from __future__ import annotations

from vecfield_diffusion.config.program import Program

#: The keys of every program that samples.
SAMPLING = {
    "ckpt": "str",
    "name": "str",
    "members": "int",
    "seed": "int",
    "batch": "int",
    "sigma_obs": "float",
    "history": "Literal['masked', 'whole']",
    "overlap": "float",
    "device": "Literal['auto', 'cpu', 'cuda']",
    "trust": "list[str]",
    "data": "str | None",
}

train = Program(
    "train",
    "vecfield_diffusion.programs.train:train",
    keys={
        "name": "str",
        "seed": "int",
        "device": "Literal['auto', 'cpu', 'cuda']",
        "mean_field": "bool | Literal['auto']",
        "window": "tuple[int, int] | None",
    },
    metric="val/crps",
)

infer = Program(
    "infer",
    "vecfield_diffusion.programs.infer:infer",
    keys={
        **SAMPLING,
        "input": "str | None",
        "names": "tuple[str, str] | None",
        "bin": "float | None",
        "domain": "str | None",
        "time": "int | list[int] | str | None",
        "sigma_obs": "float | str | list[str]",
        "hide": "float",
        "calibrate": "bool",
        "magnitude": "Literal['check', 'any']",
        "output": "str | None",
        "overwrite": "bool",
        "colour": "Literal['speed', 'vorticity']",
        "likelihood": "Literal['none', 'hutchinson', 'exact']",
        "likelihood_steps": "int",
    },
    examples={"ckpt": "python infer.py ckpt=outputs/train/run mask=block"},
    files={"mask": "file"},
    metric="crps",
)

evaluate = Program(
    "evaluate",
    "vecfield_diffusion.programs.evaluate:evaluate",
    keys={
        **SAMPLING,
        "ckpt": "str | list[str]",
        "sigma_obs": "float | str | list[str]",
        "masks": "list[str]",
        "cases": "int",
        "baselines": "str | list[str]",
        "calibrate": "bool",
    },
    examples={"ckpt": "python evaluate.py ckpt=outputs/train/run 'masks=[track,block,pixels]'"},
    lists={"masks": "mask"},
    metric="crps",
)
