"""`python -m training` as several test modules call it."""

from training.__main__ import parse

HERE = {"data": ".", "out": "run"}  # what every recipe needs


def parsed(text):
    """The configuration of a recipe and its flags, on data that are there."""
    data = "." if text.startswith(("language", "text")) else "synthetic"
    return parse([*text.split(), "--data", data, "--out", "run"])
