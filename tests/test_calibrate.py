"""The factor of the spread: closed forms, what it leaves alone, where it is kept and when it is refused."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from programs import FEW, ROOT, Call, is_message

from vecfield_diffusion.commands import evaluate as evaluate
from vecfield_diffusion.commands import infer as infer
from vecfield_diffusion.config.program import option
from vecfield_diffusion.data.fields import Fields
from vecfield_diffusion.errors import UserError
from vecfield_diffusion.evaluation.metrics import scores
from vecfield_diffusion.guidance.posterior import MMPS
from vecfield_diffusion.inference.calibration import (
    apply_factor,
    describe_process,
    find_factor,
    fit_factor,
    store_factor,
)
from vecfield_diffusion.inference.export import load_weights, save_weights
from vecfield_diffusion.inference.method import Method
from vecfield_diffusion.programs.method import process_of
from vecfield_diffusion.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint

SHAPE = (40, 2, 20, 20)


def ensemble(m, spread, seed=0):
    """Truths N(centre, 1) and members N(centre, spread^2), some cells hidden, some unknown."""
    generator = torch.Generator().manual_seed(seed)
    centre, truth = (torch.randn(SHAPE, dtype=torch.float64, generator=generator) for _ in range(2))
    members = centre + spread * torch.randn(m, *SHAPE, dtype=torch.float64, generator=generator)
    where = torch.rand(40, 1, 20, 20, generator=generator) < 0.6
    truth = (centre + truth).masked_fill(torch.rand(SHAPE, generator=generator) < 0.1, torch.nan)
    return members, truth, where


@pytest.mark.parametrize("m", [2, 5, 16])
@pytest.mark.parametrize("spread", [0.5, 1.0, 1.7])
def test_the_factor_of_gaussian_ensembles(m, spread):
    """The mean errs by 1 + spread^2 / m, the spread should have m / (m + 1) of that."""
    exact = ((1 + spread**2 / m) * m / ((m + 1) * spread**2)) ** 0.5
    assert fit_factor(*ensemble(m, spread)) == pytest.approx(exact, rel=0.02)


def test_a_calibrated_ensemble_has_a_spread_equal_to_its_error_and_the_same_mean():
    members, truth, where = ensemble(4, 0.4)
    nothing = torch.zeros_like(where)
    scaled = apply_factor(members, fit_factor(members, truth, where), nothing, 0.0)
    assert scores(scaled, truth, where)["spread_skill"] == pytest.approx(1, rel=1e-12)
    torch.testing.assert_close(scaled.mean(0), members.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(apply_factor(members, 3.0, nothing, 0.0).std(0), 3 * members.std(0))


def test_values_observed_exactly_stay_bit_for_bit():
    members, _, observed = ensemble(3, 0.4)
    members = members.masked_fill(torch.rand(40, 1, 20, 20) < 0.05, torch.nan)
    error = torch.zeros(40, 1, 1, 1)
    error[20:] = 0.1
    scaled = apply_factor(members, 2.0, observed, error)
    held = (observed & (error == 0)).expand(SHAPE)
    assert torch.equal(scaled[:, held].nan_to_num(7.0), members[:, held].nan_to_num(7.0))
    assert torch.equal(scaled.isnan(), members.isnan())
    free = ~held & members.isfinite().all(dim=0)
    torch.testing.assert_close(scaled.std(0)[free], 2 * members.std(0)[free])
    both = observed.expand(SHAPE).clone()
    both[:, 1] = False
    single = apply_factor(members, 2.0, both, 0.0)
    assert torch.equal(
        single[:, :, 0][:, observed[:, 0]].nan_to_num(7.0), members[:, :, 0][:, observed[:, 0]].nan_to_num(7.0)
    )
    there = members[:, :, 1].isfinite().all(dim=0)
    torch.testing.assert_close(single.std(0)[:, 1][there], 2 * members.std(0)[:, 1][there])


def test_what_has_no_factor():
    members, truth, where = ensemble(3, 0.4)
    with pytest.raises(ValueError, match="^members must be >= 2"):
        fit_factor(members[:1], truth, where)
    for given in ((members[:1].expand(3, -1, -1, -1, -1), truth, where), (members, truth, torch.zeros_like(where))):
        with pytest.raises(ValueError, match="^members must differ"):
            fit_factor(*given)


@pytest.mark.parametrize("name", ["best.pt", "shipped.safetensors"])
def test_factors_are_kept_by_process_in_the_checkpoint(tmp_path, name):
    checkpoint, shipped = tmp_path / name, name.endswith("safetensors")
    state = {
        "counters": {"step": 7},
        "ema": {"weight": torch.randn(5, generator=torch.Generator().manual_seed(0))},
        "config": "a: 1",
    }
    save_weights(checkpoint, state, "float16") if shipped else save_checkpoint(checkpoint, state)
    load = load_weights if shipped else load_checkpoint
    before = load(checkpoint)
    config = {"sigma_obs": 0.0, "history": "masked", "sampler": {"steps": (4, 5)}, "physics": None}
    how = {"_target_": "Conditional"}
    track, block = (describe_process(config, {"_target_": mask}, how) for mask in ("Track", "Block"))
    with pytest.raises(UserError, match=rf"{name} was not calibrated. Run vecfield-calibrate ckpt="):
        find_factor(before.get("calibration", ()), track, checkpoint)
    for process, factor in ((track, 1.5), (block, 1.25), (track, 0.1 + 0.2)):
        store_factor(checkpoint, 7, process, factor)
    with pytest.raises(UserError, match="is of step 7 now, but the factor was fitted at step 6"):
        store_factor(checkpoint, 6, track, 9.0)
    after = load(checkpoint)
    known = after.pop("calibration")
    assert len(known) == 2
    assert find_factor(known, track, checkpoint) == 0.1 + 0.2 and find_factor(known, block, checkpoint) == 1.25
    assert after.keys() == before.keys() and torch.equal(after["ema"]["weight"], before["ema"]["weight"])
    noisy = describe_process(config | {"sigma_obs": 0.05}, {"_target_": "Track"}, how)
    with pytest.raises(UserError, match="was calibrated for sigma_obs=0.0, not 0.05. Run"):
        find_factor(known, noisy, checkpoint)
    other = describe_process(config, {"_target_": "Track"}, {"_target_": "MMPS"})
    with pytest.raises(UserError, match="for inpainting={'_target_': 'Conditional'}, not {'_target_': 'MMPS'}"):
        find_factor(known, other, checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_factor_from_before_samplers_had_a_temperature_is_that_of_temperature_one():
    how = {"_target_": "Conditional"}

    def process(**sampler):
        return describe_process({"sigma_obs": 0.0, "sampler": {"steps": 4, **sampler}}, {"_target_": "Track"}, how)

    known = [{"process": process(), "factor": 1.25}]
    assert find_factor(known, process(temperature=1.0), Path("best.pt")) == 1.25
    with pytest.raises(UserError, match="was calibrated for sampler="):
        find_factor(known, process(temperature=0.5), Path("best.pt"))


@pytest.mark.parametrize("given", [[], ["sigma_obs=0.05", "sampler=heun", "physics=divergence", "inpainting=mmps"]])
def test_both_programs_describe_the_same_process_alike(given):
    node = option("mask", "track")
    filled = infer.config("ckpt=run", "mask=track", *given)
    scored = evaluate.config("ckpt=run", "masks=[track]", *given)
    parts = Method(None, MMPS())
    assert process_of(filled, filled["mask"], parts) == process_of(scored, node, parts)
    named = infer.config("ckpt=run", "mask=track", *given, "inpainting=mmps")
    assert process_of(named, named["mask"], parts) == process_of(filled, filled["mask"], parts)


def calibrate(*arguments: str) -> int:
    """The exit code of the script, in this process and folder."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["calibrate.py", *arguments])
        runpy.run_path(str(ROOT / "scripts" / "calibrate.py"), run_name="__main__")
    return end.value.code


