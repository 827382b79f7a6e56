"""Graph capture (torch.fx, torch.compile). In: a module's forward. Out: one that is a node of a graph, or is refused.

A forward looks up each distinct row once, and its kernels are no operations of torch, so that a tracer which records
operations would record the codes of the ids at hand. To torch.fx a module is a leaf therefore, to torch.compile a call
between two graphs; tracers that know neither are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch._C._functorch import peek_interpreter_stack
from torch.fx import Proxy

from dpq_rec.errors import ConfigError

Forward = TypeVar("Forward", bound=Callable[..., Any])
_FROZEN = "freeze(model, path) writes what serving needs; trace or script the layers that take its vectors"


def leaf(forward: Forward) -> Forward:
    """Make a module's forward one node of an fx graph, as `refused_elsewhere` says of all other tracers.

    A module that is traced by itself needs `itself`, the name under which its graph keeps it. One that returns a
    container needs `of_node`, which makes it of the node.
    """
    checked: Callable[..., Any] = refused_elsewhere(forward)

    @functools.wraps(forward)
    def traced(self: Any, *args: Any, **kwargs: Any) -> Any:
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, Proxy):
                node = node_of(self, argument, *args, **kwargs)
                return self.of_node(node) if hasattr(self, "of_node") else node
        return checked(self, *args, **kwargs)

    return traced  # type: ignore[return-value]


def node_of(module: torch.nn.Module, proxy: Proxy, *args: Any, **kwargs: Any) -> Any:
    """A node that calls a module, in the graph of a proxy."""
    tracer: Any = proxy.tracer
    path = tracer.path_of_module(module) or "itself"  # a graph cannot call its own root
    return tracer.create_proxy("call_module", path, args, kwargs)


def refused_elsewhere(forward: Forward) -> Forward:
    """Let torch.compile call a forward between its graphs, and refuse tracers that would record what it does.

    Raises, when the forward is called:
        ConfigError: by torch.jit.trace, torch.onnx.export, torch.export, make_fx, or a transform of torch.func.
    """

    @functools.wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.jit.is_tracing():
            _refuse(self, "torch.jit.trace or torch.onnx.export", _FROZEN)
        if _get_dispatch_mode(_TorchDispatchModeKey.PROXY) or _get_dispatch_mode(_TorchDispatchModeKey.FAKE):
            _refuse(self, "torch.export, make_fx or a FakeTensorMode", _FROZEN)
        if peek_interpreter_stack() is not None:
            _refuse(self, "a transform of torch.func", "use torch.autograd on the whole batch (functional_call works)")
        return forward(self, *args, **kwargs)

    reason = "dpq_rec looks up distinct rows, by kernels of its own: compile the model without fullgraph"
    return torch.compiler.disable(checked, reason=reason)


def refuse_scripting(module: torch.nn.Module) -> NoReturn:
    """What torch.jit.script asks of a module before it compiles anything.

    Raises:
        ConfigError: always.
    """
    _refuse(module, "torch.jit.script", _FROZEN)


def _refuse(module: Any, tracer: str, remedy: str) -> NoReturn:
    raise ConfigError(f"{type(module).__name__}: got {tracer}, which cannot record how codes are chosen; {remedy}")
