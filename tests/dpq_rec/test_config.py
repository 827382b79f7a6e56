"""What DPQConfig refuses, and that it says why."""

import pytest

from dpq_rec import ConfigError, DPQConfig

REFUSED = [
    ({"method": "pq"}, "method: got 'pq', want one of 'sx', 'vq'"),
    ({"metric": "manhattan"}, "metric: got 'manhattan', want one of None, 'dot', 'euclidean', 'cosine'"),
    ({"values_dtype": "int8"}, "values_dtype: got 'int8', want one of 'float32', 'float16'"),
    ({"num_codes": 1}, "num_codes: got 1"),
    ({"num_codes": 65_537}, "num_codes: got 65537"),
    ({"num_subspaces": 0}, "num_subspaces: got 0"),
    ({"num_levels": 0}, "num_levels: got 0"),
    ({"method": "vq", "metric": "cosine"}, "got 'cosine' with method 'vq', which emits the nearest key"),
    ({"method": "vq", "tie_keys": True}, "the keys of 'vq' are its values always; leave it out"),
    ({"method": "vq", "key_dim": 4}, "key_dim: got 4 with method 'vq'"),
    ({"method": "vq", "temperature": 2.0}, "'vq' has no softmax"),
    ({"method": "sx", "penalty_weight": 2.0}, "penalty_weight: got 2.0 with method 'sx'"),
    ({"method": "sx", "commitment_weight": 0.25}, "commitment_weight: got 0.25 with method 'sx'"),
    ({"method": "sx", "ema_decay": 0.99}, "ema_decay: got 0.99 with method 'sx'"),
    ({"method": "sx", "value_gradient": True}, "'sx' moves values by the task's gradient always"),
    ({"tie_keys": True, "key_dim": 4}, "key_dim: got 4 with tie_keys"),
    ({"num_levels": 2, "key_dim": 4}, "key_dim: got 4 with num_levels 2"),
    ({"key_dim": 0}, "key_dim: got 0"),
    ({"temperature": 0.0}, "temperature: got 0.0"),
    ({"temperature": float("nan")}, "temperature: got nan, want a finite number"),
    ({"temperature": 1e-45}, "want 1e-06 or more"),
    ({"method": "vq", "penalty_weight": float("inf")}, "penalty_weight: got inf, want a finite number"),
    ({"num_codes": 4.0}, "num_codes: got 4.0, want an integer"),
    ({"num_subspaces": True}, "num_subspaces: got True, want an integer"),
    ({"key_dim": 2.5}, "key_dim: got 2.5, want an integer"),
    ({"revive_after": 0}, "revive_after: got 0"),
    ({"method": "vq", "ema_decay": 1.0}, "ema_decay: got 1.0, want between 0 and 1"),
    ({"method": "vq", "ema_decay": 0.9, "penalty_weight": 0.5}, "penalty_weight: got 0.5 with ema_decay"),
    ({"method": "vq", "ema_decay": 0.9, "value_gradient": True}, "value_gradient: got True with ema_decay"),
    ({"method": "vq", "penalty_weight": 0.0}, "nothing else moves the values"),
    ({"method": "vq", "penalty_weight": -1.0}, "penalty_weight: got -1.0"),
    ({"method": "vq", "commitment_weight": -1.0}, "commitment_weight: got -1.0"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[str(settings) for settings, _ in REFUSED])
def test_config_refuses_what_makes_no_sense_and_says_why(settings, message):
    with pytest.raises(ConfigError) as refusal:
        DPQConfig(**settings)
    assert message in str(refusal.value)


def test_config_refuses_subspaces_that_do_not_divide_the_dimension():
    with pytest.raises(ConfigError, match=r"got 5, want a divisor of embedding_dim 12: \[1, 2, 3, 4, 6, 12\]"):
        DPQConfig(num_subspaces=5).subspace_dim(12)


def test_config_refuses_the_cosine_of_single_numbers():
    with pytest.raises(ConfigError, match="which have only two directions"):
        DPQConfig(num_subspaces=12, metric="cosine").query_dim(12)


def test_query_is_as_wide_as_its_keys():
    assert DPQConfig(num_subspaces=4).query_dim(12) == 12
    assert DPQConfig(num_subspaces=4, key_dim=5).query_dim(12) == 20


def test_metric_unless_given_is_the_method_s_own():
    assert DPQConfig(method="sx").resolved_metric == "dot"
    assert DPQConfig(method="vq").resolved_metric == "euclidean"
