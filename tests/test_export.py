"""Models as single files: weights that come back bit for bit, and a program that needs torch alone."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from programs import FEW, PROGRAMS, ROOT, SMALL, is_message
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vecfield_diffusion.data.readers.hdf5 import write_hdf5
from vecfield_diffusion.diffusion.base import Diffusion
from vecfield_diffusion.diffusion.denoiser import Denoiser
from vecfield_diffusion.diffusion.formulations import DDPM, EDM, IDDPM, VE, VP, Interpolant
from vecfield_diffusion.diffusion.normalizer import Normalizer
from vecfield_diffusion.diffusion.observation import Observation
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.inference.export import load_weights, save_program, save_weights
from vecfield_diffusion.models.unet import UNet
from vecfield_diffusion.physics.grid import Grid
from vecfield_diffusion.programs.trained import load_trained
from vecfield_diffusion.samplers.deterministic import Euler
from vecfield_diffusion.training.checkpoint import load_checkpoint

CPU = torch.device("cpu")
SHAPE = (9, 12)


def network(seed: int = 0, **options: object) -> UNet:
    """A periodic axis, attention, sizes that are padded; weights that are not zero anywhere."""
    torch.manual_seed(seed)
    unet = UNet(7, 2, periodic=(False, True), channels=[8, 8], blocks=1, embedding=16, **options)
    for weight in unet.parameters():
        nn.init.normal_(weight, std=0.2)
    return unet


def grid() -> Grid:
    valid = torch.ones(SHAPE, dtype=torch.bool)
    valid[:2, :3] = False
    return Grid(valid, dx=torch.linspace(1000, 1100, SHAPE[0]), dy=-1200.0, boundary_x="periodic", boundary_y="wall")


def denoiser(diffusion: nn.Module) -> Denoiser:
    mean = torch.linspace(-1, 1, 2 * 9 * 12).reshape(2, *SHAPE)
    model = Denoiser(network(), diffusion, Normalizer(mean, 0.3)).to(memory_format=torch.channels_last)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as training leaves it: weights in channels_last, a learned weight of the levels."""
    place = tmp_path_factory.mktemp("place")
    fields = np.random.default_rng(0).standard_normal((40, 2, 16, 16), dtype=np.float32)
    write_hdf5(place / "fields.h5", fields)
    given = ["debug=fast", *SMALL, "diffusion.uncertainty=true", "trainer.max_steps=3", "trainer.batch_size=4"]
    folder = place / "outputs" / "train" / "run"
    folder.mkdir(parents=True)
    main, train = PROGRAMS["train"]
    train(main.config("dataset=hdf5", f"dataset.path={place}/fields.h5", *given), folder)
    return folder


