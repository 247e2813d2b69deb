"""The checker and the builder against sources written here, and against every option that is shipped."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vecfield_diffusion.commands import calibrate, evaluate, export, infer, train
from vecfield_diffusion.commands import inspect as inspect_command
from vecfield_diffusion.config import build as builder
from vecfield_diffusion.config import schema, sources
from vecfield_diffusion.config.build import MOVED, build, named_files, resolve
from vecfield_diffusion.config.kinds import Kind, kind
from vecfield_diffusion.config.moved import RENAMED, present_names, say_once
from vecfield_diffusion.config.overrides import Composer
from vecfield_diffusion.config.program import CONF, Program
from vecfield_diffusion.config.schema import Checker, fit, signature
from vecfield_diffusion.config.spelling import Reader, Spelling
from vecfield_diffusion.errors import UserError

SHAPES = """
from __future__ import annotations
import os
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack
from outside import Stranger
Colour = Literal["red", "blue"]
class Base:
    def __init__(self, steps: int = 4, *, rate: float = 0.5) -> None:
        if steps < 1:
            raise ValueError(f"steps must be >= 1, got {steps}")
        self.steps, self.rate = steps, rate
class Inherits(Base): pass
class Passes(Base):
    def __init__(self, colour: Colour = "red", **others: object) -> None:
        super().__init__(**others)
        self.colour = colour
class Sizes(TypedDict, total=False):
    steps: int
class Unpacks:
    def __init__(self, colour: Colour = "red", **sizes: Unpack[Sizes]) -> None:
        self.base = Base(**sizes)
@dataclass
class Record:
    size: tuple[int, int]
    part: Base | None = None
    parts: list[Base] | None = None
@dataclass
class Longer(Record):
    label: str = "a"
def function(x: int, y: float = 1.0) -> tuple[int, float]:
    return x, y
class Adopted(Stranger): pass
"""


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package `shapes` that stands for ours: `shapes.forms` defines, `shapes` re-exports."""
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "forms.py").write_text(SHAPES)
    (tmp_path / "shapes" / "__init__.py").write_text("from .forms import Base, Inherits as Heir\n")
    (tmp_path / "outside.py").write_text("class Stranger:\n    def __init__(self, x): self.x = x\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(schema, "PACKAGES", ("shapes", "torch"))
    monkeypatch.setattr(builder, "PACKAGE", "shapes")
    monkeypatch.setattr(builder, "ROOMS", ("shapes",))
    for cache in (sources.module_file, sources.read_module, signature):
        cache.cache_clear()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("shapes", "outside")]:
        del sys.modules[name]


def of(text: str) -> Kind:
    return kind(ast.parse(text, mode="eval").body)


@pytest.mark.parametrize(
    ("annotation", "value", "result"),
    [
        ("int", 3, 3),
        ("float", 3, 3.0),
        ("float", "1e-3", 0.001),
        ("float", ".5", 0.5),
        ("str", 7, "7"),
        ("bool", True, True),
        ("int | None", None, None),
        ("Optional[int]", None, None),
        ("float | str", "1e-3", 0.001),
        ("float | str", "auto", "auto"),
        ("int | float", 3, 3),
        ("float | int", 3, 3),
        ("Literal['auto', 3] | float", 3, 3),
        ("list[float]", [1, "2e0"], [1.0, 2.0]),
        ("tuple[int, ...]", [1, 2, 3], (1, 2, 3)),
        ("tuple[int, float]", [1, 2], (1, 2.0)),
        ("int | tuple[int, int]", [1, 2], (1, 2)),
        ("Sequence[str]", ["a"], ["a"]),
        ("dict[str, float]", {"a": 1}, {"a": 1.0}),
        ("'int | None'", 4, 4),
        ("Any", {"a": [None]}, {"a": [None]}),
        ("torch.Tensor", "whatever", "whatever"),
        ("list", [1, "a"], [1, "a"]),
    ],
)
def test_a_value_that_fits_arrives_as_annotated(annotation: str, value: Any, result: Any) -> None:
    got = fit("key", value, of(annotation))
    assert got == result and type(got) is type(result)


