"""The bound from spectral norms against the dense Gauss–Newton matrix, and its parts against dense linear algebra."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.spectral_bound.dense import eigenvalues
from benchmarks.spectral_bound.models import MODELS, Case, Residual, case, classification
from warmctl.planning.layers import RULES
from warmctl.planning.operator_norm import jacobian_norm, operator_norm
from warmctl.planning.spectral import spectral_bound


def bound_of(built: Case) -> tuple[float | None, str]:
    params = [p for p in built.model.parameters() if p.requires_grad]
    return spectral_bound(built.model, built.loss_fn, built.batch, params)


@pytest.mark.parametrize("name", MODELS)
def test_never_below_the_dense_gauss_newton_matrix(name: str) -> None:
    built = case(name, seed=1)
    bound, reason = bound_of(built)
    gauss_newton, _ = eigenvalues(built)
    assert reason == "" and bound is not None
    assert gauss_newton <= bound * (1 + 1e-9)
    assert bound < 1e5 * gauss_newton  # loose, not empty


@pytest.mark.parametrize("name", ["convolutions", "batch and group norm", "residual, pre-norm"])
def test_nor_with_other_weights_or_in_eval_mode(name: str) -> None:
    built = case(name, seed=2)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in built.model.parameters():
            p.mul_(2).add_(0.3 * torch.randn_like(p))
        built.model(built.batch[0])  # running averages
    built.model.eval()
    bound, _ = bound_of(built)
    assert bound is not None and eigenvalues(built)[0] <= bound


def test_one_layer_in_closed_form() -> None:
    """Mean square over 2·20 entries: 2/40 times the largest of XᵀX, plus that of the biases, 20."""
    built = case("linear regression")
    bound, _ = bound_of(built)
    size = float(torch.linalg.matrix_norm(built.batch[0], 2)) ** 2
    assert bound == pytest.approx(2 / 40 * (size + 20), rel=1e-4)


def test_frozen_layers_count_for_their_gain_only() -> None:
    built = case("tanh MLP")
    whole, _ = bound_of(built)
    built.model[0].requires_grad_(False)  # type: ignore[index]
    built.model[2].requires_grad_(False)  # type: ignore[index]
    part, _ = bound_of(built)
    assert part is not None and whole is not None and eigenvalues(built)[0] <= part < whole


def test_a_layer_that_is_used_twice() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(5, 5)
    model = nn.Sequential(shared, nn.Tanh(), Residual(shared), nn.Linear(5, 3)).double()
    built = Case(model, classification, (torch.randn(9, 5).double(), torch.randint(3, (9,))))
    bound, _ = bound_of(built)
    assert bound is not None and eigenvalues(built)[0] <= bound


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "padding": lambda: nn.Conv2d(2, 3, 3, padding=1, bias=False),
    "stride": lambda: nn.Conv2d(2, 3, 3, stride=2, padding=2, bias=False),
    "dilation, groups": lambda: nn.Conv2d(2, 4, 2, dilation=2, groups=2, bias=False),
    "reflect": lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=False),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_norm_of_a_convolution_is_that_of_its_matrix(name: str) -> None:
    torch.manual_seed(0)
    layer = CONVOLUTIONS[name]().double()
    x = torch.randn(4, 2, 6, 5).double()
    matrix = torch.autograd.functional.jacobian(layer, x[:1]).reshape(-1, x[0].numel())
    exact = float(torch.linalg.matrix_norm(matrix, 2))
    assert RULES[nn.Conv2d](layer, x).gain() == pytest.approx(exact, rel=1e-5)
    reshaped = float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2))  # type: ignore[operator, union-attr]
    assert abs(reshaped - exact) > 1e-2 * exact  # which is another number

    def of_weight(weight: Tensor) -> Tensor:
        y: Tensor = layer._conv_forward(x, weight, None)  # type: ignore[operator]
        return y

    weight: Any = layer.weight
    jacobian = torch.autograd.functional.jacobian(of_weight, weight.detach()).reshape(-1, weight.numel())
    ((_, norm),) = RULES[nn.Conv2d](layer, x).parameters
    assert norm() == pytest.approx(float(torch.linalg.matrix_norm(jacobian, 2)), rel=1e-5)


def test_operator_norm_of_a_matrix() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(30, 20).double()
    assert operator_norm(lambda x: matrix @ x, torch.zeros(20)) == pytest.approx(
        float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-5
    )


def test_the_norm_of_a_jacobian_takes_one_call() -> None:
    torch.manual_seed(0)
    at, calls = [torch.randn(4, 5).double(), torch.randn(5, 3).double()], []

    def attends(x: Sequence[Tensor]) -> Tensor:
        calls.append(1)
        return torch.softmax(x[0] @ x[0].T, -1) @ x[0] @ x[1]

    found = jacobian_norm(attends, at)
    assert calls == [1]
    parts = torch.autograd.functional.jacobian(lambda *x: attends(x), tuple(at))
    exact = float(torch.linalg.matrix_norm(torch.cat([part.reshape(12, -1) for part in parts], 1), 2))
    assert exact * (1 - 1e-6) <= found <= exact * (1 + 5e-4)


ACTIVATIONS = [
    *(nn.ReLU(), nn.ReLU6(), nn.Tanh(), nn.Hardtanh(), nn.Softplus(), nn.Softsign(), nn.LogSigmoid(), nn.Tanhshrink()),
    *(
        nn.Softshrink(),
        nn.Sigmoid(),
        nn.Hardsigmoid(),
        nn.Hardswish(),
        nn.SELU(),
        nn.GELU(),
        nn.GELU("tanh"),
        nn.SiLU(),
    ),
    *(nn.Mish(), nn.LeakyReLU(2.0), nn.ELU(1.5), nn.CELU(0.5)),
]


@pytest.mark.parametrize("layer", ACTIVATIONS, ids=str)
def test_no_slope_is_steeper_than_its_constant(layer: nn.Module) -> None:
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(layer(x).sum(), x)
    steepest = float(slope.abs().max())
    assert steepest <= RULES[type(layer)](layer, x).gain() <= steepest * 1.01 + 1e-3


class Branch(nn.Module):
    """Its forward asks for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


