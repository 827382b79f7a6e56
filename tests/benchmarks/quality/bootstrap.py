"""Methods against full, user by user. In: what cases left by user. Out: relative differences and their bounds.

A paired bootstrap: users are drawn with replacement, the same ones for both methods. Several seeds of a method are
averaged, user by user for retrieval, draw by draw for AUC; so the bound is one over users, given these trained models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dpq_rec import ConfigError
from tests.benchmarks.quality.case import Case
from tests.benchmarks.quality.judge import BY_USER
from tests.benchmarks.quality.worker import RUN

FILE = "quality_bootstrap.json"
METRICS = {"two-tower": ("ndcg@10", "ndcg@20"), "dlrm": ("auc",)}
NUM_DRAWS = 2000
_SEED = 0

Statistic = Callable[[NDArray[np.int64]], float]
"""How often each user is drawn [U] -> a metric of those users."""
ByUser = Mapping[str, NDArray[Any]]


class Difference(NamedTuple):
    """A method's metric over another's, minus 1.

    Attributes:
        observed: of all users.
        lower_95: 95 % of draws are above it.
        interval_95: between which the middle 95 % of draws lie.
    """

    observed: float
    lower_95: float
    interval_95: tuple[float, float]


def relative_difference(
    one: Sequence[Statistic], other: Sequence[Statistic], num_users: int, *, num_draws: int = NUM_DRAWS
) -> Difference:
    """Paired bootstrap over users.

    Args:
        one: the method's metric, for each of its seeds.
        other: that which it is compared with.
        num_users: U.
        num_draws: resamples.
    """
    rng = np.random.default_rng(_SEED)

    def ratio(times_U: NDArray[np.int64]) -> float:
        means = [np.mean([statistic(times_U) for statistic in each]) for each in (one, other)]
        return float(means[0] / means[1] - 1)

    draws = [ratio(np.bincount(rng.integers(num_users, size=num_users), minlength=num_users)) for _ in range(num_draws)]
    low, high = np.quantile(draws, [0.025, 0.975])
    everyone = ratio(np.ones(num_users, np.int64))
    return Difference(everyone, float(np.quantile(draws, 0.05)), (float(low), float(high)))


def mean_of(values_U: NDArray[np.float64]) -> Statistic:
    """The mean over users of a metric that each of them has."""
    return lambda times_U: float(values_U @ times_U / times_U.sum())


def auc_of(logits_N: NDArray[Any], labels_N: NDArray[Any], users_N: NDArray[np.int64]) -> Statistic:
    """AUC of the examples of the users drawn, each as often as its user; ties count half.

    Args:
        logits_N: of each example.
        labels_N: 0 or 1.
        users_N: 0 to U-1.
    """
    order_N = np.argsort(logits_N, kind="stable")
    _, at_N = np.unique(logits_N[order_N], return_inverse=True)
    clicked_N, users_N = labels_N[order_N] == 1, users_N[order_N]

    def auc(times_U: NDArray[np.int64]) -> float:
        weights_N = times_U[users_N].astype(np.float64)
        clicks_T = np.bincount(at_N, weights_N * clicked_N)
        others_T = np.bincount(at_N, weights_N * ~clicked_N)
        below_T = np.cumsum(others_T) - others_T
        return float(clicks_T @ (below_T + others_T / 2) / (clicks_T.sum() * others_T.sum()))

    return auc


def compare(lines: Sequence[Mapping[str, Any]], out: Path, *, num_draws: int = NUM_DRAWS) -> list[dict[str, Any]]:
    """Every final method against full, on the seeds that both have.

    Args:
        lines: of results, full's among them.
        out: folder of cases, where they left BY_USER.
        num_draws: resamples.

    Returns:
        For each data set, method, ratio and metric what `Difference` holds, and the seeds.

    Raises:
        ConfigError: a case of the lines left nothing in `out`.
    """
    finals: dict[tuple[str, str, float | None], dict[int, Case]] = {}
    for case in (Case.from_dict(line["case"]) for line in lines if line["stage"] == "final"):
        finals.setdefault((case.dataset, case.method, case.ratio), {})[case.seed] = case
    found = []
    for (dataset, method, ratio), of_method in tqdm(finals.items(), "bootstrap", unit="method"):
        of_full = finals.get((dataset, "full", None), {})
        seeds = sorted(set(of_method) & set(of_full))
        recipe = next(iter(of_method.values())).recipe
        if method == "full" or not seeds:
            continue
        pairs = [[_by_user(out, each[seed]) for seed in seeds] for each in (of_method, of_full)]
        for metric in METRICS[recipe]:
            one, other, num_users = _statistics(pairs, metric)
            difference = relative_difference(one, other, num_users, num_draws=num_draws)
            about = {"dataset": dataset, "method": method, "ratio": ratio, "metric": metric, "seeds": seeds}
            found.append({**about, "num_users": num_users, "num_draws": num_draws, **difference._asdict()})
    return found


def _by_user(out: Path, case: Case) -> ByUser:
    path = out / case.name / RUN / BY_USER
    if not path.exists():
        raise ConfigError(f"--out: got no {path}; want the folder in which {case.name} was done")
    with np.load(path) as content:
        return dict(content)


def _statistics(pairs: list[list[ByUser]], metric: str) -> tuple[list[Statistic], list[Statistic], int]:
    """The statistics of both methods, seed by seed, and the number of users that both have."""
    every = [each for group in pairs for each in group]
    key = "user_rows_N" if metric == "auc" else "user_ids_U"
    if any(not np.array_equal(each[key], every[0][key]) for each in every):
        raise ConfigError("--out: got cases of other users; want the same data and the same test split for all")
    if metric != "auc":
        one, other = ([mean_of(each[metric]) for each in group] for group in pairs)
        return one, other, len(every[0][key])
    users, users_N = np.unique(every[0][key], return_inverse=True)
    one, other = ([auc_of(each["logits_N"], each["labels_N"], users_N) for each in group] for group in pairs)
    return one, other, len(users)


def write(compared: Sequence[Mapping[str, Any]], folder: Path, *, keep_others: bool = False) -> Path:
    """The comparisons, beside the results: sums over users alone.

    Args:
        compared: what `compare` found.
        folder: of the file.
        keep_others: whether what the file has of other methods, ratios and metrics stays.
    """
    path = folder / FILE
    found = {_about(each): each for each in (*(read(folder) if keep_others else ()), *compared)}
    path.write_text("[\n" + ",\n".join(json.dumps(each) for each in found.values()) + "\n]\n")
    return path


def _about(compared: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(compared[name] for name in ("dataset", "method", "ratio", "metric"))


def read(folder: Path) -> list[dict[str, Any]]:
    """What `write` left; nothing where it did not."""
    path = folder / FILE
    content: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return content
