"""Options of single tables, and tiers, as flags and in JSON."""

import dataclasses
import json
import shlex

import pytest

from dpq_rec import ConfigError, DPQConfig
from tests.training.command_line import plain
from training.checkpoint import claim_folder
from training.command_line import parse
from training.models.interactions import make_tables
from training.options import to_text
from training.recipes import RECIPES, with_changes

HERE = {"data": ".", "out": "run"}
PER_TABLE = "item_id.num_levels=44 item_id.tiers=0.05:32,0.2:16 user_id.batch-norm=false user_id.tiers="


def test_tables_have_options_of_their_own_beside_those_of_all():
    arguments = ["dlrm", "--num-levels=9", "--num-subspaces=16", "--tiers=0.1:5,0.5:2", f"--per-table={PER_TABLE}"]
    options = parse([*arguments, "--data=synthetic", "--out=run"]).embedding
    item, user, other = (options.dpq_of(name, 1000) for name in ("item_id", "user_id", "segment"))
    assert other == options.dpq == DPQConfig(method="vq", num_levels=9, tiers=((0.1, 5), (0.5, 2)))
    assert item == dataclasses.replace(other, num_levels=44, tiers=((0.05, 32), (0.2, 16)))
    assert user == dataclasses.replace(other, batch_norm=False, tiers=())


def test_options_of_a_table_stand_beside_a_target_ratio():
    per_table = {"item_id": {"revive_after": 7}}
    changes = {"target-ratio": 20.0, "per-table": per_table}
    options = with_changes(RECIPES["two-tower"](**HERE).as_dict(), changes).embedding
    item, user = (options.dpq_of(name, 50_000) for name in ("item_id", "user_id"))
    assert item == dataclasses.replace(user, revive_after=7) != user


@pytest.mark.parametrize("per_table", ["", PER_TABLE, "'a table.num_codes'=9 b.ema_decay=0.9", "b.revive-after=none"])
def test_options_of_tables_survive_json_and_show_as_they_are_given(per_table, tmp_path, capsys):
    config = parse(
        ["dlrm", "--tiers=0.5:1", "--num-levels=3", "--data=synthetic", "--out=run", f"--per-table={per_table}"]
    )
    (tmp_path / "metrics.json").write_text(json.dumps({"config": config.as_dict()}))
    again = ["--config", str(tmp_path / "metrics.json"), "--out=run"]
    assert parse(again) == config
    with pytest.raises(SystemExit):
        parse([*again, "--help"])
    text = to_text(config.embedding.per_table)
    shown = plain(capsys.readouterr().out).replace(" ", "")
    assert f"(default:{text if text == 'none' else shlex.quote(text)})".replace(" ", "") in shown
    assert parse([*again, f"--per-table={'' if text == 'none' else text}"]) == config


def test_plain_tables_drop_options_of_their_own():
    config = parse(["two-tower", f"--per-table={PER_TABLE}", "--data=synthetic", "--out=run"]).as_dict()
    full = with_changes(config, {"embedding": "full"})
    assert (full.embedding.dpq, full.embedding.per_table) == (None, {})


@pytest.mark.parametrize("text", ["item_id", "num_levels=3", "item_id.=3", ".num_levels=3"])
def test_a_flag_of_tables_that_names_no_table_or_option_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        parse(["two-tower", "--data=synthetic", "--out=run", f"--per-table={text}"])
    assert f"got {text!r}, want TABLE.OPTION=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0.05", "0.05:32:1", "x:3", "0.05:x", "0.05:1.5"])
def test_a_flag_of_tiers_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        parse(["two-tower", "--data=synthetic", "--out=run", "--num-levels=40", f"--tiers={text}"])
    assert f"Error parsing --tiers: got '{text}', want A:B,..." in capsys.readouterr().err


def test_a_table_that_a_run_has_not_is_refused_with_those_it_has():
    options = parse(["two-tower", "--per-table=itm_id.num_codes=9", "--data=synthetic", "--out=run"]).embedding
    with pytest.raises(ConfigError, match="--per-table: got table itm_id; the tables: user_id, item_id"):
        make_tables({"user_id": ["user_id"], "item_id": ["item_id"]}, {"user_id": 5, "item_id": 5}, options)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--vocabulary=modulo", "--num-buckets=9", "--num-levels=3"],
            "--tiers: with --vocabulary modulo rows are not sorted",
        ),
        (["--target-ratio=20"], "--tiers: --target-ratio chooses it for each table by its rows"),
    ],
)
def test_tiers_are_refused_where_they_mean_nothing(flags, message):
    with pytest.raises(ConfigError, match=message):
        parse(["two-tower", "--data=synthetic", "--out=run", "--tiers=0.5:1", *flags])


@pytest.mark.parametrize("option", ["item_id.batch_norm=false", "item_id.tiers="])
def test_a_folder_of_a_run_without_an_option_of_a_table_is_refused_to_one_with_it(option, tmp_path):
    """Though what is off may be left out elsewhere."""
    arguments = ["two-tower", "--data=synthetic", f"--out={tmp_path / 'run'}", "--num-levels=3", "--tiers=0.5:1"]
    claim_folder(parse(arguments), 1).close()
    (tmp_path / "run" / "metrics.json").touch()
    claim_folder(parse(arguments), 1).close()
    with pytest.raises(ConfigError, match=r"belongs to another run .embedding.per_table: {} there, {'item_id'"):
        claim_folder(parse([*arguments, f"--per-table={option}"]), 1)
