"""Fused optimizers under DMP on two ranks against their formulas, written out over a plain model in one process.

With g the gradient of a row, of all ranks together, and s, m, v statistics that begin at zero:

* SGD: weight -= lr * g.
* Adagrad, of every number: s += g^2; weight -= lr * g / (sqrt(s) + eps).
* row-wise Adagrad, one s a row (of a column shard: one a row of the shard): s += mean(g^2); weight -= the same.
* Adam: m += (1 - beta1) * (g - m); v += (1 - beta2) * (g^2 - v); with t the steps so far, for rows never asked for too,
  weight -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps).

As FBGEMM has them (codegen/genscript/optimizers.py): epsilon stands outside the square root; a row that a batch does
not ask for stays as it is, its statistics too, where torch's Adam would go on moving it.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dpq_rec.nn import warm_up
from tests.distributed.cases import CASES, NUM_STEPS, Case, default_config
from tests.distributed.checks import queries
from tests.distributed.model import (
    OPTIMIZERS,
    Model,
    batch,
    constraints,
    dense_optimizer,
    shard_with_weights,
    train_step,
)

# Left out: a module that is called several times in a forward, whose fused optimizer steps once for each call.
PLAIN = [name for name, case in CASES.items() if case.module != "embedding"]


def sgd(weight_VE, gradient_VE, state, step, *, lr):
    weight_VE -= lr * gradient_VE


def adagrad(weight_VE, gradient_VE, state, step, *, lr, eps):
    state["s"] = state.get("s", 0) + gradient_VE.square()
    weight_VE -= lr * gradient_VE / (state["s"].sqrt() + eps)


def rowwise_adagrad(weight_VE, gradient_VE, state, step, *, lr, eps):
    state["s"] = state.get("s", 0) + gradient_VE.square().mean(1, keepdim=True)
    weight_VE -= lr * gradient_VE / (state["s"].sqrt() + eps)


def adam(weight_VE, gradient_VE, state, step, *, lr, beta1, beta2, eps):
    m_VE, v_VE = (state.setdefault(name, torch.zeros_like(weight_VE)) for name in "mv")
    asked_V = gradient_VE.any(1)
    m_VE[asked_V] = beta1 * m_VE[asked_V] + (1 - beta1) * gradient_VE[asked_V]
    v_VE[asked_V] = beta2 * v_VE[asked_V] + (1 - beta2) * gradient_VE[asked_V].square()
    m_VE, v_VE = m_VE / (1 - beta1 ** (step + 1)), v_VE / (1 - beta2 ** (step + 1))
    weight_VE[asked_V] -= (lr * m_VE / (v_VE.sqrt() + eps))[asked_V]


FORMULAS = {"sgd": sgd, "adagrad": adagrad, "rowwise_adagrad": rowwise_adagrad, "adam": adam}


def by_formula(case, device="cpu", quantizers=None):
    """Losses and codebook loss, and the queries at the end; from these keys and values, if given, after full steps."""
    torch.manual_seed(0)
    model = Model(case).to(device)
    tables = [p for part in (model.tables.queries, model.tables.plain) for p in part.parameters()]
    num_parts = case.num_shards if case.sharding == "column_wise" else 1
    states = [{} for _ in range(num_parts * len(tables))]
    if case.full_steps:
        warm_up(model)
        steps_by_formula(model, tables, states, range(-case.full_steps, 0))
        warm_up(model, enabled=False)
    if quantizers is not None:
        model.tables.quantizers.load_state_dict(quantizers)
    return steps_by_formula(model, tables, states, range(NUM_STEPS)), queries(model)


def steps_by_formula(model, tables, states, steps):
    """Losses and codebook loss of each step; tables, and the statistics of each of their shards, are changed."""
    case, num_parts = model.case, len(states) // len(tables)
    formula, settings = FORMULAS[case.optimizer], OPTIMIZERS[case.optimizer][1]
    optimizer, losses = dense_optimizer(model), []
    for step in steps:
        features, labels_B = batch(case, step, 0, 1)
        for table in tables:
            table.grad = None
        device = tables[0].device
        losses.append(train_step(model, model, optimizer, features.to(device), labels_B.to(device)).tolist())
        with torch.no_grad():
            parts = [part for table in tables for part in table.chunk(num_parts, 1)]
            gradients = [part for table in tables for part in table.grad.chunk(num_parts, 1)]
            for part, gradient, state in zip(parts, gradients, states, strict=True):
                formula(part, gradient, state, step, **settings)
    return losses


@pytest.mark.parametrize("name", PLAIN)
def test_fused_optimizer_on_two_ranks_equals_its_formula(runs, name):
    case, report = CASES[name], runs[2].report["cases"][name]
    saved = torch.load(runs[2].folder / f"{name}.pt")
    losses, queries_by_table = by_formula(case, quantizers=saved["first"])
    np.testing.assert_allclose(report["losses"], losses, rtol=0, atol=case.atol)
    torch.testing.assert_close(saved["queries"], queries_by_table, rtol=0, atol=case.atol)


def test_every_optimizer_that_runs_on_cpu_is_held_to_its_formula():
    assert {CASES[name].optimizer for name in PLAIN} == set(OPTIMIZERS) - {"adam"}


def fused(case, device):
    """The same as `by_formula`, by the fused optimizer, under DMP, on the one rank of this process."""
    torch.manual_seed(0)
    model = Model(case).to(device)
    wrapped = shard_with_weights(model, constraints(model), device)
    optimizer, losses = dense_optimizer(wrapped), []
    for step in range(NUM_STEPS):
        features, labels_B = batch(case, step, 0, 1)
        losses.append(train_step(model, wrapped, optimizer, features.to(device), labels_B.to(device)).tolist())
    return losses, queries(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FBGEMM has no Adam for CPU: needs CUDA, fbgemm-gpu==1.8.0")
@pytest.mark.parametrize("method", ["sx", "vq"])
def test_fused_adam_equals_its_formula(method):
    case = Case(config=default_config(method), sharding="row_wise", optimizer="adam")
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        got_losses, got_queries = fused(case, "cuda")
    finally:
        dist.destroy_process_group()
    losses, queries_by_table = by_formula(case, "cuda")
    np.testing.assert_allclose(got_losses, losses, rtol=0, atol=1e-5)
    torch.testing.assert_close(got_queries, queries_by_table, rtol=0, atol=1e-5)
