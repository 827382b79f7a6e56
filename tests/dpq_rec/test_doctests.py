"""The worked examples in docstrings say what is."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["artifact", "codes", "strings", "vocabulary", "wire"])
def test_worked_examples_come_out_as_they_say(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, attempted = doctest.testmod(importlib.import_module(f"dpq_rec.{name}"))
    assert (failed, attempted > 0) == (0, True)
