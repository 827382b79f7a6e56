"""Settings come back whole: from flags, from JSON, from another run's file. test_validation.py has what is refused."""

import dataclasses
import json
import re

import pytest
from torch.distributed.run import get_args_parser

from dpq_rec import ConfigError, DPQConfig
from tests.training.command_line import HERE, parsed, plain
from training.command_line import parse
from training.recipes import RECIPES, flags_of, from_dict, with_changes

OWN_FLAGS = {
    "two-tower": "--dense-learning-rate 1 --min-count 3 --log-q --negatives both",
    "dlrm": "--dense-learning-rate 1 --min-count 3 --over-layers 8,4",
    "language-model": "--rate-decay 0.8 --dropout 0.5 --clip-norm 3",
    "text-classification": "--min-count 3 --dropout 0.2 --text-column title",
}


def test_parse_gives_every_flag_its_field():
    config = parsed("two-tower --embedding dpq-sx --num-codes 7 --no-batch-norm --learning-rate 0.5 --similarity dot")
    assert (config.embedding.kind, config.embedding.dpq.num_codes, config.embedding.dpq.batch_norm) == (
        "dpq-sx",
        7,
        False,
    )
    assert (config.optimisation.learning_rate, config.model.similarity) == (0.5, "dot")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_configuration_comes_back_from_json(recipe):
    config = parsed(f"{recipe} --revive-after 9 {OWN_FLAGS[recipe]}")
    assert from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_every_option_of_dpq_is_a_flag():
    sx = parsed(
        "two-tower --embedding dpq-sx --num-subspaces 8 --num-codes 7 --num-levels 2 --metric cosine --tie-keys "
        "--share-subspaces --dpq-temperature 0.5 --hard-values --no-batch-norm --revive-after 5 --values-dtype float16"
    ).embedding.dpq
    assert sx == DPQConfig(
        method="sx",
        num_subspaces=8,
        num_codes=7,
        num_levels=2,
        metric="cosine",
        tie_keys=True,
        share_subspaces=True,
        temperature=0.5,
        hard_values=True,
        batch_norm=False,
        revive_after=5,
        values_dtype="float16",
    )
    assert parsed("two-tower --embedding dpq-sx --key-dim 2").embedding.dpq.key_dim == 2
    vq = parsed("dlrm --penalty-weight 2 --commitment-weight 0.5 --value-gradient").embedding.dpq
    assert vq == DPQConfig(method="vq", penalty_weight=2, commitment_weight=0.5, value_gradient=True)
    assert parsed("dlrm --ema-decay 0.9 --num-subspaces 8").embedding.dpq.ema_decay == 0.9
    flags = {option.path[-1] for option in flags_of("dlrm").values() if "dpq" in option.path}
    assert flags == {field.name for field in dataclasses.fields(DPQConfig)} - {"method"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", DPQConfig(method="vq", metric="euclidean", value_gradient=True, penalty_weight=0, batch_norm=False)),
        ("--embedding dpq-sx", DPQConfig(method="sx", metric="euclidean", batch_norm=False)),
        ("--ema-decay 0.9", DPQConfig(method="vq", metric="euclidean", ema_decay=0.9, batch_norm=False)),
        (
            "--penalty-weight 2 --no-value-gradient",
            DPQConfig(method="vq", metric="euclidean", penalty_weight=2, batch_norm=False),
        ),
    ],
)
def test_options_that_a_recipe_begins_with_give_way_to_what_leaves_them_no_use(flags, expected):
    assert parsed(f"two-tower {flags}").embedding.dpq == expected


def test_a_rate_after_the_full_epochs_is_taken_where_keys_are_as_wide_as_vectors():
    """A key_dim that is given rules a warm-up out, unless it is the width that keys have anyway."""
    config = parsed("two-tower --embedding dpq-sx --key-dim 4 --epochs 6 --quantized-rate 0.3")
    assert (config.full_epochs, config.optimisation.quantized_rate) == (4, 0.3)


