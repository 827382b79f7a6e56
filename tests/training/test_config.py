"""Settings are checked once, at the edge, and come back whole."""

import dataclasses
import json
import sys

import pytest
from torch.distributed.run import get_args_parser

from dpq_rec import ConfigError, DPQConfig
from training import config as config_module
from training.__main__ import main, parse
from training.config import RunConfig, TwoTowerOptions, options_of, with_changes
from training.recipes import RECIPES

HERE = {"data": ".", "out": "run"}
OWN_FLAGS = {
    "two-tower": "--dense-learning-rate 1 --min-count 3 --log-q --negatives both",
    "dlrm": "--dense-learning-rate 1 --min-count 3 --over-layers 8,4",
    "language-model": "--rate-decay 0.8 --dropout 0.5 --clip-norm 3",
    "text-classification": "--min-count 3 --dropout 0.2 --text-column title",
}


def parsed(text):
    data = "." if text.startswith(("language", "text")) else "synthetic"
    return parse([*text.split(), "--data", data, "--out", "run"])


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
    assert RunConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config


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
    flags = {option.path[-1] for option in options_of("dlrm") if "dpq" in option.path}
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


def test_what_was_asked_for_does_not_give_way():
    with pytest.raises(ConfigError, match="value_gradient: got True with ema_decay"):
        parsed("two-tower --ema-decay 0.9 --value-gradient")
    with pytest.raises(ConfigError, match=r"penalty_weight: got 2\.0 with method 'sx'"):
        parsed("two-tower --embedding dpq-sx --penalty-weight 2")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("two-tower --epochs 20", 6),
        ("two-tower --epochs 2", 0),
        ("two-tower --epochs 20 --full-epochs 2", 2),
        ("two-tower --epochs 20 --embedding full", 0),
        ("two-tower --epochs 20 --embedding dpq-sx --key-dim 2", 0),
        ("two-tower --epochs 20 --embedding dpq-sx --key-dim 4", 6),  # as wide as a subspace of 64 / 16
        ("dlrm --epochs 20", 0),
        ("dlrm --epochs 20 --full-epochs none", 6),
    ],
)
def test_full_epochs_are_a_third_where_none_are_given(flags, expected):
    assert parsed(flags).full_epochs == expected


