"""Kernels compiled ahead of time: for one architecture in every run, for the others by hand."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        arch = getattr(item, "callspec", None) and item.callspec.params.get("arch")
        if item.path.name == "test_ahead_of_time.py" and arch not in (None, "sm_90"):
            item.add_marker(pytest.mark.slow)