def export(*arguments: str) -> int:
    """The exit code of the script, in this process and folder."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["export.py", *arguments])
        runpy.run_path(str(ROOT / "scripts" / "export.py"), run_name="__main__")
    return end.value.code


def identical(first: object, second: object) -> bool:
    """Whether two trees have the same keys, types and values, tensors bit for bit."""
    if isinstance(first, dict):
        same = isinstance(second, dict) and list(map(str, sorted(first))) == list(map(str, sorted(second)))
        return same and all(identical(first[key], second[key]) for key in first)
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    return type(first) is type(second) and first == second


def test_weights_come_back_bit_for_bit(run: Path, tmp_path: Path) -> None:
    path = run / "checkpoints" / "last.pt"
    state = load_checkpoint(path) | {"context": {"mean": {"a/b": [0.1, 2]}, "names": [], "std": {}}, "empty": None}
    assert state["diffusion"] and state["counters"]["best"] > 0
    save_weights(tmp_path / "a.safetensors", state)
    back = load_weights(tmp_path / "a.safetensors")
    left = {"format", "version", "network", "optimizer", "losses"}
    assert set(back) == set(state) - left
    assert all(identical(back[key], state[key]) for key in back)


def test_half_the_size_to_half_precision(run: Path, tmp_path: Path) -> None:
    state = load_checkpoint(run / "checkpoints" / "last.pt")
    for dtype in ("float32", "float16"):
        save_weights(tmp_path / f"{dtype}.safetensors", state, dtype)
    back = load_weights(tmp_path / "float16.safetensors")
    rounded = 0
    for name, weight in state["ema"].items():
        assert back["ema"][name].dtype == torch.float32
        error = (back["ema"][name] - weight).abs()
        assert (error <= 2.0**-11 * weight.abs() + 2.0**-25).all()
        rounded += int((error > 0).sum())
    assert rounded > 0
    assert all(identical(back[key], state[key]) for key in back if key != "ema")
    with safe_open(tmp_path / "float16.safetensors", framework="pt") as file:
        assert {file.get_tensor(f"ema/{name}").dtype for name in state["ema"]} == {torch.float16}


def test_a_weight_beyond_float16_is_refused(run: Path, tmp_path: Path) -> None:
    state = load_checkpoint(run / "checkpoints" / "last.pt")
    state["ema"] = {**state["ema"], "stem.bias": torch.full((8,), 1e5)}
    with pytest.raises(UserError, match="dtype=float16: the weight stem.bias is too large"):
        save_weights(tmp_path / "a.safetensors", state, "float16")
    assert not list(tmp_path.iterdir())


def test_there_and_back_by_the_command_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parents[2])
    assert export("ckpt=outputs/train/run") == 0
    assert "next: vecfield-export from=outputs/export/run.safetensors" in capsys.readouterr().out
    assert export("from=outputs/export/run.safetensors", "out=outputs/train/shipped") == 0
    said = capsys.readouterr().out
    assert f"next: python infer.py ckpt=outputs/train/shipped mask=block data={run.parents[2]}/fields.h5" in said
    first, second = (load_trained(f"outputs/train/{name}", CPU) for name in ("run", "shipped"))
    assert identical(dict(first.denoiser.state_dict()), dict(second.denoiser.state_dict()))
    assert identical(first.grid.state_dict(), second.grid.state_dict())
    for name in ("config", "statistics", "split", "step", "units"):
        assert getattr(first, name) == getattr(second, name)
    main, infer = PROGRAMS["infer"]
    with pytest.raises(UserError, match="a checkpoint does not choose what is opened here .* data=FILE"):
        infer(main.config("ckpt=outputs/train/shipped", "mask=block", *FEW), Path("outputs/infer/refused"))
    data = f"data={first.config['dataset']['path']}"
    infer(main.config("ckpt=outputs/train/shipped", "mask=block", data, *FEW), Path("outputs/infer/shipped"))
    assert Path("outputs/infer/shipped/fields.nc").exists()
    capsys.readouterr()
    code = export("from=outputs/export/run.safetensors", "out=outputs/train/shipped")
    is_message((code, *capsys.readouterr()), "out=outputs/train/shipped holds a run already")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["give either ckpt=outputs/train/NAME", "or from=FILE.safetensors"]),
        (["cpkt=a"], ["unknown key cpkt", "Did you mean 'ckpt'"]),
        (["ckpt=nowhere"], ["nowhere: no checkpoint there"]),
        (["from=nowhere.safetensors"], ["no file there"]),
        (["ckpt=outputs/train/run", "format=onnx"], ["format=onnx: expected one of safetensors, program"]),
        (["ckpt=outputs/train/run", "format=program", "dtype=float16"], ["dtype=float16 is for format=safetensors"]),
        (["ckpt=outputs/train/run", "out=model.bin"], ["out=model.bin", "ends in .safetensors"]),
    ],
)
def test_bad_command_lines_are_one_line(
    run: Path,
    arguments: list[str],
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(run.parents[2])
    is_message((export(*arguments), *capsys.readouterr()), *parts)


def damage(path: Path, kind: str) -> None:
    contents = bytearray(path.read_bytes())
    if kind == "cut":
        del contents[-100:]
    elif kind == "flipped":
        contents[-50] ^= 1
    elif kind == "config":
        place = contents.index(b"fields.h5")
        contents[place] ^= 1
    elif kind == "text":
        contents = bytearray(b"not a model\n")
    elif kind == "foreign":
        return save_file({"weight": torch.ones(2)}, path)
    elif kind == "newer":
        return save_file({"weight": torch.ones(2)}, path, {"format": "vecfield-weights", "version": "2"})
    path.write_bytes(contents)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("cut", "not a whole safetensors file"),
        ("text", "not a whole safetensors file"),
        ("flipped", "do not match their check sum"),
        ("config", "do not match their check sum"),
        ("foreign", "of another program"),
        ("newer", "version 2, but this program reads version 1"),
    ],
)
def test_damaged_and_foreign_files_are_refused(run: Path, tmp_path: Path, kind: str, match: str) -> None:
    path = tmp_path / "a.safetensors"
    save_weights(path, load_checkpoint(run / "checkpoints" / "last.pt"))
    damage(path, kind)
    with pytest.raises(UserError, match=match):
        load_weights(path)


def test_a_file_that_names_code_makes_no_folder(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parents[2])
    state = load_checkpoint(run / "checkpoints" / "last.pt")
    config = yaml.safe_load(state["config"])
    config["model"] = {"_target_": "os.system", "command": "touch harm"}
    save_weights(Path("bad.safetensors"), {**state, "config": yaml.safe_dump(config)})
    is_message((export("from=bad.safetensors", "out=outputs/train/bad"), *capsys.readouterr()), "os.system")
    assert not Path("harm").exists() and not Path("outputs/train/bad/checkpoints").exists()


def arguments(n: int, levels: Tensor) -> list[Tensor]:
    """Random arguments of a program at levels drawn from `levels`, NaN where nothing is observed."""
    g = torch.Generator().manual_seed(n)
    s = levels[torch.randint(len(levels), (n,), generator=g)]
    y, noise = (torch.randn(n, 2, *SHAPE, generator=g) for _ in range(2))
    valid = grid().valid.expand(n, 1, *SHAPE).clone()
    observed = (torch.rand(n, 1, *SHAPE, generator=g) < 0.3) & valid
    z = y + s[:, None, None, None] * noise
    return [z, s, torch.where(observed, y, torch.nan), observed, 0.1 * torch.rand(n, 1, *SHAPE, generator=g), valid]


ALONE = """
import json, sys
sys.modules["vecfield_diffusion"] = None  # importing it raises
import torch
from torch import nn
folder = sys.argv[1]
files = {"vecfield.json": ""}
program = torch.export.load(f"{folder}/net.pt2", extra_files=files).module()
about = json.loads(files["vecfield.json"])
fields = [program(*each) for each in torch.load(f"{folder}/arguments.pt")]