@pytest.mark.parametrize(
    ("annotation", "value", "message"),
    [
        ("int", "abc", "key=abc: expected a whole number, got 'abc'"),
        ("int", 3.0, "key=3.0: expected a whole number, got 3.0"),
        ("int", True, "key=true: expected a whole number, got True"),
        ("int", "", "key=: expected a whole number, got nothing"),
        ("int", None, "key=null: expected a whole number, got null"),
        ("float", "1e-3x", "key=1e-3x: expected a number, got '1e-3x'"),
        ("float", True, "key=true: expected a number, got True"),
        ("str", "", "key=: expected text, got nothing"),
        ("bool", 1, "key=1: expected true or false, got 1"),
        ("None | int", "x", "key=x: expected a whole number or null, got 'x'"),
        ("Literal['auto', 'cpu']", "cpus", "key=cpus: expected one of auto, cpu, got 'cpus'. Did you mean 'cpu'?"),
        ("Literal[1]", True, "key=true: expected one of 1, got True"),
        ("list[int]", 3, "key=3: expected a list (each a whole number), got 3"),
        ("list[int]", [1, "a"], "key=[1,a]: expected a list (each a whole number), got [1, 'a']"),
        ("tuple[int, int]", [1], "key=[1]: expected a list of 2 (a whole number, a whole number), got [1]"),
        ("float | Tensor", "abc", "key=abc: expected a number, got 'abc'"),
    ],
)
def test_a_value_that_does_not_fit_is_named(annotation: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        fit("key", value, of(annotation))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("target", "parameters", "is_open"),
    [
        ("shapes.forms.Base", ["steps", "rate"], False),
        ("shapes.Base", ["steps", "rate"], False),
        ("shapes.Heir", ["steps", "rate"], False),
        ("shapes.forms.Passes", ["steps", "rate", "colour"], False),
        ("shapes.forms.Unpacks", ["colour", "steps"], False),
        ("shapes.forms.Longer", ["size", "part", "parts", "label"], False),
        ("shapes.forms.function", ["x", "y"], False),
        ("shapes.forms.Adopted", [], True),
    ],
)
def test_signatures_are_read_without_importing(shapes: None, target: str, parameters: list[str], is_open: bool) -> None:
    found = signature(target)
    assert found is not None
    assert list(found.parameters) == parameters and found.open == is_open
    assert "shapes" not in sys.modules


def test_signatures_of_torch_and_of_strangers(shapes: None) -> None:
    adam = signature("torch.optim.AdamW")
    assert adam is not None and {"params", "lr", "betas", "weight_decay"} <= set(adam.parameters)
    assert signature("somebody.else.Sampler") is None


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"stepz": 3}, "unknown key sampler.stepz. Did you mean 'steps'? The keys of sampler are: rate, steps."),
        ({"steps": "abc"}, "sampler.steps=abc: expected a whole number, got 'abc'"),
        ({"steps": "???"}, "sampler.steps= is missing"),
    ],
)
def test_a_node_is_checked_against_its_constructor(shapes: None, node: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Checker().node({"_target_": "shapes.forms.Inherits"} | node, "sampler")
    assert str(caught.value) == message


def test_nodes_within_nodes_are_checked_and_aliases_followed(shapes: None) -> None:
    inner = {"_target_": "shapes.forms.Passes", "colour": "blue", "steps": 2}
    record = {"_target_": "shapes.forms.Record", "size": [1, 2], "part": inner, "parts": [inner, inner]}
    assert Checker().node(record, "r") == record | {"size": (1, 2)}
    record["parts"] = [inner, inner | {"colour": "green"}]
    with pytest.raises(UserError, match=r"^r\.parts\[1\]\.colour=green: expected one of red, blue, got 'green'"):
        Checker().node(record, "r")


def test_a_target_that_is_not_there_is_named(shapes: None) -> None:
    with pytest.raises(UserError, match=r"^r\._target_: shapes\.forms\.Bass is neither .* Did you mean 'Base'\?$"):
        Checker().node({"_target_": "shapes.forms.Bass"}, "r")


def test_keys_outside_every_node(shapes: None) -> None:
    checker = Checker(
        {"seed": "int", "ckpt": "str", "trainer.steps": "int"}, ["sampler", "mask", "trainer"], {"ckpt": "do"}
    )
    node = {"_target_": "shapes.Base", "steps": 3}
    good = {"seed": 1, "ckpt": "a", "sampler": node, "mask": {}, "trainer": {"steps": 3}}
    assert checker.root(good) == good
    for change, message in [
        ({"ckpt": "???"}, "^ckpt= is missing: do$"),
        ({"sed": 1}, "^unknown key sed. Did you mean 'seed'?"),
        ({"mask": {"size": 1}}, "^unknown key mask.size"),
        ({"trainer": {"step": 1}}, "^unknown key trainer.step. Did you mean 'steps'?"),
        ({"sampler": 3}, "^sampler=3: expected a group of keys, got 3$"),
    ]:
        with pytest.raises(UserError, match=message):
            checker.root(good | change)


def test_a_program_may_describe_a_key_that_it_fills_in(shapes: None) -> None:
    node = {"_target_": "shapes.Base", "steps": "auto"}
    checker = Checker({"sampler.steps": "int | Literal['auto']"}, ["sampler"])
    assert checker.root({"sampler": node}) == {"sampler": node}
    with pytest.raises(UserError, match=r"^sampler\.steps=aut: expected one of auto or a whole number, got 'aut'"):
        checker.root({"sampler": node | {"steps": "aut"}})


def test_what_is_missing_is_no_error_where_the_configuration_is_only_shown(shapes: None) -> None:
    assert Checker({"ckpt": "str"}, complete=False).root({"ckpt": "???"}) == {"ckpt": "???"}


# Building.


def test_build_makes_nested_objects(shapes: None) -> None:
    inner = {"_target_": "shapes.forms.Base", "steps": 2, "rate": "1e-1"}
    made = build({"_target_": "shapes.forms.Longer", "size": [1, 2], "parts": [inner, inner]}, "r", part=7)
    assert (made.size, made.label, made.part) == ((1, 2), "a", 7)
    assert [(part.steps, part.rate) for part in made.parts] == [(2, 0.1), (2, 0.1)]
    assert made.parts[0] is not made.parts[1]
    assert build({"_target_": "shapes.forms.function", "x": 1}, trusted=True) == (1, 1.0)


def test_the_empty_option_builds_nothing() -> None:
    assert build({}) is None and build(None) is None


def test_what_a_constructor_refuses_names_the_key(shapes: None) -> None:
    with pytest.raises(UserError) as caught:
        build({"_target_": "shapes.forms.Record", "size": [1, 1], "part": {"_target_": "shapes.Base", "steps": 0}}, "r")
    assert str(caught.value) == "r.part.steps: must be >= 1, got 0"
    with pytest.raises(UserError, match=r"^r: .*missing 1 required positional argument: 'size'$"):
        build({"_target_": "shapes.forms.Record"}, "r")


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "shapes.forms.os.system",
        "shapes.forms.Stranger",
        "shapesque.Thing",
        "torch.os.system",
        "torch.load",
        "torch.hub.load",
        "torch.nn.functional.torch.hub.load",
        "torch.nn.functional.relu",
        "torch.nn.Module.__init__",
        "torchvision.ops.nms",
        "outside.Stranger",
    ],
)
def test_a_checkpoint_may_not_name_what_lies_outside(shapes: None, target: str) -> None:
    with pytest.raises(UserError, match="may name only classes and functions defined in"):
        resolve(target)
    with pytest.raises(UserError, match=r"^m\.inner\._target_"):
        build({"inner": {"_target_": target}}, "m")