class LastOf(nn.Module):
    """The first of several outputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)[0]
        return y


STOPPED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "noisy attention": (lambda: nn.TransformerEncoderLayer(5, 1, 5), r"1 \(TransformerEncoderLayer\) with dropout"),
    "recurrence": (lambda: LastOf(nn.LSTM(5, 5)), r"1.net \(LSTM\)"),
    "control flow": (Branch, r"1 \(Branch\) cannot be traced"),
    "a jump": (lambda: nn.LogSoftmax(-1), r"1 \(LogSoftmax\)"),
    "parametrised": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)), r"Linear"),
}


@pytest.mark.parametrize("name", STOPPED)
def test_where_it_does_not_compose_it_names_the_module(name: str) -> None:
    make, words = STOPPED[name]
    model = nn.Sequential(nn.Linear(5, 5), make(), nn.Linear(5, 3))
    bound, reason = bound_of(Case(model, classification, (torch.randn(4, 5), torch.randint(3, (4,)))))
    assert bound is None
    assert re.search(words, reason), reason


def test_losses_that_cannot_be_cut_at_the_output() -> None:
    model = nn.Linear(5, 3)
    x, y = torch.randn(4, 5), torch.randn(4, 3)
    weights = model.weight

    def bound_with(loss: Callable[[nn.Module, Any], Tensor]) -> str:
        bound, reason = spectral_bound(model, loss, (x, y), list(model.parameters()))
        assert bound is None
        return reason

    assert "exactly once" in bound_with(lambda m, b: F.mse_loss(m(x) + m(2 * x), y))
    assert "beside the model's output" in bound_with(lambda m, b: F.mse_loss(m(x), y) + weights.square().sum())
    assert "no curvature" in bound_with(lambda m, b: m(x).sum())


def test_float32_models_are_bounded_as_their_float64_twins() -> None:
    built = case("convolutions")
    exact, _ = bound_of(built)
    single, _ = bound_of(Case(built.model.float(), built.loss_fn, (built.batch[0].float(), built.batch[1])))
    assert single is not None and exact is not None and math.isclose(single, exact, rel_tol=1e-3)
