"""The worked examples in docstrings say what is."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["collection", "embedding", "quantizer", "replace"])
def test_worked_examples_come_out_as_they_say(name):
    failed, attempted = doctest.testmod(importlib.import_module(f"dpq_rec.nn.{name}"))
    assert (failed, attempted > 0) == (0, True)
