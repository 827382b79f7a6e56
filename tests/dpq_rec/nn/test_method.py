"""Combinations of every option held to the paper's formulas as loops, and to finite differences of their surrogate.

The loops know nothing of the library but the parameters: they take a query apart, score every key, choose, subtract and
add up, one number at a time. The surrogate is what the method says it differentiates: values mixed by softmax (eq. 5),
or the query itself beside its codebook losses (eq. 7), with all that has no gradient held fixed.
"""

import itertools

import numpy as np
import pytest
import torch

from dpq_rec import DPQConfig
from dpq_rec.nn import Quantizer
from dpq_rec.nn.quantizer import NO_CODE
from tests.dpq_rec.nn.options import OPTIONS

D, K, S = 3, 4, 2
E, N = D * S, 7
V, ROWS = 20, [1, 2, 4, 5, 9, 10, 19]  # a table's rows, and those of the queries: some of each tier
EPSILON = 1e-5  # of batch norm, as the paper's authors have it
combinations = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


class Naive:
    """The method, a number at a time. `vectors` [N][E] and `codes` [N][M] are what it emits."""

    def __init__(self, config, queries, counts, values, keys):
        self.config, self.counts, self.values = config, counts, values.copy()
        self.codes = np.zeros((len(queries), config.num_levels * D), int)
        self.vectors = np.zeros((len(queries), D, S))
        self.rests, self.chosen = [], []  # of each level
        rests = queries.reshape(len(queries), D, -1).copy()
        for level in range(config.num_levels):
            self.rests.append(rests)
            scores = self.scores(level, rests, values, keys)
            chosen = np.zeros((len(queries), D, S))
            for n, d in itertools.product(range(len(queries)), range(D)):
                if not has_level(config, n, level):
                    self.codes[n, level * D + d] = NO_CODE
                    continue
                code = max(range(K), key=lambda k: scores[n, d, k])
                self.codes[n, level * D + d] = code
                chosen[n, d] = values[self.group(level, d), code]
            self.chosen.append(chosen)
            self.vectors += chosen
            if level + 1 < config.num_levels:
                rests = rests - chosen

    def group(self, level, d):
        return level if self.config.share_subspaces else level * D + d

    def scores(self, level, rests, values, keys):
        """Scores of a level; batch norm has one mean and variance per code, over every occurrence and subspace."""
        out = np.zeros((*rests.shape[:2], K))
        for n, d, k in np.ndindex(out.shape):
            query, key = rests[n, d], keys[self.group(level, d), k]
            if self.config.resolved_metric == "euclidean":
                out[n, d, k] = -((query - key) ** 2).sum()
            else:
                out[n, d, k] = query @ key
            if self.config.resolved_metric == "cosine":
                out[n, d, k] /= np.linalg.norm(query) * np.linalg.norm(key)
        if self.config.batch_norm:
            for k in range(K):
                has = [n for n in range(len(out)) if has_level(self.config, n, level)]
                every = np.repeat(out[has, :, k], self.counts[has], axis=0)
                out[:, :, k] = (out[:, :, k] - every.mean()) / np.sqrt(every.var() + EPSILON)
        return out

    def surrogate(self, weights, queries, values, keys):
        """What is differentiated: weights times soft vectors, and the codebook loss. Choices and rests are fixed."""
        config, soft, codebook_loss = self.config, np.zeros((len(queries), D, S)), 0.0
        groups = queries.reshape(len(queries), D, -1)
        taken = np.zeros_like(self.vectors)
        for level in range(config.num_levels):
            rests = groups - taken if config.num_levels > 1 else groups
            if config.method == "sx":
                soft += self.mixture(level, rests, self.values if config.hard_values else values, keys)
                if config.hard_values:
                    soft += self.emitted(level, values)
            else:
                codebook_loss += self.codebook_loss(level, rests, values)
                if config.value_gradient:
                    soft += self.emitted(level, values)
            taken = taken + self.chosen[level]
        if config.method == "vq":
            soft += groups
        return (soft.reshape(len(queries), E) * weights).sum() + codebook_loss

    def mixture(self, level, rests, values, keys):
        out = np.zeros((len(rests), D, S))
        scores = self.scores(level, rests, values, keys)
        for n, d in itertools.product(range(len(rests)), range(D)):
            if not has_level(self.config, n, level):
                continue
            weights = np.exp(scores[n, d] / self.config.temperature)
            for k in range(K):
                out[n, d] += weights[k] / weights.sum() * values[self.group(level, d), k]
        return out

    def emitted(self, level, values):
        out = np.zeros((len(self.codes), D, S))
        for n, d in itertools.product(range(len(out)), range(D)):
            if has_level(self.config, n, level):
                out[n, d] = values[self.group(level, d), self.codes[n, level * D + d]]
        return out

    def codebook_loss(self, level, rests, values):
        """|T(Q) - sg(Q)|^2 and |Q - sg(T(Q))|^2, mean over occurrences and dimensions; missing levels are zero."""
        config, total = self.config, 0.0
        for n, count in enumerate(self.counts):
            if not has_level(config, n, level):
                continue
            if config.ema_decay is None:
                moved = self.emitted(level, values)[n]
                total += config.penalty_weight * count * ((moved - self.rests[level][n]) ** 2).mean()
            total += config.commitment_weight * count * ((rests[n] - self.chosen[level][n]) ** 2).mean()
        return total / self.counts.sum()


