"""Many runs in one folder, by one command: a comparison or a sweep that was killed goes on where it stopped.

The folder keeps the command's words. `--resume FOLDER` takes them up again, and then what is given besides; the runs
know by themselves (`train.run_once`) whether they are finished, begun, or still to do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import runfolder
from config import Config
from errors import RecipeError
from world import World

COMMAND = "command.json"


def recall(words: Sequence[str]) -> tuple[list[str], Path | None]:
    """The words of the whole command, and the folder that `--resume` names.

    Raises:
        RecipeError: There is no such folder, or it has no command.
    """
    new, folder = [], None
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        if key != "--resume":
            new.append(word)
        elif equals or rest:
            folder = Path(value if equals else rest.pop(0))
        else:
            raise RecipeError("--resume needs a value")
    if folder is None:
        return new, None
    try:
        return [*json.loads((folder / COMMAND).read_text(encoding="utf-8")), *new], folder
    except OSError as error:
        raise RecipeError(f"--resume: cannot read {str(folder / COMMAND)!r}: {error.strerror}") from error


def begin(words: Sequence[str], folder: Path | None, config: Config, kind: str, world: World) -> Path:
    """The folder, made if there is none yet, with the command in it."""
    if world.is_main:
        folder = folder or runfolder.create(config.out, config.task, f"{config.name}-{kind}")
        runfolder.write_text(folder / COMMAND, json.dumps(list(words), indent=1) + "\n")
    return world.gather(folder)[0]
