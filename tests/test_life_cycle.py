"""What holds for batches and jobs whatever happens: `life_cycle.py`, a few hundred steps of it."""

from collections.abc import Iterator

import pytest
from hypothesis.stateful import run_state_machine_as_test

from tests.harness import Stack, running
from tests.life_cycle import BatchLife, JobLife, profile


@pytest.fixture(scope="module")
def floor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("life")) as stack:
        yield stack


def test_batches(floor: Stack) -> None:
    BatchLife.floor = floor
    run_state_machine_as_test(BatchLife, settings=profile(10, 30))


def test_jobs() -> None:
    run_state_machine_as_test(JobLife, settings=profile(20, 40))
