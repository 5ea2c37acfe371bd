"""One cluster for all tests of this folder, and a tiny run to take through it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm_cluster.cluster import Slurm, Unfit, started
from tests.slurm_cluster.tiny_run import TinyRun


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "slow: of the tests on a real SLURM, those that `make slurm` adds to the usual ones"
    )
    config.addinivalue_line("markers", "soak: takes many minutes; run with `make soak`")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [name for name in ("slow", "soak") if name not in config.option.markexpr]
    unwanted = [item for item in items if any(item.get_closest_marker(name) for name in left_out)]
    if unwanted:
        items[:] = [item for item in items if item not in unwanted]
        config.hook.pytest_deselected(items=unwanted)
    for item in items:
        if item.path.parent == Path(__file__).parent and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))  # several waits of up to PATIENCE_S each


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    try:
        with started(folder) as slurm:
            yield slurm
    except Unfit as why:
        pytest.skip(str(why))


@pytest.fixture
def slurm(cluster: Slurm) -> Iterator[Slurm]:
    """The cluster without jobs, all nodes idle."""
    cluster.clean_up()
    yield cluster


@pytest.fixture
def tiny(corpus: Path, tmp_path: Path) -> TinyRun:
    """A run of its own for each test."""
    return TinyRun.write(tmp_path, corpus)
