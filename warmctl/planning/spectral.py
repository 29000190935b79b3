"""A bound on the sharpness from the layers' spectral norms: λ_max(Gauss–Newton) ≤ λ_max(∇²_z L) · Σ_p ‖∂z/∂p‖².

z is the model's output on the whole batch and L the loss as a function of it. ‖∂z/∂p‖ is bounded along the graph of the
forward pass: what a layer's parameters can do to its output at this batch, times the gains of all layers behind it,
summed over the ways through a residual net. The bound is loose by orders of magnitude in depth.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from warmctl.curvature.eigen import lanczos
from warmctl.curvature.operators import HessianOperator
from warmctl.loss.no_trace import no_trace
from warmctl.loss.random_state import RandomState
from warmctl.planning.functions import Doubt, function_gains
from warmctl.planning.layers import RULES, rule_for
from warmctl.planning.linearised import ATTENTION, jacobian_norms
from warmctl.warning import first_line

CALLED_ONCE = "loss_fn does not call the model exactly once, with one tensor as the output"


def spectral_bound(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, params: Sequence[Tensor]
) -> tuple[float | None, str]:
    """The bound over `params`, at the present parameters and on this batch; or None, and what stopped it.

    Cost: a forward pass for the output, one of the traced graph, some products with the loss's Hessian in z, and for
    each convolution, and twice for each attention, some tens of products with it and with its adjoint.
    """
    try:
        with no_trace(params, model):
            streams = RandomState({p.device for p in params})
            bend, inputs = _at_output(model, loss_fn, batch, params)
            if not bend > 0:
                raise Doubt("the loss has no curvature in the model's output")
            streams.restore()
            values = _Values(_traced(model))
            with torch.no_grad():
                values.run(*inputs)
            norms = _norms(values, {id(p) for p in params})
            return bend * sum(norm * norm for _, norm in norms), ""
    except Doubt as stopped:
        return None, str(stopped)
    except Exception as error:
        return None, f"the forward pass could not be followed: {first_line(error)}"


def _at_output(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, params: Sequence[Tensor]
) -> tuple[float, tuple[Any, ...]]:
    """λ_max of the loss's Hessian in the model's output, and the arguments that the model was called with."""
    calls: list[tuple[tuple[Any, ...], Any]] = []

    def cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
        output = output.detach().requires_grad_() if isinstance(output, Tensor) else output
        calls.append(((*bound.args, *bound.kwargs.values()), output))
        return output

    handle = model.register_forward_hook(cut, with_kwargs=True)
    try:
        loss = loss_fn(model, batch)
    finally:
        handle.remove()
    if len(calls) != 1 or not isinstance(calls[0][1], Tensor):
        raise Doubt(CALLED_ONCE)
    inputs, output = calls[0]
    if not loss.requires_grad:
        return 0.0, inputs
    used = torch.autograd.grad(loss, list(params), retain_graph=True, allow_unused=True)
    if any(grad is not None for grad in used):
        raise Doubt("loss_fn uses the parameters beside the model's output")
    with HessianOperator.on_graph(loss, [output]) as operator:
        found = lanczos(operator, tol=1e-5, steps=100)
    return found.eigenvalue + found.residual, inputs


class _Tracer(fx.Tracer):
    """Goes into every module but those that have a rule, and remembers the innermost one that cannot be traced."""

    stopped = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in RULES or type(m) in ATTENTION or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.stopped = self.stopped or f"{self.path_of_module(m)} ({type(m).__name__})"
            raise


def _traced(model: nn.Module) -> fx.GraphModule:
    tracer = _Tracer()
    root = nn.Sequential(model) if tracer.is_leaf_module(model, "") else model
    root.training = model.training
    try:
        return fx.GraphModule(root, tracer.trace(root))
    except Exception as error:
        where = tracer.stopped or f"the model ({type(model).__name__})"
        raise Doubt(f"the forward of {where} cannot be traced: {first_line(error)}") from None


class _Values(fx.Interpreter):
    """Runs the graph and keeps what every node came to."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.of: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.of[n] = super().run_node(n)
        return self.of[n]