def has_level(config, n, level):
    """Whether the row of a query has a level."""
    share = ROWS[n] / V
    return level < min((levels for start, levels in config.tiers if share >= start), default=config.num_levels)


def problem(options):
    """A quantizer in double precision that has rounded its values already, and its parts as numpy arrays."""
    torch.manual_seed(1)
    config = DPQConfig(num_subspaces=D, num_codes=K, **options)
    quantizer = Quantizer(E, config, num_embeddings=V).double()
    for parameter in quantizer.parameters():
        parameter.data.normal_()
    if config.values_dtype == "float16":
        quantizer.values_MKS.data = quantizer.values_MKS.data.half().double()
    queries = torch.randn(N, quantizer.query_dim, dtype=torch.float64)
    counts = torch.tensor([1, 3, 1, 2, 1, 1, 4])
    return quantizer, queries, counts


def parts(quantizer):
    values = quantizer.values_MKS.detach().numpy().copy()
    return values, values if quantizer.own_keys_MKS is None else quantizer.own_keys_MKS.detach().numpy().copy()


@combinations
def test_method_chooses_and_emits_what_the_loop_does(options):
    quantizer, queries, counts = problem(options)
    naive = Naive(quantizer.config, queries.numpy(), counts.numpy(), *parts(quantizer))
    got = quantizer(queries, counts.double(), torch.tensor(ROWS))
    np.testing.assert_array_equal(got.codes_NM, naive.codes)
    np.testing.assert_allclose(got.vectors_NE.detach().numpy(), naive.vectors.reshape(N, E), rtol=0, atol=1e-12)


@combinations
def test_method_has_the_gradients_of_its_surrogate(options):
    """By central differences in every number of queries, keys and values, of the loop; also in single precision."""
    quantizer, queries, counts = problem(options)
    config, (values, keys) = quantizer.config, parts(quantizer)
    naive = Naive(config, queries.numpy(), counts.numpy(), values, keys)
    weights = torch.randn(N, E, dtype=torch.float64)
    tied = quantizer.own_keys_MKS is None

    def surrogate(queries, values, keys):
        return naive.surrogate(weights.numpy(), queries, values, values if tied else keys)

    want = [central_differences(surrogate, [queries.numpy().copy(), values, keys], which) for which in range(3)]
    for precision, tolerance in ((torch.float64, 1e-6), (torch.float32, 2e-4)):
        quantizer.load_state_dict(problem(options)[0].state_dict())
        got = gradients(quantizer.to(precision), queries.to(precision), counts.to(precision), weights.to(precision))
        for name, g, w in zip(("queries", "values", "keys"), got, want, strict=True):
            if g is not None:
                np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * max(1, np.abs(w).max()), err_msg=name)
    assert (got[1] is None) == (config.ema_decay is not None)
    assert (got[2] is None) == tied


def central_differences(function, arguments, which, step=1e-6):
    out = np.zeros_like(arguments[which])
    for at in np.ndindex(out.shape):
        sides = []
        for sign in (1, -1):
            moved = [a.copy() if i == which else a for i, a in enumerate(arguments)]
            moved[which][at] += sign * step
            sides.append(function(*moved))
        out[at] = (sides[0] - sides[1]) / (2 * step)
    return out


def gradients(quantizer, queries, counts, weights):
    queries = queries.clone().requires_grad_()
    quantized = quantizer(queries, counts, torch.tensor(ROWS))
    wanted = [queries, quantizer.values_MKS, quantizer.own_keys_MKS]
    inputs = [t for t in wanted if t is not None and t.requires_grad]
    found = torch.autograd.grad(
        (quantized.vectors_NE * weights).sum() + quantized.codebook_loss, inputs, allow_unused=True
    )
    by_tensor = {id(t): torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)}
    return [None if id(t) not in by_tensor else by_tensor[id(t)].double().numpy() for t in wanted]


@combinations
def test_eval_mode_emits_what_training_emits_with_the_same_statistics(options):
    """A first batch leaves its own statistics behind, so that eval mode chooses the same; here bit for bit."""
    quantizer, queries, counts = problem(options)
    values, _ = parts(quantizer)
    trained = quantizer(queries, counts.double(), torch.tensor(ROWS))
    quantizer.values_MKS.data = torch.from_numpy(values)  # running means have moved them
    evaluated = quantizer.eval()(queries, rows_N=torch.tensor(ROWS))
    assert torch.equal(evaluated.codes_NM, trained.codes_NM)
    assert torch.equal(evaluated.vectors_NE, trained.vectors_NE.detach())


@combinations
def test_encode_of_some_subspaces_is_their_part_of_the_codes(options):
    quantizer, queries, counts = problem(options)
    rows = torch.tensor(ROWS)
    quantizer(queries, counts.double(), rows)
    whole = quantizer.encode(queries, rows_N=rows).unflatten(1, (-1, D))
    width = quantizer.query_dim // D
    for first, last in [(0, 1), (1, 3), (2, 3)]:
        some = quantizer.encode(queries[:, first * width : last * width], first, rows)
        assert torch.equal(some.unflatten(1, (-1, last - first)), whole[:, :, first:last])
