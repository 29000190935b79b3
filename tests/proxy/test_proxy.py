"""The proxy alone, round every optimizer of torch with the settings of torch's own tests: bit for bit the bare one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.testing._internal.common_optimizers import optim_db

from tests.helpers import assert_same, batch_of, closure_for, loss_fn, mlp
from warmctl.proxy import OptimizerProxy

torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True  # frozen by torch.testing

CONFIGURATIONS = [
    pytest.param(info.optim_cls, example.kwargs, id=f"{info.name}-{example.desc}")
    for info in optim_db
    for example in info.optim_inputs_func(device="cpu")
]


class Rows(nn.Module):
    """An embedding with sparse gradients, for SparseAdam."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.table(x.argmax(1))
        return rows


def net(optimizer_class: Any) -> nn.Module:
    torch.manual_seed(0)
    if optimizer_class is torch.optim.SparseAdam:
        return Rows()
    if optimizer_class is torch.optim.Muon:  # takes matrices only
        return nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
    return mlp()


def built(optimizer_class: Any, kwargs: dict[str, Any]) -> tuple[nn.Module, Any]:
    model = net(optimizer_class)
    return model, optimizer_class(model.parameters(), **copy.deepcopy(kwargs))


def trained(model: nn.Module, optimizer: Any, steps: range) -> list[float]:
    return [float(optimizer.step(closure_for(optimizer, model, batch_of(step))).detach()) for step in steps]


