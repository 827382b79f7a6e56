"""Settings are checked once, at the edge, and come back whole."""

import pytest

from dpq_rec import ConfigError
from training.__main__ import main, parse
from training.config import RunConfig


def test_parse_gives_every_flag_its_field():
    arguments = (
        "two-tower --data synthetic --out run --embedding dpq-vq --num-codes 7 --no-batch-norm --learning-rate 0.5"
    )
    config = parse(arguments.split())
    assert (config.embedding, config.num_codes, config.batch_norm, config.learning_rate) == ("dpq-vq", 7, False, 0.5)
    assert RunConfig(**config.as_dict()) == config


def test_config_says_how_tables_are_quantized():
    config = RunConfig(data="synthetic", out="run", embedding="dpq-vq", num_subspaces=8, num_codes=7)
    assert (config.dpq.method, config.dpq.num_subspaces, config.dpq.num_codes) == ("vq", 8, 7)
    assert RunConfig(data="synthetic", out="run", embedding="full").dpq is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "nowhere"}, "--data: nowhere does not exist"),
        ({"out": ""}, "--out is missing"),
        ({"embedding": "pq"}, "--embedding: got 'pq', want one of full, dpq-sx, dpq-vq"),
        ({"epochs": 0}, "--epochs: got 0, want more than 0"),
        ({"num_levels": 2}, "--num-levels: got 2, want 1"),
        ({"seed": -1}, "--seed: got -1, want 0 or more"),
        ({"num_negatives": 5000}, "got 5000 negatives, a batch of 4096"),
        ({"num_subspaces": 7}, "num_subspaces: got 7, want a divisor"),
        ({"num_codes": 1}, "num_codes: got 1"),
    ],
)
def test_config_rejects_what_makes_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig(**{"data": "synthetic", "out": "run", **settings})


def test_main_says_in_one_line_what_is_wrong(capsys):
    assert main(["two-tower", "--data", "nowhere", "--out", "run"]) == 2
    assert capsys.readouterr().err == "training: --data: nowhere does not exist\n"


def test_help_shows_every_setting(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert all(
        f"--{name.replace('_', '-')}" in shown
        for name in RunConfig(data="synthetic", out="x").as_dict()
        if name != "recipe"
    )