def test_plain_tables_have_no_dpq_and_get_it_when_they_are_quantized():
    full = parsed("two-tower --embedding full")
    assert full.embedding.dpq is None
    quantized = with_changes(full.as_dict(), {"embedding": "dpq-sx", "num-codes": 9})
    assert quantized.embedding.dpq == DPQConfig(method="sx", num_codes=9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere"}, "--data: nowhere does not exist"),
        ({"out": ""}, "--out is missing"),
        ({"embedding": "pq"}, "embedding.kind: got 'pq', want one of full, dpq-sx, dpq-vq"),
        ({"epochs": 0}, "--epochs: got 0, want more than 0"),
        ({"epochs": "many"}, "optimisation.epochs: got 'many', want a value of type int"),
        ({"patience": 0}, "--patience: got 0, want more than 0"),
        ({"rate-decay": "cosine"}, "optimisation.rate_decay: got 'cosine', want one of none, linear, late"),
        ({"seed": -1}, "--seed: got -1, want 0 or more"),
        ({"num-negatives": 5000}, "got 5000 negatives, a batch of 4096"),
        ({"num-subspaces": 7}, "num_subspaces: got 7, want a divisor"),
        ({"num-codes": 1}, "num_codes: got 1"),
        ({"commitment-weight": 0.5, "embedding": "dpq-sx"}, "commitment_weight: got 0.5 with method 'sx'"),
        ({"embedding": "full", "num-codes": 8}, "--num-codes: --embedding full has plain tables"),
        ({"embedding": "full", "start-from": "kmeans"}, "--start-from: got kmeans with --embedding full"),
        ({"embedding": "full", "full-epochs": 2}, "--full-epochs: got 2 with --embedding full, whose epochs all are"),
        ({"embedding": "full", "target-ratio": 20.0}, "--target-ratio: got 20 with --embedding full"),
        ({"target-ratio": 0.0}, "--target-ratio: got 0.0, want more than 0"),
        (
            {"target-ratio": 20.0, "embedding": "dpq-sx", "key-dim": 2},
            "--target-ratio: got 20 with --key-dim 2, which has no levels",
        ),
        ({"tiers": ((0.5, 1),)}, r"tiers: got \(\(0.5, 1\),\), want whole numbers of levels, from below num_levels 1"),
        ({"tiers": [[0.5]], "num-levels": 3}, r"dpq.tiers: got \[0.5\], want 2 values"),
        ({"target-ratio": 20.0, "tiers": ((0.5, 1),), "num-levels": 2}, "--target-ratio: got 20 with --tiers"),
        ({"embedding": "full", "per-table": {"item_id": {"num_codes": 8}}}, "--per-table: --embedding full has plain"),
        ({"per-table": {"item_id": {"codes": 8}}}, "item_id.codes: there is no such option; want some of method, num_"),
        ({"per-table": {"item_id": {"num_codes": 1}}}, "--per-table: item_id.num_codes: got 1, want"),
        ({"per-table": {"item_id": {"num_codes": "x"}}}, "item_id.num_codes: got 'x', want what its flag takes"),
        ({"per-table": {"item_id": {"num_codes": 1.5}}}, "item_id.num_codes: got 1.5, want a value of type int"),
        ({"per-table": {"item_id": {"num_subspaces": 7}}}, "--per-table: item_id.num_subspaces: got 7, want a divisor"),
        ({"per-table": {"item_id": {"method": "sx"}}}, "item_id.method: --embedding says it for all tables"),
        ({"per-table": {"item_id": {"temperature": 2}}}, "item_id.temperature: got 2.0 with method 'vq'"),
        (
            {"per-table": {"item_id": {"num_levels": 2}}, "num-levels": 9, "tiers": ((0.5, 2),)},
            r"item_id.tiers: got \(\(0.5, 2\),\), want whole numbers of levels, from below num_levels 2",
        ),
        (
            {"per-table": {"item_id": {"num_levels": 2}}, "target-ratio": 20.0},
            "--per-table: item_id.num_levels: --target-ratio chooses it for each table",
        ),
        ({"full-epochs": -1}, "--full-epochs: got -1, want 0 or more"),
        ({"full-epochs": 20}, "--full-epochs: got 20 of 20 epochs; want fewer than --epochs"),
        (
            {"full-epochs": 2, "embedding": "dpq-sx", "key-dim": 2},
            "--full-epochs: got 2 with --key-dim 2: queries have to be as wide as vectors",
        ),
        ({"features": ("age",)}, "--features: got age; two-tower has no layer after its tables"),
        ({"vocabulary": "modulo"}, "num_buckets: got None for modulo"),
    ],
)
def test_config_rejects_what_makes_no_sense(changes, message):
    with pytest.raises(ConfigError, match=message):
        with_changes(RECIPES["two-tower"](**HERE).as_dict(), changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere"}, "--data: nowhere does not exist$"),
        ({"dropout": 1.0}, "--dropout: got 1.0, want 0 or more and less than 1"),
        ({"num-layers": 0}, "--num-layers: got 0, want more than 0"),
        ({"full-rate-epochs": -1}, "--full-rate-epochs: got -1, want 0 or more"),
        ({"num-subspaces": 7}, "num_subspaces: got 7, want a divisor"),
    ],
)
def test_config_of_a_language_model_rejects_what_makes_no_sense(changes, message):
    with pytest.raises(ConfigError, match=message):
        with_changes(RECIPES["language-model"](**HERE).as_dict(), changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "--data is missing"),
        ({"dropout": -0.1}, "--dropout: got -0.1"),
        ({"word-dropout": 1.5}, "--word-dropout: got 1.5, want 0 or more and less than 1"),
        ({"min-count": 0}, "--min-count: got 0, want more than 0"),
        ({"label-column": "text"}, "--label-column: got text, which is the text; want another column"),
    ],
)
def test_config_of_a_text_classifier_rejects_what_makes_no_sense(changes, message):
    with pytest.raises(ConfigError, match=message):
        with_changes(RECIPES["text-classification"](**HERE).as_dict(), changes)