def test_the_script_fits_on_the_validation_snapshots(
    place: Path, run: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[int] = []
    original = Fields.read
    monkeypatch.setattr(Fields, "read", lambda self, indices, **k: read.extend(indices) or original(self, indices, **k))
    given = ["ckpt=outputs/train/run", "masks=[block,track]", "cases=3", "inpainting=conditional", *FEW]
    assert calibrate(*given) == 0
    said = capsys.readouterr().out
    checkpoint = find_checkpoint("outputs/train/run")
    state = load_checkpoint(checkpoint)
    assert read and set(map(int, read)) <= set(range(*state["data"]["split"]["validation"]))
    for name in ("block", "track"):
        process = process_of(evaluate.config(*given), option("mask", name), None)
        factor = find_factor(load_checkpoint(checkpoint)["calibration"], process, checkpoint)
        assert 0 < factor < 100 and f"{name}: factor {factor:.4g} on 3 validation snapshots" in said
    filled = {}
    for name, extra in (("plain", []), ("scaled", ["calibrate=true"])):
        how = ["ckpt=outputs/train/run", "mask=block", "inpainting=conditional", f"name={name}", *FEW, *extra]
        assert run("infer", *how)[0] == 0
        with xr.open_dataset(place / "outputs" / "infer" / name / "fields.nc") as data:
            filled[name] = data.load()
    block = process_of(evaluate.config(*given), option("mask", "block"), None)
    factor = find_factor(load_checkpoint(checkpoint)["calibration"], block, checkpoint)
    np.testing.assert_allclose(filled["scaled"]["u_std"], factor * filled["plain"]["u_std"], rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(filled["scaled"]["u"], filled["plain"]["u"], rtol=1e-4, atol=1e-6)
    assert calibrate("ckpt=outputs/train/run", "masks=[pixels]", "cases=2", *FEW) == 0  # auto, which here is:
    for chosen in ("auto", "conditional"):
        how = ["ckpt=outputs/train/run", "mask=pixels", f"inpainting={chosen}", "name=c", *FEW, "calibrate=true"]
        assert run("infer", *how)[0] == 0
    other = ["ckpt=outputs/train/run", "mask=swath", "inpainting=conditional", "name=bad", *FEW, "calibrate=true"]
    is_message(run("infer", *other), "calibrate=true", "mask=")
    for mask, part in (
        ("auto", "hides nothing of its own"),
        ("gaps", "gaps cannot be calibrated: members must differ"),
    ):
        code = calibrate("ckpt=outputs/train/run", f"masks=[{mask}]", "cases=2", "inpainting=conditional", *FEW)
        is_message((code, "", capsys.readouterr().err), part)
    code = calibrate("ckpt=outputs/train/run", "masks=[pixels]", "horizon=2", *FEW)
    is_message((code, "", capsys.readouterr().err), "horizon=2: the spread of forecasts is not calibrated")