noise = torch.load(f"{folder}/noise.pt")
n, levels = len(noise), about["levels"]
valid = torch.tensor(about["grid"]["valid"], dtype=torch.bool).expand(n, 1, *about["shape"])
nothing = torch.zeros_like(noise), torch.zeros_like(valid), torch.zeros(n, 1, *about["shape"]), valid
z = levels[0] * noise
for s, r in zip(levels, levels[1:]):
    d = program(z, torch.full((n,), s), *nothing)
    z = d + (r / s) * (z - d)
sample = z * about["std"] + torch.tensor(about["mean"])
assert not [name for name in sys.modules if name.startswith("vecfield_diffusion.")]
torch.save({"fields": fields, "sample": sample}, f"{folder}/results.pt")
"""


@pytest.mark.filterwarnings("error:No complete tensor")
def test_a_program_runs_without_this_package(tmp_path: Path) -> None:
    """Other batches than it was exported with, every level, and a whole sample by what its JSON says alone."""
    model = denoiser(EDM(sigma_max=30.0))
    save_program(tmp_path / "net.pt2", model, grid(), "cm s-1")
    levels = model.diffusion.levels(32, "log_snr")[:-1].float()
    given = [arguments(n, levels) for n in (1, 4, 7)]
    noise = torch.randn(3, 2, *SHAPE, generator=torch.Generator().manual_seed(9))
    torch.save(given, tmp_path / "arguments.pt")
    torch.save(noise, tmp_path / "noise.pt")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALONE, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results.pt")
    for field, (z, s, *observed) in zip(results["fields"], given, strict=True):
        torch.testing.assert_close(field, model(z, s, Observation(*observed)), rtol=1e-5, atol=1e-5)
    nothing = Observation.none(3, grid().valid)
    z = torch.tensor(30.0) * noise
    grid_levels = model.diffusion.levels(32, "log_snr")
    for s, r in zip(grid_levels[:-1].tolist(), grid_levels[1:].tolist(), strict=True):
        z = Euler(32).step(lambda z, s: model(z, torch.full((3,), s), nothing), z, s, r, None, {})
    inside = grid().valid.expand_as(z)
    torch.testing.assert_close(results["sample"][inside], model.normalizer.denormalize(z)[inside], rtol=1e-4, atol=1e-4)
    assert str(ROOT).encode() not in (tmp_path / "net.pt2").read_bytes()


@pytest.mark.parametrize("time", ["channels", "attention"])
def test_a_program_of_sequences_takes_frames(tmp_path: Path, time: str) -> None:
    unet = network(frames=3, time=time)
    model = Denoiser(unet, EDM(sigma_max=20.0), Normalizer(torch.zeros(2, *SHAPE), 0.3)).eval().requires_grad_(False)
    save_program(tmp_path / "net.pt2", model, grid(), frames=3)
    files = {"vecfield.json": ""}
    program = torch.export.load(tmp_path / "net.pt2", extra_files=files).module()
    about = json.loads(files["vecfield.json"])
    assert about["frames"] == 3 and about["inputs"]["y"] == "float32 (B, T, 2, H, W)"
    generator = torch.Generator().manual_seed(0)
    z, y = (torch.randn(4, 3, 2, *SHAPE, generator=generator) for _ in range(2))
    valid = grid().valid.expand(4, 3, 1, *SHAPE).clone()
    observed = (torch.rand(4, 3, 1, *SHAPE, generator=generator) < 0.3) & valid
    given = y, observed, torch.full(observed.shape, 0.1), valid
    s = torch.tensor([0.1, 1.0, 3.0, 10.0])
    torch.testing.assert_close(program(z, s, *given), model(z, s, Observation(*given)), rtol=1e-5, atol=1e-5)


class Tabulated(Diffusion):
    """A path whose times come from the table of the base class, and its velocity from automatic differentiation."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(torch.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(torch.pi / 2 * t)


