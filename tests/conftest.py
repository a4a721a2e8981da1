"""Fixtures shared by the tests that need a running stack."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Stack, running


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Every test leaves the environment as it found it: a running stack's dials, once recalled, are the process's own."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """redis, gateway, nginx; no worker yet."""
    with running(tmp_path) as stack:
        yield stack


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One stack with two scripted workers for a module's tests that break nothing."""
    with running(tmp_path_factory.mktemp("stack")) as stack:
        stack.add_worker("w1")
        stack.add_worker("w2")
        yield stack
