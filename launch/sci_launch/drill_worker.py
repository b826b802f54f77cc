"""A drill's own run with one sample whose values are infinite: `python -m sci_launch.drill_worker CONFIG SAMPLE`.

The product has no switch for that. Here, in processes that only a drill starts, one method is replaced: the document of
that sample comes out with infinities, and takes the way of every other through packing, model and loss.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from sci_gpt.config import PretrainConfig
from sci_gpt.config_file import load_config
from sci_gpt.data.loader import Corpus
from sci_gpt.recipes import pretrain
from sci_launch.local import run_workers
from sci_tokenizers.tokens import Tokens


def poison(sample: int) -> None:
    """From here on, sample number `sample` of every run in this process has infinite values."""
    whole = Corpus.document

    def document(self: Corpus, n: int) -> Tokens:
        tokens = whole(self, n)
        if n != sample:
            return tokens
        wrong = {name: np.full_like(getattr(tokens, name), np.inf) for name in ("payload", "last")}
        return replace(tokens, **wrong, anchor=np.full_like(tokens.anchor, np.inf))

    Corpus.document = document  # type: ignore[method-assign]


def main(arguments: list[str]) -> int:
    """The launcher, or with RANK in the environment one worker."""
    config, sample = arguments
    if "RANK" in os.environ:
        poison(int(sample))
        sys.argv = ["pretrain", config]
        pretrain.main()
        return 0
    parallel = load_config(Path(config), PretrainConfig).parallel
    with tempfile.TemporaryDirectory(prefix="sci-gpt-") as folder:
        run_workers(
            ["sci_launch.drill_worker", config, sample],
            processes=parallel.processes,
            threads=parallel.threads_per_process,
            meeting_place=Path(folder) / "rendezvous",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