def test_a_checkpoint_may_not_name_the_applications() -> None:
    for target in ("vecfield_diffusion.config.build.build", "vecfield_diffusion.config.program.Program"):
        with pytest.raises(UserError, match="may name only"):
            resolve(target)


def test_a_checkpoint_may_open_data_and_call_nothing_else() -> None:
    """Functions that write a file at a path of the author's choice were as good as code."""
    assert callable(resolve("vecfield_diffusion.data.hdf5.open_hdf5"))
    for target in (
        "vecfield_diffusion.atomic.write_text_atomic",
        "vecfield_diffusion.data.readers.hdf5.write_hdf5",
        "vecfield_diffusion.training.checkpoint.save_checkpoint",
        "vecfield_diffusion.training.loggers.JSONLines",
    ):
        with pytest.raises(UserError, match="may name only"):
            resolve(target)
        assert callable(resolve(target, trusted=True))


def test_what_may_be_named(shapes: None) -> None:
    import outside  # of the fixture
    import torch

    assert resolve("torch.nn.Linear") is torch.nn.Linear
    assert resolve("torch.optim.AdamW") is torch.optim.AdamW
    assert resolve("shapes.Heir").__name__ == "Inherits"
    assert resolve("outside.Stranger", trust=["outside"]) is outside.Stranger
    assert resolve("outside.Stranger", trusted=True) is outside.Stranger
    with pytest.raises(UserError, match=r"add trust=\[outside\]$"):
        resolve("outside.Stranger", trust=["out"])
    with pytest.raises(UserError, match="PYTHONPATH"):
        resolve("nowhere.at.All", trusted=True)


# What is shipped.

OPTIONS = sorted(file.relative_to(CONF).with_suffix("") for file in CONF.glob("*/*.yaml"))
LOCAL = [option for option in OPTIONS if "@package _global_" not in (CONF / option).with_suffix(".yaml").read_text()]