def test_groups_of_another_recipe_are_refused():
    text, clicks = RECIPES["language-model"](**HERE), RECIPES["dlrm"](**HERE)
    with pytest.raises(ConfigError, match="got 'language-model' with DataOptions, LanguageModelOptions"):
        dataclasses.replace(text, data=clicks.data)


def test_the_learning_rate_of_a_language_model_halves_after_four_epochs():
    rates = [RECIPES["language-model"](**HERE).optimisation.rate_of(epoch) for epoch in range(1, 8)]
    assert rates == [1, 1, 1, 1, 0.5, 0.25, 0.125]


def test_rates_of_two_tower_fall_over_all_its_epochs_and_those_of_dlrm_stay():
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


def test_config_rejects_an_option_that_it_does_not_know():
    content = RECIPES["dlrm"](**HERE).as_dict()
    content["model"]["temperature"] = 1.0
    with pytest.raises(ConfigError, match=r"got model\.temperature, which is no option; want some of dense_layers"):
        RunConfig.from_dict(content)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("dlrm --no-log-q", "--log-q is an option of two-tower: dlrm scores a pair by itself"),
        ("dlrm --negatives both", "--negatives is an option of two-tower"),
        ("two-tower --over-layers 8", "--over-layers is an option of dlrm: two-tower has no layer"),
        (
            "language-model --optimizer rowwise-adagrad",
            "--optimizer is an option of two-tower and dlrm: language-model clips and moves all its weights together",
        ),
        ("language-model --num-negatives 5", "--num-negatives is an option of two-tower: language-model tells a word"),
        ("language-model --num-users 5", "--num-users is an option of two-tower and dlrm, and language-model has none"),
        ("language-model", "--data: synthetic does not exist: only interactions can be generated"),
        (
            "text-classification --optimizer adam",
            "--optimizer is an option of two-tower and dlrm: text-classification moves all its weights alike, by Adam",
        ),
        ("language-model --refit", "--refit is an option of two-tower and dlrm, and language-model has none such"),
        ("text-classification --clip-norm 1", "--clip-norm is an option of language-model, and text-classification"),
    ],
)
def test_an_option_of_another_recipe_is_refused_with_the_reason(arguments, message, capsys):
    assert main([*arguments.split(), "--data", "synthetic", "--out", "run"]) == 2
    assert message in capsys.readouterr().err


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherOptions(TwoTowerOptions):
    """Model other: as two-tower's, and one more.

    Attributes:
        over_layers: as dlrm's.
        extra: of this recipe alone.
    """

    over_layers: tuple[int, ...] = (3,)
    extra: int = 1


