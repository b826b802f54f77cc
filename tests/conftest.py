"""pytest's house rules: sample data, one thread, a limit per test, and no skipped or expected failure under CI."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from small_slurm import Slurm

# Before any test imports numpy or torch: the same sums in the same order, no cores taken from processes under test.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")

CI = os.environ.get("CI", "").lower() in ("true", "1")
SECONDS_PER_TEST = float(os.environ.get("SCI_GPT_TEST_SECONDS", "420"))


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """The folder of real sample files that SCI_GPT_SAMPLE_DATA names; without it the test is skipped."""
    folder = os.environ.get("SCI_GPT_SAMPLE_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip(f"SCI_GPT_SAMPLE_DATA names no folder of sample files: {folder!r}")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def quickstart_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's store, built once; for reading alone."""
    # Imported here: they load libraries that most tests do without, and conftest must set OMP_NUM_THREADS first.
    from sci_gpt.config import DataConfig
    from sci_gpt.config_file import load_config
    from sci_gpt.recipes.build import build

    path = tmp_path_factory.mktemp("quickstart") / "store"
    configuration = Path(__file__).resolve().parents[1] / "configs" / "data" / "quickstart.yaml"
    build(load_config(configuration, DataConfig, overrides=(f"output={path}",)))
    return path


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """A Slurm of two nodes; skipped where it is not installed, which under CI is a failure."""
    from small_slurm import missing_programs, small_slurm  # of few tests alone

    if missing := missing_programs():
        pytest.skip(
            f"no Slurm here ({', '.join(missing)} missing): "
            "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
        )
    with small_slurm() as slurm:
        yield slurm


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the repository."""
    return Path(__file__).resolve().parents[1]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under CI a skip or an expected failure is a failure, except of a test marked gpu."""
    report = yield
    if CI and not item.get_closest_marker("gpu") and (report.skipped or hasattr(report, "wasxfail")):
        reason = getattr(report, "wasxfail", "") or report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: skipped or expected to fail, which CI does not accept: {reason}"
        if hasattr(report, "wasxfail"):
            del report.wasxfail
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Under CI a file that skips itself whole is a failure."""
    report = yield
    if CI and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid}: skipped whole, which CI does not accept: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, None, None]:
    """A fixture that hangs fails its test."""
    with _limit():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """A test that hangs fails."""
    with _limit():
        return (yield)


@contextmanager
def _limit() -> Generator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"longer than {SECONDS_PER_TEST:g} s (SCI_GPT_TEST_SECONDS)")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_TEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
