"""The stack and the browser of this folder's tests."""

import shutil
from collections.abc import Iterator

import pytest

from tests.up import Up, started

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH (Debian: chromium)")


@pytest.fixture(scope="package")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """One real worker, for everybody here."""
    with started(tmp_path_factory.mktemp("one"), 1, HOURLY_USD="1.5", BUDGET_USD="5000") as up:
        yield up