Contribution = tuple[frozenset[int], float]
"""Parameters by id, and ‖∂z/∂(these together)‖."""


def _norms(values: _Values, wanted: set[int]) -> list[Contribution]:
    """Bounds for parts that together are all the parameters, from the output back to the inputs."""
    graph: Any = values.module.graph
    nodes = list(graph.nodes)
    learns = _learns(values, nodes, wanted)
    behind: dict[fx.Node, float] = {nodes[-1].args[0]: 1.0}
    found: list[Contribution] = []
    for node in reversed(nodes[:-1]):
        gain = behind.get(node)
        if gain is None or node not in learns:
            continue
        sources: Mapping[fx.Node, float] = {}
        if node.op == "get_attr":
            found.append((frozenset({id(_attribute(values.module, node.target))}), gain))
        elif node.op == "call_module":
            module = values.fetch_attr(str(node.target))
            through = _attention if type(module) in ATTENTION else _layer
            parameters, sources = through(node, values, wanted, learns)
            found += [(ids, gain * norm) for ids, norm in parameters]
        elif node.op in ("call_function", "call_method"):
            sources = function_gains(node, values.of)
        for source, factor in sources.items():
            if source in learns:
                behind[source] = behind.get(source, 0.0) + gain * factor
    if not all(math.isfinite(norm) for _, norm in found):
        raise Doubt("a layer's norm is not finite")
    return _disjoint(found)


def _disjoint(found: Sequence[Contribution]) -> list[Contribution]:
    """Parts that share a parameter become one: what it can do in several places adds up."""
    parts: list[Contribution] = []
    for ids, norm in found:
        shared = [part for part in parts if part[0] & ids]
        parts = [part for part in parts if part not in shared]
        parts.append((ids.union(*(i for i, _ in shared)), norm + sum(n for _, n in shared)))
    return parts


def _layer(
    node: fx.Node, values: _Values, wanted: set[int], learns: set[fx.Node]
) -> tuple[list[Contribution], dict[fx.Node, float]]:
    """What the parameters of a layer can do to its output, and what its input can."""
    module = values.fetch_attr(str(node.target))
    rule = rule_for(module)
    source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if rule is None or not isinstance(source, fx.Node):
        raise Doubt(f"the bound does not compose through {_named(node, module)}")
    try:
        layer = rule(module, values.of[source])
    except NotImplementedError as error:
        raise Doubt(f"the bound does not compose through {_named(node, module)} with {error}") from None
    parameters = [(frozenset({id(p)}), norm()) for p, norm in layer.parameters if id(p) in wanted]
    return parameters, {source: layer.gain()} if source in learns else {}


def _attention(
    node: fx.Node, values: _Values, wanted: set[int], learns: set[fx.Node]
) -> tuple[list[Contribution], dict[fx.Node, float]]:
    """The same, of all its parameters together."""
    module = values.fetch_attr(str(node.target))
    own = {name: id(p) for name, p in module.named_parameters() if id(p) in wanted}
    try:
        norm = jacobian_norms(node, values.of, module)
    except NotImplementedError as error:
        raise Doubt(f"the bound does not compose through {_named(node, module)} with {error}") from None
    parameters = [(frozenset(own.values()), norm(*own))] if own else []
    return parameters, {n: norm(n) for n in node.all_input_nodes if n in learns}


def _named(node: fx.Node, module: Any) -> str:
    return f"{node.target} ({type(module).__name__})"


def _learns(values: _Values, nodes: Sequence[fx.Node], wanted: set[int]) -> set[fx.Node]:
    """Nodes whose value depends on a wanted parameter."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "get_attr":
            own = id(_attribute(values.module, node.target)) in wanted
        else:
            own = node.op == "call_module" and any(
                id(p) in wanted for p in values.fetch_attr(str(node.target)).parameters()
            )
        if own or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _attribute(module: Any, path: Any) -> Any:
    for name in str(path).split("."):
        module = getattr(module, name)
    return module