@functools.cache
def checked(option: Path) -> Any:
    """An option as it is built."""
    group, name = option.parts
    return Checker(train.keys | infer.keys, complete=False).node(Composer(CONF, None).nodes(group)[name], group)


@pytest.mark.parametrize("option", LOCAL, ids=str)
def test_every_option_binds_to_its_signature(option: Path) -> None:
    for node in _nodes(checked(option)):
        assert callable(resolve(node["_target_"], trusted=True))


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    """Every mapping with a `_target_` inside."""
    if isinstance(node, dict) and "_target_" in node:
        yield node
    for entry in node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ():
        yield from _nodes(entry)


#: Where a configuration and the constructor that it names differ by default, and why. This list may only shrink.
MEANT = {
    "diffusion/custom": ({"t_min", "t_max"}, "with sigma = t the levels of EDM; the base class knows no scale"),
    "diffusion/edm": ({"sigma_max"}, "auto is resolved by the data, which a formulation does not know"),
    "diffusion/flow": ({"sigma_max"}, "the same"),
    "diffusion/interpolant": ({"sigma_max"}, "the same"),
    "diffusion/ou": ({"sigma_max"}, "the same"),
    "diffusion/thermodynamic": ({"sigma_max"}, "the same"),
    "diffusion/ve": ({"sigma_max"}, "the same"),
    "inpainting/replacement": ({"resamples"}, "RePaint without its resampling"),
    "mask/mixture": (
        {"fraction", "legs", "width", "count", "slope", "aspect", "spell", "horizon", "ways", "frames", "shares"},
        "masks of training vary, in time too; by itself each is one typical case",
    ),
    "model/cascade": ({"embedding"}, "as small as unet_small"),
    "model/energy_multiscale": ({"scales"}, "on three scales"),
    "model/unet_tiny": ({"channels", "blocks", "embedding"}, "one class in four sizes"),
    "model/unet_small": ({"channels", "embedding"}, "one class in four sizes"),
    "model/unet_base": ({"channels", "attention"}, "one class in four sizes"),
    "model/unet_large": ({"channels", "blocks", "attention", "embedding"}, "one class in four sizes"),
    "optimizer/adamw": ({"betas", "fused"}, "the class is torch's"),
    "physics/divergence_curl": ({"curl"}, "one class for several sets of terms"),
    "sampler/edm_stochastic": (
        {"steps", "S_churn", "S_min", "S_max", "S_noise"},
        "Heun's method with the churn of a published table",
    ),
}


@pytest.mark.parametrize("option", LOCAL, ids=str)
def test_a_default_is_the_same_in_yaml_and_in_python(option: Path) -> None:
    differing = set()
    for node in _nodes(checked(option)):
        for key, parameter in inspect.signature(resolve(node["_target_"], trusted=True)).parameters.items():
            if key in node and parameter.default is not parameter.empty:
                ours, theirs = (list(v) if isinstance(v, tuple) else v for v in (node[key], parameter.default))
                if ours != theirs:
                    differing.add(key)
    assert differing == MEANT.get(str(option), (set(), ""))[0]


@pytest.mark.parametrize("program", [train, infer, evaluate, export, calibrate, inspect_command], ids=lambda p: p.name)
def test_a_program_describes_just_the_keys_of_its_configuration(program: Program) -> None:
    """The types stand in `commands`, the defaults and their meaning in YAML: neither has a key that the other lacks."""
    composed = Composer(CONF, program.name).compose([])
    groups = {str(key) for key in composed.hydra.runtime.choices}
    own = {str(key) for key in composed if key not in groups | {"hydra"}}
    assert own - {"splits", "augment", "loss"} == set(program.keys)


# What moved.


@pytest.mark.parametrize("old", [*MOVED, pytest.param("", id="none")])
def test_a_name_that_moved_leads_to_what_is_there(old: str) -> None:
    trusted = ".training." in old  # only the program's own configuration is built there
    assert not old or (callable(resolve(old, trusted)) and signature(old) is not None and MOVED[old] not in MOVED)


def test_configurations_from_before_a_move_are_read(shapes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MOVED, "shapes.before.Old", "shapes.forms.Base")
    monkeypatch.setitem(MOVED, "shapes.before.bad", "os.system")
    node = {"_target_": "shapes.before.Old", "steps": 3}
    assert build({"a": [node]}, "m")["a"][0].steps == 3
    with pytest.raises(UserError, match=r"^unknown key m\.stepz\. Did you mean 'steps'"):
        build(node | {"stepz": 1}, "m")
    with pytest.raises(UserError, match="may name only"):
        resolve("shapes.before.bad")
    assert present_names({"a": [node], "b": ("x", 1)}) == {
        "a": [{**node, "_target_": "shapes.forms.Base"}],
        "b": ("x", 1),
    }


