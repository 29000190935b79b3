"""What a layer can do to a small change, of its input or of its parameters: norms of its Jacobians at one batch.

A rule takes a layer and its input (all rows at once) and gives a `Layer`. The norms are of the whole batch's Jacobian,
so that layers that mix rows (batch norm) need nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from warmctl.planning.operator_norm import matrix_norm, operator_norm
from warmctl.vectors import wide

Norm = Callable[[], float]


@dataclass(frozen=True)
class Layer:
    """Norms are computed when they are asked for: the first layer's input has nothing to learn behind it.

    Attributes:
        gain: ‖∂output/∂input‖.
        parameters: ‖∂output/∂p‖ of each parameter p.
    """

    gain: Norm
    parameters: list[tuple[Tensor, Norm]] = field(default_factory=list)


Rule = Callable[[Any, Tensor], Layer]


def constant(gain: float) -> Layer:
    return Layer(lambda: gain)


def _linear(layer: nn.Linear, x: Tensor) -> Layer:
    rows = x.numel() // max(x.shape[-1], 1)
    parameters: list[tuple[Tensor, Norm]] = [(layer.weight, lambda: matrix_norm(x.reshape(-1, x.shape[-1])))]
    if layer.bias is not None:
        parameters.append((layer.bias, lambda: math.sqrt(rows)))
    return Layer(lambda: matrix_norm(layer.weight), parameters)


def _convolution(layer: Any, x: Tensor) -> Layer:
    """The operator itself, with its padding, stride, dilation and groups, not its weight as a matrix."""
    batched = x.dim() == layer.weight.dim()
    one = x[:1] if batched else x
    weight, inputs = wide(layer.weight.detach()), wide(x.detach())

    def bias() -> float:
        places = layer._conv_forward(inputs, weight, None).numel() // layer.out_channels
        return math.sqrt(places)

    parameters: list[tuple[Tensor, Norm]] = [
        (layer.weight, lambda: operator_norm(lambda w: layer._conv_forward(inputs, w, None), layer.weight))
    ]
    if layer.bias is not None:
        parameters.append((layer.bias, bias))
    return Layer(lambda: operator_norm(lambda v: layer._conv_forward(v, weight, None), one), parameters)


def _embedding(layer: nn.Embedding, x: Tensor) -> Layer:
    if layer.max_norm is not None:
        raise NotImplementedError("max_norm")
    used = x.flatten() if layer.padding_idx is None else x[x != layer.padding_idx]
    times = int(torch.bincount(used).max()) if used.numel() else 0
    return Layer(lambda: 0.0, [(layer.weight, lambda: math.sqrt(times))])


def _normalised(layer: Any, variance: Tensor, eps: float, unit: Tensor, channels_last: bool) -> Layer:
    """w (x − μ)/σ + b: a gain of at most max|w| / min σ, since centring and normalising only take away."""
    weight, bias = layer.weight, getattr(layer, "bias", None)
    largest = float(weight.detach().abs().max()) if weight is not None else 1.0
    gain = largest / math.sqrt(float(variance.min()) + eps)
    if weight is None:
        return constant(gain)
    if channels_last:
        columns = unit.reshape(-1, weight.numel())
    else:
        columns = unit.reshape(unit.shape[0], weight.numel(), -1).transpose(1, 2).reshape(-1, weight.numel())
    parameters: list[tuple[Tensor, Norm]] = [(weight, lambda: float(columns.square().sum(0).max().sqrt()))]
    if bias is not None:
        parameters.append((bias, lambda: math.sqrt(len(columns))))
    return Layer(lambda: gain, parameters)


def _layer_norm(layer: nn.LayerNorm, x: Tensor) -> Layer:
    x = wide(x.detach())
    variance = x.flatten(-len(layer.normalized_shape)).var(-1, unbiased=False)
    unit = F.layer_norm(x, list(layer.normalized_shape), eps=layer.eps)
    return _normalised(layer, variance, layer.eps, unit, channels_last=True)


def _rms_norm(layer: nn.RMSNorm, x: Tensor) -> Layer:
    eps = torch.finfo(x.dtype).eps if layer.eps is None else layer.eps
    x = wide(x.detach())
    square = x.flatten(-len(layer.normalized_shape)).square().mean(-1)
    unit = F.rms_norm(x, list(layer.normalized_shape), eps=eps)
    return _normalised(layer, square, eps, unit, channels_last=True)


def _group_norm(layer: nn.GroupNorm, x: Tensor) -> Layer:
    x = wide(x.detach())
    variance = x.reshape(x.shape[0], layer.num_groups, -1).var(-1, unbiased=False)
    unit = F.group_norm(x, layer.num_groups, eps=layer.eps)
    return _normalised(layer, variance, layer.eps, unit, channels_last=False)


def _batch_norm(layer: Any, x: Tensor) -> Layer:
    x = wide(x.detach())
    if layer.training or layer.running_var is None:
        variance = x.transpose(0, 1).flatten(1).var(-1, unbiased=False)
        unit = F.batch_norm(x, None, None, training=True, eps=layer.eps)
    else:
        variance, mean = wide(layer.running_var), wide(layer.running_mean)
        unit = F.batch_norm(x, mean, variance, training=False, eps=layer.eps)
    return _normalised(layer, variance, layer.eps, unit, channels_last=False)


def _average_pool(layer: nn.Module, x: Tensor) -> Layer:
    return Layer(lambda: operator_norm(layer, x[:1]))


def max_pool_gain(kernel: Any, stride: Any, dims: int) -> float:
    """An input is the largest of at most ⌈kernel/stride⌉ windows along each dimension."""
    sizes = [kernel] * dims if isinstance(kernel, int) else list(kernel)
    steps = sizes if stride in (None, [], ()) else [stride] * dims if isinstance(stride, int) else list(stride)
    return math.sqrt(math.prod(math.ceil(k / s) for k, s in zip(sizes, steps, strict=True)))


def _max_pool(dims: int) -> Rule:
    return lambda layer, x: constant(max_pool_gain(layer.kernel_size, layer.stride, dims))


def _dropout(layer: Any, x: Tensor) -> Layer:
    return constant(1 / (1 - layer.p) if layer.training and layer.p < 1 else 1.0)


SLOPES: dict[type, float] = {
    **dict.fromkeys((nn.Identity, nn.Flatten, nn.Unflatten, nn.ReLU, nn.ReLU6, nn.Tanh, nn.Hardtanh), 1.0),
    **dict.fromkeys((nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink, nn.Softshrink), 1.0),
    **{nn.Sigmoid: 0.25, nn.Hardsigmoid: 0.1667, nn.Softmax: 0.5, nn.Hardswish: 1.5, nn.SELU: 1.7581},
    **{nn.GELU: 1.1290, nn.SiLU: 1.0999, nn.Mish: 1.0885},
}
"""The steepest slope of each; rounded up."""


def _slope(slope: float, layer: nn.Module, x: Tensor) -> Layer:
    return constant(slope)


RULES: dict[type, Rule] = {
    nn.Linear: _linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _average_pool),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), _average_pool),
    nn.MaxPool1d: _max_pool(1),
    nn.MaxPool2d: _max_pool(2),
    nn.MaxPool3d: _max_pool(3),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _dropout),
    nn.LeakyReLU: lambda layer, x: constant(max(1.0, abs(layer.negative_slope))),
    nn.ELU: lambda layer, x: constant(max(1.0, abs(layer.alpha))),
    nn.CELU: lambda layer, x: constant(1.0),
    **{kind: partial(_slope, slope) for kind, slope in SLOPES.items()},
}


def rule_for(layer: nn.Module) -> Rule | None:
    """The rule of a layer that computes as its class does; None for any other."""
    rule = RULES.get(type(layer))
    if rule is None or is_parametrized(layer) or layer._forward_pre_hooks or layer._forward_hooks:
        return None
    return rule
