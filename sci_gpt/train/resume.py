"""Resume: the newest whole checkpoint, what must be equal between it and the run that goes on, and the code version."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sci_gpt.errors import CheckpointError
from sci_gpt.parallel.world import World
from sci_gpt.train.checkpoint import committed, damage, read_state
from sci_gpt.train.tracker import flatten

_SHOWN = 4
_NOT_THEN = {"id_table": False}  # keys of the configuration's `model` that checkpoints may lack


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run goes on.

    Attributes:
        checkpoint: None for a new run.
        step: completed ones.
        next_sample: n(t), the first sample not eaten.
        phase_starts: first samples of the phases of which something was eaten.
        validation: {"step", "loss"} of the last validation at or before that step, None where there was none.
        damaged: newer checkpoints that are passed over, newest first, each with what is wrong with it.
    """

    checkpoint: Path | None
    step: int
    next_sample: int
    phase_starts: tuple[int, ...] = (0,)
    validation: Mapping[str, Any] | None = None
    damaged: tuple[tuple[Path, str], ...] = ()


def where_to_go_on(
    run: Path, identity: Mapping[str, Any], *, world: World | None = None, contents: bool = True
) -> Start:
    """The newest checkpoint of a run folder that is whole, if it is of this run; nothing is written.

    Every byte of a checkpoint is read and hashed before it is chosen.

    Args:
        run: the run folder.
        identity: of the run that is starting (see `check_same_run`).
        world: a collective: its ranks share the reading, and all get the same answer.
        contents: False: verify only the small files (manifest, state, part lists); the answer is a first one.

    Raises:
        CheckpointError: there are checkpoints and none is whole; or the newest whole one is of another run.
    """
    damaged: list[tuple[Path, str]] = []
    for checkpoint in reversed(_candidates(run, world)):
        found = _damage(checkpoint, world, contents=contents)
        if found is None:
            state = read_state(checkpoint)
            step = int(state["step"])
            saved = eaten(with_old_model(state["identity"]), step)
            check_same_run(saved, eaten(identity, step), checkpoint=checkpoint)
            return Start(
                checkpoint=checkpoint,
                step=step,
                next_sample=int(state["next_sample"]),
                phase_starts=tuple(int(n) for n in state["phase_starts"]),
                validation=state.get("validation"),
                damaged=tuple(damaged),
            )
        damaged.append((checkpoint, found))
    if damaged:
        listed = "; ".join(found for _, found in damaged)
        raise CheckpointError(
            f"no checkpoint of {run} is whole: {listed}; put a copy of one back, or move {run / 'checkpoints'} away to "
            "train anew"
        )
    return Start(checkpoint=None, step=0, next_sample=0)


def _candidates(run: Path, world: World | None) -> list[Path]:
    """The run's checkpoints, oldest first, as rank 0 sees them."""
    names = [path.name for path in committed(run)]
    if world is not None:
        names = json.loads(world.share(json.dumps(names)))
    return [run / "checkpoints" / name for name in names]


def _damage(checkpoint: Path, world: World | None, *, contents: bool) -> str | None:
    if world is None:
        return damage(checkpoint, contents=contents)
    mine = damage(checkpoint, contents=contents, share=(world.rank, world.size))
    return next((found for found in world.gather_texts(mine or "") if found), None)


def with_old_model(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration or identity with the parts of the model that its time did not know, which it has not."""
    return {**saved, "model": {**_NOT_THEN, **saved["model"]}} if "model" in saved else dict(saved)


def eaten(identity: Mapping[str, Any], step: int) -> dict[str, Any]:
    """An identity with only as much of its `phases` as `step` completed steps have eaten; what comes later is free.

    A run may be prolonged, or get other phases, from where it stands: the phase in which it stands counts up to `step`.
    """
    phases, start = [], 0
    for phase in identity.get("phases", []):
        if start < step:
            phases.append({**phase, "until_step": min(int(phase["until_step"]), step)})
        start = int(phase["until_step"])
    return {**identity, "phases": phases}


def check_same_run(saved: Mapping[str, Any], mine: Mapping[str, Any], *, checkpoint: Path) -> None:
    """Compare what decides the samples and the model of a run (fingerprint, seed, phases, model and more).

    Args:
        saved: `identity` of the checkpoint's state.json.
        mine: of the run that is starting.
        checkpoint: its folder, for the message.

    Raises:
        CheckpointError: anything differs; the message says what, and both values.
    """
    there, here = flatten(saved), flatten(mine)
    differ = [key for key in dict.fromkeys([*there, *here]) if there.get(key) != here.get(key)]
    if differ:
        listed = "; ".join(
            f"{key} is {there.get(key, 'absent')} there and {here.get(key, 'absent')} here" for key in differ[:_SHOWN]
        )
        more = f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
        raise CheckpointError(
            f"{checkpoint} is of another run: {listed}{more}; give this run another output, or restore what it had"
        )


def code_version() -> str:
    """Commit of the source tree this runs from ("-dirty" where files differ from it), or the package's version."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        try:
            commit = _git(root, "rev-parse", "HEAD")
            return commit + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
        except (OSError, subprocess.SubprocessError):
            return f"{_version()} (a source tree whose commit cannot be read)"
    return _version()


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _version() -> str:
    try:
        return metadata.version("sci-gpt")
    except metadata.PackageNotFoundError:
        return "unknown"