def test_what_was_asked_for_does_not_give_way():
    with pytest.raises(ConfigError, match="value_gradient: got True with ema_decay"):
        parsed("two-tower --ema-decay 0.9 --value-gradient")
    with pytest.raises(ConfigError, match=r"penalty_weight: got 2\.0 with method 'sx'"):
        parsed("two-tower --embedding dpq-sx --penalty-weight 2")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("two-tower --epochs 20", 13),
        ("two-tower --epochs 2", 1),
        ("two-tower --epochs 20 --full-epochs 2", 2),
        ("two-tower --epochs 20 --embedding full", 0),
        ("two-tower --epochs 20 --embedding dpq-sx --key-dim 2", 0),
        ("two-tower --epochs 20 --embedding dpq-sx --key-dim 4", 13),  # as wide as a subspace of 64 / 16
        ("two-tower --epochs 20 --embedding dpq-sx --per-table item_id.key_dim=2", 0),
        ("dlrm --epochs 20", 0),
        ("dlrm --epochs 20 --full-epochs none", 13),
    ],
)
def test_full_epochs_are_two_thirds_where_none_are_given(flags, expected):
    assert parsed(flags).full_epochs == expected


def test_plain_tables_have_no_dpq_and_get_it_when_they_are_quantized():
    full = parsed("two-tower --embedding full")
    assert full.embedding.dpq is None
    quantized = with_changes(full.as_dict(), {"embedding": "dpq-sx", "num-codes": 9})
    assert quantized.embedding.dpq == DPQConfig(method="sx", num_codes=9)


def test_the_learning_rate_of_a_language_model_halves_after_four_epochs():
    options = RECIPES["language-model"](**HERE).optimisation
    factors = [options.rate_factor(step, 2, 0) for step in range(14)]
    assert factors == [1] * 8 + [0.5] * 2 + [0.25] * 2 + [0.125] * 2


def test_rates_of_two_tower_fall_at_its_end_and_those_of_dlrm_stay():
    falling, staying = (RECIPES[name](**HERE).optimisation for name in ("two-tower", "dlrm"))
    assert (falling.rate_decay, falling.learning_rate, falling.patience) == ("late", 0.2, None)
    assert (staying.rate_decay, staying.learning_rate, staying.patience) == ("none", 0.02, 3)
    again = parsed("two-tower --rate-decay none --patience 4").optimisation
    assert (again.rate_decay, again.patience) == ("none", 4)
    assert parsed("dlrm --rate-decay linear --patience none").optimisation.patience is None


def test_target_ratio_gives_each_table_a_layout_and_leaves_the_rest():
    options = parsed("two-tower --target-ratio 20 --value-gradient --embedding-dim 72").embedding  # of 16 no multiple
    large, small = (options.dpq_of(name, rows) for name, rows in (("user_id", 1_000_000), ("item_id", 3000)))
    assert large.num_codes > small.num_codes
    assert [(each.value_gradient, each.values_dtype) for each in (large, small)] == [(True, "float16")] * 2
    with pytest.raises(ConfigError, match=r"table 'segment': target_ratio: got 20 for a table of 9 rows of 72 numbers"):
        options.dpq_of("segment", 9)


def test_without_a_target_ratio_all_tables_have_the_same_layout():
    options = parsed("two-tower --num-codes 9").embedding
    assert options.dpq_of("user_id", 10) is options.dpq_of("item_id", 1_000_000) is options.dpq
    assert parsed("two-tower --embedding full").embedding.dpq_of("user_id", 10) is None


@pytest.fixture
def earlier(tmp_path):
    """metrics.json of a run that was."""
    config = parsed("two-tower --embedding dpq-sx --num-codes 7 --epochs 3")
    (tmp_path / "metrics.json").write_text(json.dumps({"config": config.as_dict()}))
    return config, str(tmp_path / "metrics.json")


@pytest.mark.parametrize("recipe", [[], ["two-tower"]])
def test_config_file_gives_the_configuration_of_another_run(earlier, recipe):
    config, path = earlier
    again = parse([*recipe, "--config", path, "--out", "again", "--num-codes", "9"])
    want = with_changes(config.as_dict(), {"out": "again", "num-codes": 9})
    assert again == want


def test_config_file_may_be_refitted_whatever_patience_it_had(tmp_path):
    config = parsed("dlrm --patience 2")
    (tmp_path / "metrics.json").write_text(json.dumps({"config": config.as_dict()}))
    refit = parse(["--config", str(tmp_path / "metrics.json"), "--refit", "--epochs", "4", "--out", "refit"])
    assert refit == with_changes(config.as_dict(), {"refit": True, "epochs": 4, "out": "refit"})
    assert [refit.data.refit, config.data.refit] == [True, False]


