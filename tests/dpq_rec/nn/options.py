"""Combinations of all options of the method, by name; num_subspaces, num_codes and dimensions are each test's own."""

OPTIONS = {
    "sx": {"method": "sx"},
    "sx, euclidean, tied, no batch norm": {
        "method": "sx",
        "metric": "euclidean",
        "tie_keys": True,
        "batch_norm": False,
    },
    "sx, cosine, wider keys": {"method": "sx", "metric": "cosine", "key_dim": 3, "temperature": 0.5},
    "sx, narrower keys": {"method": "sx", "key_dim": 1},
    "sx, shared, half": {"method": "sx", "share_subspaces": True, "values_dtype": "float16"},
    "sx, three levels": {"method": "sx", "metric": "euclidean", "num_levels": 3},
    "sx, two levels, cosine, tied, shared, half": {
        "method": "sx",
        "num_levels": 2,
        "metric": "cosine",
        "tie_keys": True,
        "share_subspaces": True,
        "values_dtype": "float16",
    },
    "sx, hard values": {"method": "sx", "hard_values": True},
    "sx, hard values, two levels, tied, shared": {
        "method": "sx",
        "hard_values": True,
        "num_levels": 2,
        "tie_keys": True,
        "share_subspaces": True,
    },
    "sx, warm, no batch norm": {"method": "sx", "temperature": 3.0, "batch_norm": False},
    "vq": {"method": "vq"},
    "vq, levels, committed, values by the task too": {
        "method": "vq",
        "num_levels": 3,
        "commitment_weight": 0.25,
        "value_gradient": True,
    },
    "vq, no penalty, no batch norm": {
        "method": "vq",
        "penalty_weight": 0.0,
        "value_gradient": True,
        "batch_norm": False,
    },
    "vq, shared, half, committed": {
        "method": "vq",
        "share_subspaces": True,
        "values_dtype": "float16",
        "penalty_weight": 0.5,
        "commitment_weight": 1.0,
    },
    "vq, running means, levels": {"method": "vq", "ema_decay": 0.9, "num_levels": 2, "batch_norm": False},
    "vq, running means, shared, committed": {
        "method": "vq",
        "ema_decay": 0.5,
        "share_subspaces": True,
        "commitment_weight": 0.25,
    },
}
