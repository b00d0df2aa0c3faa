"""One warm process that runs commands, for all files of this folder that do not want one of their own."""

from collections.abc import Iterator

import pytest
from runs import Commands


@pytest.fixture(scope="session")
def xai() -> Iterator[Commands]:
    with Commands() as commands:
        yield commands
