"""A browser for the tests of pages; where there is none, they are skipped, and the reason says what is missing."""

import pytest

from tests.pages.browser import Browser, missing


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    found = Browser(tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()
