"""The reference of the options: a page for each command and each group, from the comments of the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from vecfield_diffusion.config.help import Comments, read_comments
from vecfield_diffusion.config.sources import first_sentence
from vecfield_diffusion.resources import resource

CONF = resource("conf")
#: In the order in which they are met.
COMMANDS = ("train", "infer", "evaluate", "inspect", "calibrate", "export", "drift")
#: The keys of a group's file that are not settings.
_NO_SETTINGS = ("defaults", "hydra", "_target_")


def write(folder: Path) -> None:
    """Writes `commands.md` and `groups.md` into a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "commands.md").write_text("\n".join(commands()), encoding="utf-8")
    (folder / "groups.md").write_text("\n".join(groups()), encoding="utf-8")


def commands() -> Iterator[str]:
    """Yields the lines of the page of the commands."""
    yield "# Commands and their keys\n"
    yield "`COMMAND --help` says the same, with the groups of the command; `--help KEY` explains one key.\n"
    for command in COMMANDS:
        text = (CONF / f"{command}.yaml").read_text(encoding="utf-8")
        loaded = yaml.safe_load(text)
        yield f"\n## {command}\n\n```text\n{loaded['hydra']['help']['header'].strip()}\n```\n"
        yield from table(loaded, read_comments(text))


def groups() -> Iterator[str]:
    """Yields the lines of the page of the groups."""
    yield "# Groups and their options\n"
    yield "`group=option` chooses one, `group.key=value` sets a key of it. Options are files of `conf/`.\n"
    for group in sorted(path for path in CONF.iterdir() if path.is_dir() and path.name != "hydra"):
        yield f"\n## {group.name}\n"
        for file in sorted(group.glob("*.yaml")):
            text = file.read_text(encoding="utf-8")
            loaded, comments = yaml.safe_load(text) or {}, read_comments(text)
            target = loaded.get("_target_")
            yield f"\n### {group.name}={file.stem}\n\n{comments.head or (first_sentence(target) if target else '')}\n"
            if target:
                yield f"`{target}`\n"
            yield from table(loaded, comments, "" if group.name == "experiment" else f"{group.name}.")


def table(loaded: Mapping[str, Any], comments: Comments, group: str = "") -> Iterator[str]:
    """Yields the table of the keys of one file, nested ones by their dotted names, those of a group behind its name."""
    rows = list(settings(loaded, comments))
    if rows:
        yield "\n| key | default | what it is |\n|---|---|---|"
        yield from (f"| `{group}{key}` | {cell(value)} | {cell(comment, code=False)} |" for key, value, comment in rows)
        yield ""


def settings(loaded: Mapping[str, Any], comments: Comments, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yields key, value and comment of each setting."""
    for key, value in loaded.items():
        path = f"{prefix}{key}"
        if path in _NO_SETTINGS or key == "_target_":
            continue
        if isinstance(value, Mapping) and value:
            yield from settings(value, comments, f"{path}.")
        else:
            yield path, value, comments.keys.get(path, "")


def cell(value: Any, code: bool = True) -> str:
    """Returns what stands in a cell of a table."""
    if not code:
        return str(value).replace("|", "\\|").replace("<", "&lt;")
    written = yaml.safe_dump(value, default_flow_style=True, width=200).removesuffix("...\n").strip()
    return f"`{written}`".replace("|", "\\|")
