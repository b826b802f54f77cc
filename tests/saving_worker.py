"""A run's process whose writes of checkpoints are slow, or in which it is killed at half of the second one.

`saving_worker slow|kill CONFIG SEEN.json`
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import load_config
from sci_gpt.recipes import pretrain
from sci_gpt.train import commit
from sci_gpt.train.checkpoint import step_of
from sci_gpt.train.run_folder import LOG, read_lines

PATIENCE_SECONDS = 200.0
SLOW_SECONDS = 0.5


def last_step(run: Path) -> int:
    """That the log holds."""
    return max((record["step"] for record in read_lines(run / LOG)), default=0)


def main() -> None:
    """Put the slow or the deadly write in the place of the real one, look at what is there at each marker, train."""
    how, path, seen = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    config = load_config(Path(path), PretrainConfig)
    write, mark, writes = commit.write_safetensors, pretrain.write_marker, list[Path]()

    def write_slowly(path: Path, tensors: Mapping[str, Tensor], *, moved: Callable[[], None]) -> str:
        writes.append(path)
        step = step_of(path.parent) or 0
        if how == "kill" and len(writes) == 2:
            path.with_name(path.name + ".partial").write_bytes(b"\0" * 1000)
            deadline = time.monotonic() + PATIENCE_SECONDS
            while last_step(config.output) < step + 2 and time.monotonic() < deadline:
                time.sleep(0.01)  # training goes on meanwhile
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(SLOW_SECONDS)
        return write(path, tensors, moved=moved)

    def look_and_mark(run: Path, name: str, *, content: Mapping[str, Any]) -> None:
        committed = (run / content["checkpoint"] / "manifest.json").exists()
        seen.write_text(json.dumps({"marker": name, "committed": committed}), encoding="utf-8")
        mark(run, name, content=content)

    slow: Any = write_slowly  # the product always says `moved`
    commit.write_safetensors, pretrain.write_marker = slow, look_and_mark
    sys.argv = [sys.argv[0], path]
    pretrain.main()


if __name__ == "__main__":
    main()