def test_options_that_several_other_recipes_have_are_refused_by_naming_them(monkeypatch):
    def other(data, out):
        start = RECIPES["two-tower"](data, out)
        return dataclasses.replace(start, recipe="other", model=OtherOptions())

    monkeypatch.setitem(RECIPES, "other", other)
    monkeypatch.setitem(config_module.MODEL_OPTIONS, "other", OtherOptions)
    assert parsed("other --extra 4 --similarity dot").model.extra == 4
    with pytest.raises(ConfigError, match="--similarity is an option of two-tower and other: dlrm scores a pair"):
        parsed("dlrm --similarity dot")
    with pytest.raises(ConfigError, match="--over-layers is an option of dlrm and other: two-tower has no layer"):
        parsed("two-tower --over-layers 3")
    with pytest.raises(ConfigError, match="--extra is an option of other, and dlrm has none such; leave it out"):
        parsed("dlrm --extra 3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("two-tower --data . --num-users 5", "--num-users: --data . is read, not generated; leave it out"),
        ("two-tower --data . --num-items 5", "--num-items: --data . is read"),
        ("dlrm --data . --num-interactions 5", "--num-interactions: --data . is read"),
        ("dlrm --data . --no-string-ids", "--string-ids: --data . is read"),
        ("two-tower --negatives in-batch --num-negatives 5", "--num-negatives: --negatives in-batch draws none"),
        ("two-tower --no-log-q", "--log-q: with --negatives uniform"),
        ("two-tower --negatives uniform --log-q", "--log-q: with --negatives uniform"),
        ("two-tower --target-ratio 20 --num-subspaces 8", "--num-subspaces: --target-ratio chooses it for each table"),
        ("two-tower --target-ratio 20 --num-codes 8", "--num-codes: --target-ratio chooses it for each table"),
        ("dlrm --target-ratio 20 --num-levels 2", "--num-levels: --target-ratio chooses it for each table"),
        (
            "dlrm --full-epochs 2 --start-from uniform",
            "--start-from: after --full-epochs keys and values always begin as k-means centroids",
        ),
        (
            "two-tower --refit --patience 3",
            "--patience: with --refit the validation split trains, and no run ends before",
        ),
        ("dlrm --refit --patience 3", "--patience: with --refit the validation split trains"),
        ("dlrm --vocabulary modulo --num-buckets 9 --min-count 1", "--min-count: with --vocabulary modulo"),
        ("dlrm --vocabulary modulo --num-buckets 9 --rare-buckets 3", "--rare-buckets: with --vocabulary modulo"),
    ],
)
def test_flags_without_a_use_are_refused_and_defaults_are_not(arguments, message, tmp_path):
    arguments = [*arguments.split(), "--out", "run"]
    if "--data" not in arguments:
        arguments += ["--data", "synthetic"]
    with pytest.raises(ConfigError, match=message):
        parse(arguments)
    at = next(
        i for i, each in enumerate(arguments) if each.removeprefix("--no-").lstrip("-") == message[2:].split(":")[0]
    )
    stop = at + 1 if "log-q" in arguments[at] or "string" in arguments[at] else at + 2
    config = parse(arguments[:at] + arguments[stop:])
    (tmp_path / "metrics.json").write_text(json.dumps({"config": config.as_dict()}))
    assert parse(["--config", str(tmp_path / "metrics.json"), "--out", "run"]) == config


def test_missing_tensorboard_is_said_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["two-tower", "--data", "synthetic", "--out", str(tmp_path / "run")]) == 2
    assert "tensorboard, which training writes for, is not installed; install it: pip" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_widths_that_are_no_numbers_are_named_as_such(capsys):
    with pytest.raises(SystemExit):
        parsed("dlrm --over-layers a,b")
    assert "argument --over-layers: invalid int value: 'a,b'" in capsys.readouterr().err


def test_main_says_in_one_line_what_is_wrong(capsys):
    assert main(["two-tower", "--data", "nowhere", "--out", "run"]) == 2
    assert capsys.readouterr().err == "training: --data: nowhere does not exist\n"


def test_fused_adam_is_refused_on_cpu(capsys):
    arguments = "two-tower --data synthetic --out run --device cpu --optimizer adam"
    assert main(arguments.split()) == 2
    assert "got adam on CPU, where FBGEMM has no fused Adam" in capsys.readouterr().err


def test_a_recipe_that_is_none_is_named(capsys):
    with pytest.raises(SystemExit):
        parse(["three-tower", "--data", "synthetic"])
    assert "got three-tower; the recipe comes first, one of two-tower, dlrm" in capsys.readouterr().err


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
    assert [refit.is_refit, config.is_refit, parsed("language-model").is_refit] == [True, False, False]


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
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"--{option.flag}" in shown for option in options_of(recipe))
    assert all(option.text for option in options_of(recipe))
    assert f"(default: {RECIPES[recipe](**HERE).optimisation.learning_rate})" in shown
    assert ("--log-q" in shown) == (recipe == "two-tower")
    assert ("--refit, --no-refit" in shown) == (recipe in ("two-tower", "dlrm"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_torchrun_takes_no_flag_for_the_beginning_of_one_of_its_own(recipe):
    """It looks at what follows the module too, and refuses --start, which could be two of its options."""
    for option in options_of(recipe):
        arguments = ["-m", "training", recipe, f"--{option.flag}", "x"]
        assert get_args_parser().parse_args(arguments).training_script_args == arguments[2:]


def test_help_without_a_recipe_shows_recipes_and_examples(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert "two-tower" in shown
    assert "Click-through: how likely" in shown
    assert "--config runs/dpq/metrics.json --out runs/again" in shown