HEUN = {"_target_": "vecfield_diffusion.samplers.deterministic.Heun", "steps": 3}


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_key_that_was_renamed_is_a_key_of_its_group(old: str, new: str) -> None:
    group, _, key = new.partition(".")
    nodes = Composer(CONF, None).nodes(group).values()
    assert any(key in node for node in nodes) and not any(old.partition(".")[2] in node for node in nodes)


def test_a_configuration_with_an_old_key_is_built_and_compared() -> None:
    assert build(HEUN | {"grid": "karras"}, "sampler", trusted=True).schedule == "karras"
    # The file of a user from before stands beside the default of the package.
    assert build(HEUN | {"schedule": "native", "grid": "karras"}, "sampler", trusted=True).schedule == "karras"
    with pytest.raises(UserError, match=r"^sampler\.schedule=kaRras: expected one of native"):
        build(HEUN | {"grid": "kaRras"}, "sampler", trusted=True)
    kept = [{"process": {"sampler": HEUN | {"grid": "karras"}, "mask": {"grid": 1}}, "factor": 1.1}]
    assert present_names(kept) == [
        {"process": {"sampler": HEUN | {"schedule": "karras"}, "mask": {"grid": 1}}, "factor": 1.1}
    ]


def test_an_old_key_is_typed_and_noted_once(capsys: pytest.CaptureFixture[str]) -> None:
    say_once.cache_clear()
    typed = ["ckpt=x", "sampler=heun", "++sampler.grid=karras", "inpainting=pigdm", "inpainting.told=true"]
    for _ in range(2):
        config = infer.config(*typed)
        assert config["sampler"]["schedule"] == "karras" and "grid" not in config["sampler"]
        assert config["inpainting"]["conditioned"] is True
    assert capsys.readouterr().out.splitlines() == [
        "note: ++sampler.grid=karras is read as ++sampler.schedule=karras",
        "note: inpainting.told=true is read as inpainting.conditioned=true",
    ]


def test_a_key_of_the_users_own_sampler_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "sampler").mkdir()
    (tmp_path / "sampler/mine.yaml").write_text("_target_: mine.Sampler\ngrid: fine\n")
    reader = Reader(Spelling(), {}, Composer(CONF, "infer", str(tmp_path)), multirun=False)
    assert reader.read(["sampler=mine", "sampler.grid=coarse"]) == ["sampler=mine", "sampler.grid=coarse"]
    assert present_names({"sampler": {"_target_": "mine.Sampler", "grid": 1}})["sampler"]["grid"] == 1


# Files that a checkpoint names.


def test_a_checkpoint_opens_only_what_the_user_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text("password")
    for target in ("formats.open_fields", "hdf5.open_hdf5", "netcdf.open_netcdf", "masks.MaskFile"):
        node = {"_target_": f"vecfield_diffusion.data.{target}", "path": "secret"}
        with pytest.raises(UserError, match=r"^dataset\.path=secret: a checkpoint does not choose what is opened here"):
            build(node, "dataset")
        with pytest.raises(UserError, match=r"^dataset\.path=secret: a checkpoint does not choose"):
            build(node, "dataset", paths=["secret2", "./secret"])
        for allowed in ({"paths": ["secret"]}, {"trusted": True}):
            try:
                build(node, "dataset", **allowed)
            except UserError as error:
                assert "does not choose" not in str(error)  # it was opened, and is no file of fields


def test_a_checkpoint_makes_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"resolution": 8, "solver_resolution": 8, "snapshots": 2, "viscosity": 1e-3, "order": 1, "duration": 0.1}
    node = {"_target_": "vecfield_diffusion.data.turbulence.open_turbulence", "k_peak": 2.0, **sizes}
    with pytest.raises(UserError, match=r"^dataset\.folder=made: a checkpoint does not choose"):
        build(node | {"folder": "made"}, "dataset")
    assert not list(tmp_path.iterdir())
    assert len(build(node | {"folder": "made"}, "dataset", paths=["made"])) == 2
    assert len(build(node | {"folder": "outputs/data"}, "dataset")) == len(build(node, "dataset")) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "outputs"]


def test_the_files_of_a_configuration() -> None:
    config = {
        "dataset": {"path": "a.nc", "u": "b"},
        "mask": {"masks": {"x": {"path": "c.npy"}}},
        "data": [{"folder": "d"}],
    }
    assert named_files(config) == ["a.nc", "c.npy", "d"]