@pytest.mark.parametrize("recipe", RECIPES)
def test_config_file_of_a_full_run_becomes_the_recipes_own_dpq(recipe, tmp_path):
    full = parsed(f"{recipe} --embedding full --epochs 5")
    (tmp_path / "metrics.json").write_text(json.dumps({"config": full.as_dict()}))
    kind = RECIPES[recipe](**HERE).embedding.kind
    again = parse(["--config", str(tmp_path / "metrics.json"), "--embedding", kind, "--out", "run"])
    assert again == parsed(f"{recipe} --epochs 5")
    assert parse(["--config", str(tmp_path / "metrics.json"), "--out", "run"]) == full


def test_config_file_of_another_recipe_is_refused(earlier):
    with pytest.raises(ConfigError, match="--config: got a run of two-tower, and the recipe dlrm"):
        parse(["dlrm", "--config", earlier[1], "--out", "again"])


def test_config_file_may_name_data_that_has_moved(earlier, tmp_path):
    config, path = earlier
    content = config.as_dict()
    content["data"]["path"] = "gone"
    (tmp_path / "metrics.json").write_text(json.dumps({"config": content}))
    assert parse(["--config", path, "--out", "again", "--data", "synthetic"]).data.path == "synthetic"
    with pytest.raises(ConfigError, match="--data: gone does not exist"):
        parse(["--config", path, "--out", "again"])


@pytest.mark.parametrize("kind", ["full", "dpq-sx"])
def test_config_file_without_an_option_takes_its_default(tmp_path, kind):
    config = parsed(f"two-tower --embedding {kind} --epochs 3")
    content = config.as_dict()
    del content["model"]["log_q"], content["data"]["vocabulary"]["rare_buckets"], content["optimisation"]["patience"]
    if kind != "full":
        del content["embedding"]["dpq"]["num_levels"]
    (tmp_path / "metrics.json").write_text(json.dumps({"config": content}))
    assert parse(["--config", str(tmp_path / "metrics.json"), "--out", "run"]) == config


def test_config_file_may_begin_with_a_byte_order_mark(tmp_path):
    config = parsed("dlrm --epochs 3")
    (tmp_path / "metrics.json").write_text("\ufeff" + json.dumps({"config": config.as_dict()}))
    assert parse(["--config", str(tmp_path / "metrics.json"), "--out", "run"]) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"model": [1]},
        {"embedding": None},
        {"embedding": {"dpq": [2]}},
        {"embedding": {"kind": ["full"]}},
        {"data": {"vocabulary": "exact"}},
        {"data": {"features": {"age": 1}}},
        {"optimisation": {"epochs": {}}},
        {"optimisation": {"learning_rate": False}},
        {"recipe": ["two-tower"]},
        {"more": {}},
    ],
)
def test_config_file_of_another_shape_is_refused(tmp_path, changes):
    content = {"recipe": "two-tower", **changes}
    (tmp_path / "metrics.json").write_text(json.dumps({"config": content}))
    with pytest.raises(ConfigError, match="got " if changes.get("recipe") is None else "is of recipe"):
        parse(["--config", str(tmp_path / "metrics.json"), "--out", "again"])


@pytest.mark.parametrize("content", ["", "[]", '{"metrics": {}}', '{"config": {"recipe": "nmf"}}'])
def test_config_file_without_a_configuration_is_refused(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ConfigError, match="--config: "):
        parse(["--config", str(tmp_path / "metrics.json"), "--out", "again"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_shows_every_option_of_the_recipe_with_its_default_and_no_other(recipe, capsys):
    with pytest.raises(SystemExit):
        parse([recipe, "--help"])
    shown = plain(capsys.readouterr().out)
    assert all(
        re.search(rf"--{flag}( [A-Z{{][^ ]*|, --no-{flag})+ [^( ]", shown) for flag in flags_of(recipe)
    )  # a text
    assert f"(default: {RECIPES[recipe](**HERE).optimisation.learning_rate})" in shown
    assert ("--log-q" in shown) == (recipe == "two-tower")
    assert ("--refit, --no-refit" in shown) == (recipe in ("two-tower", "dlrm"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_torchrun_takes_no_flag_for_the_beginning_of_one_of_its_own(recipe):
    """It looks at what follows the module too, and refuses --start, which could be two of its options."""
    for option in flags_of(recipe).values():
        arguments = ["-m", "training", recipe, f"--{option.flag}", "x"]
        assert get_args_parser().parse_args(arguments).training_script_args == arguments[2:]


def test_help_without_a_recipe_shows_recipes_and_examples(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert "two-tower" in shown
    assert "Click-through: how likely" in shown
    assert "--config runs/dpq/metrics.json --out runs/again" in shown