class Pointwise(nn.Module):
    """A small network that depends on all that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.layer(x) * (1 + noise[:, None, None, None]).sin()


def pointwise(diffusion: Diffusion) -> Denoiser:
    """Its training was in bfloat16, which a program leaves behind."""
    normalizer = Normalizer(torch.zeros(2, *SHAPE), 1.0)
    return Denoiser(Pointwise(), diffusion, normalizer, autocast=torch.bfloat16).eval().requires_grad_(False)


@pytest.mark.parametrize("make", [VP, DDPM, IDDPM, lambda: Tabulated(t_max=0.99, prediction="velocity")])
def test_times_of_tables_and_roots_are_exported_exactly(tmp_path: Path, make: type) -> None:
    model = pointwise(make())
    save_program(tmp_path / "net.pt2", model, grid())
    program = torch.export.load(tmp_path / "net.pt2").module()
    z, s, *observed = arguments(20, model.diffusion.levels(99, "log_snr")[:-1].float())
    assert torch.equal(program(z, s, *observed), model.in_float32()(z, s, Observation(*observed)))


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="format=program: Interpolant starts from a first guess"):
        save_program(tmp_path / "net.pt2", denoiser(Interpolant()), grid())
    with pytest.raises(UserError, match="format=program: this network cannot be exported: torch.export says") as caught:
        save_program(tmp_path / "net.pt2", pointwise(VE(prediction="velocity")), grid())
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
