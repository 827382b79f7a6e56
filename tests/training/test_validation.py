"""Validation of settings, and its messages: settings that make no sense, flags without a use."""

import dataclasses
import json
import sys

import pytest

from dpq_rec import ConfigError
from tests.training.command_line import HERE, parsed
from training.__main__ import main
from training.command_line import parse
from training.recipes import RECIPES, from_dict, with_changes
from training.recipes.two_tower import TwoTowerOptions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere"}, "--data: nowhere does not exist"),
        ({"out": ""}, "--out is missing"),
        ({"embedding": "pq"}, "embedding.kind: got 'pq', want one of full, dpq-sx, dpq-vq"),
        ({"epochs": 0}, "--epochs: got 0, want more than 0"),
        ({"epochs": "many"}, "optimisation.epochs: got 'many', want a value of type int"),
        ({"learning-rate": float("inf")}, "--learning-rate: got inf, want a finite number"),
        ({"patience": 0}, "--patience: got 0, want more than 0"),
        ({"rate-decay": "cosine"}, "optimisation.rate_decay: got 'cosine', want one of none, linear, late"),
        ({"seed": -1}, "--seed: got -1, want 0 or more"),
        ({"num-negatives": 5000}, "got 5000 negatives, a batch of 4096"),
        ({"num-negatives": 0}, "--num-negatives: got 0, want more than 0"),
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
        ({"history": -1}, "--history: got -1, want 0 or more"),
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


def test_config_rejects_an_option_that_it_does_not_know():
    content = RECIPES["dlrm"](**HERE).as_dict()
    content["model"]["temperature"] = 1.0
    with pytest.raises(ConfigError, match=r"got model\.temperature, which is no option; want some of dense_layers"):
        from_dict(content)


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
        ("two-tower --embedding full --quantized-rate 0.5", "--quantized-rate: plain tables never are quantized"),
        ("dlrm --embedding full --quantized-rate 0.5", "--quantized-rate: plain tables never are quantized"),
        (
            "two-tower --epochs 1 --quantized-rate 0.5",
            "--quantized-rate: without full epochs tables are",
        ),
        (
            "two-tower --full-epochs 0 --quantized-rate 0.5",
            "--quantized-rate: without full epochs tables",
        ),
        ("dlrm --quantized-rate 0.5", "--quantized-rate: without full epochs tables are"),
        ("two-tower --negatives in-batch --num-negatives 5", "--num-negatives: --negatives in-batch draws none"),
        ("two-tower --no-log-q", "--log-q: with --negatives uniform"),
        ("two-tower --negatives uniform --log-q", "--log-q: with --negatives uniform"),
        ("two-tower --target-ratio 20 --num-subspaces 8", "--num-subspaces: --target-ratio chooses it for each table"),
        ("two-tower --target-ratio 20 --num-codes 8", "--num-codes: --target-ratio chooses it for each table"),
        ("dlrm --target-ratio 20 --num-levels 2", "--num-levels: --target-ratio chooses it for each table"),
        (
            "two-tower --start-from uniform",
            "--start-from: after --full-epochs keys and values always begin as k-means centroids",
        ),
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
    assert "Error parsing --over-layers: got 'a,b', want A,B,..." in capsys.readouterr().err


def test_main_says_in_one_line_what_is_wrong(capsys):
    assert main(["two-tower", "--data", "nowhere", "--out", "run"]) == 2
    assert capsys.readouterr().err == "training: --data: nowhere does not exist\n"


def test_fused_adam_is_refused_on_cpu(capsys):
    arguments = "two-tower --data synthetic --out run --device cpu --optimizer adam"
    assert main(arguments.split()) == 2
    assert "got adam on CPU, where FBGEMM has no fused Adam" in capsys.readouterr().err


def test_a_recipe_that_is_none_is_named(capsys):
    assert main(["three-tower", "--data", "synthetic"]) == 2
    assert "got three-tower; the recipe comes first, one of two-tower, dlrm" in capsys.readouterr().err