def seen(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {"weights": model.state_dict(), "optimizer": optimizer.state_dict()}


@pytest.mark.parametrize(("optimizer_class", "kwargs"), CONFIGURATIONS)
def test_it_trains_as_the_bare_optimizer_does(optimizer_class: Any, kwargs: dict[str, Any]) -> None:
    """Under a scheduler built on it, saved and loaded half way, each into the other."""
    bare_model, bare = built(optimizer_class, kwargs)
    model, base = built(optimizer_class, kwargs)
    proxy: Any = OptimizerProxy(base)
    bare_schedule, schedule = StepLR(bare, 2), StepLR(proxy, 2)
    for step in range(4):
        assert trained(model, proxy, range(step, step + 1)) == trained(bare_model, bare, range(step, step + 1))
        bare_schedule.step()
        schedule.step()
        assert_same(seen(model, proxy), seen(bare_model, bare))
    fresh_bare, fresh = (
        optimizer_class(bare_model.parameters(), **kwargs),
        optimizer_class(model.parameters(), **kwargs),
    )
    fresh_proxy: Any = OptimizerProxy(fresh)
    fresh_proxy.load_state_dict(copy.deepcopy(bare.state_dict()))
    fresh_bare.load_state_dict(copy.deepcopy(proxy.state_dict()))
    assert trained(model, fresh_proxy, range(4, 7)) == trained(bare_model, fresh_bare, range(4, 7))
    assert_same(seen(model, fresh_proxy), seen(bare_model, fresh_bare))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_goes_on_alone_without_the_patch_of_a_scheduler(copied: Callable[[Any], Any]) -> None:
    model, base = built(torch.optim.AdamW, {})
    proxy = OptimizerProxy(base)
    StepLR(proxy, 2)
    assert "step" in proxy.__dict__
    trained(model, proxy, range(2))
    twin_model, twin = copied((model, proxy))
    assert "step" not in twin.__dict__ and twin.base is not base
    assert trained(twin_model, twin, range(2, 5)) == trained(model, proxy, range(2, 5))


@pytest.mark.parametrize("on_base", [False, True])
def test_hooks_are_those_of_the_base_and_fire_once(on_base: bool) -> None:
    model, base = built(torch.optim.SGD, {"lr": 0.1})
    proxy = OptimizerProxy(base)
    fired: list[str] = []
    owner = base if on_base else proxy
    owner.register_step_pre_hook(lambda *_: fired.append("pre"))
    owner.register_step_post_hook(lambda *_: fired.append("post"))
    owner.register_state_dict_post_hook(lambda *_: fired.append("saved"))
    owner.register_load_state_dict_post_hook(lambda *_: fired.append("loaded"))
    trained(model, proxy, range(1))
    proxy.load_state_dict(proxy.state_dict())
    assert fired == ["pre", "post", "saved", "loaded"]


def test_groups_state_and_gradients_are_the_bases_own() -> None:
    model, base = built(torch.optim.Adam, {})
    proxy = OptimizerProxy(base)
    trained(model, proxy, range(1))
    assert isinstance(proxy, torch.optim.Optimizer)
    assert proxy.param_groups is base.param_groups and proxy.state is base.state and proxy.defaults is base.defaults
    assert proxy.has_gradient
    proxy.zero_grad()
    assert not proxy.has_gradient and all(p.grad is None for p in model.parameters())
    proxy.add_param_group({"params": [nn.Parameter(torch.zeros(2), requires_grad=False)]})
    assert len(base.param_groups) == 2 and len(proxy.all_params) == len(proxy.trainable) + 1
    assert repr(proxy) == f"OptimizerProxy({base!r})"
    proxy.param_groups = proxy.param_groups[:1]
    assert len(base.param_groups) == 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("infinite", [False, True])
def test_a_gradient_scaler_sees_the_base(fused: bool, infinite: bool) -> None:
    """A fused base unscales in its kernel and skips by itself; the scaler does both for any other."""
    pairs = [built(torch.optim.AdamW, {"fused": fused}) for _ in range(2)]
    for (model, optimizer), proxied in zip(pairs, (False, True), strict=True):
        used: Any = OptimizerProxy(optimizer) if proxied else optimizer
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(3):
            used.zero_grad()
            scaler.scale(loss_fn(model, batch_of(step))).backward()
            if infinite and step == 1:
                next(model.parameters()).grad.fill_(torch.inf)  # type: ignore[union-attr]
            scaler.step(used)
            scaler.update()
        assert not {"grad_scale", "found_inf"} & optimizer.__dict__.keys() or not proxied
    (bare_model, bare), (model, base) = pairs
    assert_same(seen(model, base), seen(bare_model, bare))


def test_train_and_eval_reach_a_base_that_has_them() -> None:
    class Switched(torch.optim.SGD):
        mode = ""

        def train(self) -> None:
            self.mode = "train"

        def eval(self) -> None:
            self.mode = "eval"

    base = Switched(mlp().parameters(), lr=0.1)
    proxy = OptimizerProxy(base)
    proxy.eval()
    assert base.mode == "eval"
    proxy.train()
    assert base.mode == "train"
    OptimizerProxy(torch.optim.SGD(mlp().parameters(), lr=0.1)).train()  # nothing to reach


class WithMore(torch.optim.AdamW):
    """Has an attribute, as Prodigy, and methods, as SAM; and private ones, as frameworks leave."""

    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.d, self._opt_called, self.steps_made = 1e-6, "of the base", 0

    def first_step(self, zero_grad: bool = False) -> str:
        self.steps_made += 1
        return f"{self.d:g} {zero_grad}"

    @property
    def broken(self) -> float:
        return self.nowhere  # type: ignore[attr-defined, no-any-return]


def test_what_only_the_base_has_is_reached() -> None:
    base = built(WithMore, {})[1]
    proxy = OptimizerProxy(base)
    base.d = 0.25
    assert proxy.d == 0.25 and proxy.first_step(zero_grad=True) == "0.25 True" and base.steps_made == 1
    assert not hasattr(proxy, "nothing") and not hasattr(proxy, "broken")
    with pytest.raises(AttributeError, match="nothing"):
        _ = proxy.nothing
    proxy.d = 3.0  # setting stays on the wrapper
    assert base.d == 0.25 and proxy.d == 3.0


def test_private_names_stay_apart() -> None:
    model, base = built(WithMore, {})
    proxy = OptimizerProxy(base)
    assert not hasattr(proxy, "_opt_called") and not hasattr(proxy, "__nothing__")
    base.grad_scale = base.found_inf = torch.ones(())  # lent by another
    assert not hasattr(proxy, "grad_scale") and not hasattr(proxy, "found_inf")
    del base.grad_scale, base.found_inf
    unmade = OptimizerProxy.__new__(OptimizerProxy)  # as copy and pickle see it
    for name in ("base", "d", "__deepcopy__"):
        with pytest.raises(AttributeError):
            getattr(unmade, name)
    for twin in (copy.copy(proxy), copy.deepcopy(proxy), pickle.loads(pickle.dumps(proxy))):
        twin.base.d = 2.0  # torch's copies leave it out
        assert twin.d == 2.0
        trained(model, twin, range(1))


def test_a_scheduler_takes_a_base_with_more_for_an_optimizer() -> None:
    model, base = built(WithMore, {})
    proxy = OptimizerProxy(base)
    schedule = StepLR(proxy, 2)
    trained(model, proxy, range(1))
    schedule.step()
    assert base._opt_called == "of the base" and proxy._opt_called is True
