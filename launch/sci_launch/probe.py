"""Probe: one question of `sci-gpt doctor` in a process of its own, so that a library that crashes is an answer too."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_CALL_SECONDS = 5


def imports(name: str) -> dict[str, Any]:
    """Whether a library imports: its version and place."""
    module = importlib.import_module(name)
    return {"version": getattr(module, "__version__", "unknown"), "place": str(getattr(module, "__file__", ""))}


def devices(_: str) -> dict[str, Any]:
    """What torch can compute on: its version, threads, and each accelerator with its memory in bytes."""
    torch = importlib.import_module("torch")
    found = {"version": torch.__version__, "cpu_threads": torch.get_num_threads(), "cuda_build": torch.version.cuda}
    rows = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    return found | {"accelerators": [{"name": row.name, "memory_bytes": row.total_memory} for row in rows]}


def tracking(uri: str) -> dict[str, Any]:
    """Whether MLflow answers at `uri`; one that is silent is given up after some seconds."""
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(_CALL_SECONDS)
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    client = importlib.import_module("mlflow").MlflowClient(tracking_uri=uri, registry_uri=uri)
    experiments = client.search_experiments(max_results=1000)
    return {"uri": uri, "experiments": len(experiments)}


def package_data(path: str) -> dict[str, Any]:
    """How many files of a data configuration are in installed packages, and what of them is missing."""
    settings = importlib.import_module("sci_gpt.data.source")
    config, files_of = importlib.import_module("sci_gpt.config"), importlib.import_module("sci_gpt.config_file")
    missing, files = [], 0
    for source in files_of.load_config(Path(path), config.DataConfig).sources:
        if source.package is None:
            continue
        facts = {name: getattr(source, name) for name in ("name", "reader", "modality", "package", "files")}
        try:
            files += len(settings.locate(settings.SourceSettings(**facts)))
        except importlib.import_module("sci_gpt.errors").DataError as error:
            missing.append(str(error))
    return {"files": files, "missing": missing}


PROBES: dict[str, Callable[[str], dict[str, Any]]] = {
    "imports": imports,
    "devices": devices,
    "tracking": tracking,
    "package_data": package_data,
}


def main(arguments: Sequence[str]) -> int:
    """`python -m sci_launch.probe NAME ARGUMENT`: one line of JSON, {"found"} or {"error"}; the last line of stdout."""
    name, argument = arguments
    answer: dict[str, Any]
    try:
        answer = {"found": PROBES[name](argument)}
    except Exception as error:  # noqa: BLE001  whatever a library raises is what was asked
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}
    print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
