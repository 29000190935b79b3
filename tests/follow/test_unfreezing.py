"""Stages thaw one by one; rates by the share that is free; what was thawed alone is warmed, where groups allow it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from tests.follow.helpers import drive
from tests.helpers import batch_of, closure_for, closure_of, loss_fn, mlp, train
from warmctl import AdaptiveWarmup, Unfreezing


def three() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def groups(model: Any) -> list[dict[str, Any]]:
    return [{"params": list(model[place].parameters())} for place in (4, 2, 0)]


def trainable(model: nn.Module) -> list[bool]:
    return [all(p.requires_grad for p in m.parameters()) for m in model if list(m.parameters())]


def test_a_stage_thaws_when_the_warmup_of_the_last_has_ended() -> None:
    model = three()
    optimizer = SGD(groups(model), lr=1.0)
    follower = Unfreezing([model[4], [model[2]], model[0]])
    assert trainable(model) == [True, True, True]  # nothing is frozen before it follows
    steps = [(0.5, "warmup"), (0.6, "guard"), (0.1, "warmup"), (0.2, "warmup"), (0.3, "guard"), (0.3, "guard")]
    seen = drive(optimizer, follower, steps, look=lambda: (trainable(model), follower.free))
    assert [free for _, free in seen] == [1, 2, 2, 2, 3, 3]  # thawed while the gradient of the step is there already
    assert seen[0][0] == [False, False, True] and seen[1][0] == [False, True, True] and seen[4][0] == [True] * 3


def test_rates_are_the_share_that_is_free_and_earlier_groups_keep_theirs_until_the_new_scale_has_come_to_it() -> None:
    """Written out for an exponent of 1 and K = 3: at 1/3, then 2/3, then 1 of the schedule."""
    model = three()
    optimizer = SGD(groups(model), lr=1.0)
    follower = Unfreezing([model[4], model[2], model[0]], gamma=1.0)
    steps = [(0.6, "warmup"), (0.6, "guard"), (0.1, "warmup"), (0.05, "warmup"), (0.2, "warmup"), (0.5, "warmup")]
    seen = drive(optimizer, follower, steps, look=lambda: [g["lr"] for g in optimizer.param_groups])
    third = 1 / 3
    kept = 0.6 * third
    expected = [
        [0.6 * third] * 3,
        [0.6 * third] * 3,
        [kept, 0.1 * 2 * third, 0.1 * 2 * third],
        [kept * 0.5, 0.05 * 2 * third, 0.05 * 2 * third],  # the new scale was cut by half: all are
        [kept, 0.2 * 2 * third, 0.2 * 2 * third],
        [0.5 * 2 * third] * 3,  # the new scale has come to it
    ]
    for found, wanted in zip(seen, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-14)


def test_in_one_group_for_all_everything_is_warmed_again() -> None:
    model = three()
    optimizer = SGD(model.parameters(), lr=1.0)
    follower = Unfreezing([model[4], model[:4]], gamma=0.5)
    steps = [(0.8, "guard"), (0.1, "warmup")]
    seen = drive(optimizer, follower, steps, look=lambda: optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([0.8 * 0.5**0.5, 0.1])


def test_in_training_frozen_parameters_stay_and_each_thaw_begins_warmup() -> None:
    model = three()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = AdaptiveWarmup(AdamW(groups(model), lr=1e-2), model).follow(
        Unfreezing([model[4], model[2], model[0]], every=8, gamma=0.0)
    )
    moved = []
    for step in range(24):
        train(opt, model, [step])
        moved.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})
    layers = [sorted({name[0] for name in names}) for names in moved]
    assert layers == [["4"]] * 8 + [["2", "4"]] * 8 + [["0", "2", "4"]] * 8
    assert opt.history["stage"] == [1] * 7 + [2] * 8 + [3] * 9
    began = [row["step"] for row in opt.history if str(row["reason"]).startswith("started")]
    assert began == [1, 9, 17]


def test_a_thawed_stage_ends_where_warmup_of_all_ends() -> None:
    model = mlp()
    opt = AdaptiveWarmup(SGD(model.parameters(), lr=0.01), model, max_warmup=5)
    opt.follow(Unfreezing.by_depth(model, stages=2))
    train(opt, model, range(12))
    assert [row["stage"] for row in opt.history] == [1] * 4 + [2] * 8
    assert opt.history["phase"] == ["warmup"] * 4 + ["guard"] + ["warmup"] * 4 + ["guard"] * 3


def test_by_depth_the_last_layers_come_first_and_what_is_frozen_stays_frozen() -> None:
    model = three()
    model[2].requires_grad_(False)
    stages = Unfreezing.by_depth(model, stages=2).stages
    assert [{id(p) for p in stage} for stage in stages] == [
        {id(p) for p in model[4].parameters()},
        {id(p) for p in model[0].parameters()},
    ]
    drive(SGD(model.parameters(), lr=1.0), Unfreezing.by_depth(model, stages=2), [(1.0, "guard")] * 3)
    assert trainable(model) == [True, False, True]


def test_adapters_of_peft_thaw_and_the_base_stays_frozen() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], modules_to_save=["4"])
    model = peft.get_peft_model(three(), config)
    opt = AdaptiveWarmup(AdamW(model.parameters(), lr=1e-2), model, max_warmup=3)
    adapters = {name for name, p in model.named_parameters() if p.requires_grad}
    opt.follow(Unfreezing.by_depth(model, stages=3))
    free = []
    for step in range(9):
        opt.step(closure_for(opt, model, batch_of(step), loss_fn))
        free.append({name for name, p in model.named_parameters() if p.requires_grad})
    assert free[0] < free[4] < free[-1] == adapters
    assert not [row["reason"] for row in opt.history if "failed" in str(row["reason"])]


class LoRA(nn.Module):
    """A frozen layer and a product of two thin matrices beside it, as by peft."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Any) -> Any:
        return self.base(x) + self.up(self.down(x))


def test_adapters_thaw_and_the_frozen_base_stays_as_it_was() -> None:
    plain = three()
    model = nn.Sequential(LoRA(plain[0]), nn.Tanh(), LoRA(plain[2]), nn.Tanh(), plain[4])  # type: ignore[arg-type]
    opt = AdaptiveWarmup(AdamW(groups(model), lr=1e-2), model)
    opt.follow(Unfreezing([model[4], model[2], model[0]], every=6))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(opt, model, range(18))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "base" not in name}


def applied(opt: AdaptiveWarmup) -> list[list[float]]:
    """The groups' rates at each update from here on."""
    seen: list[list[float]] = []
    opt.base.register_step_post_hook(lambda optimizer, *_: seen.append([g["lr"] for g in optimizer.param_groups]))
    return seen


@pytest.mark.parametrize("by_another", [False, True])
@pytest.mark.parametrize("one_group", [False, True])
def test_under_adamw_a_safe_thaw_is_back_at_the_full_rate_within_30_updates(one_group: bool, by_another: bool) -> None:
    """With groups of their own what was warm stays warm, whoever thaws; in one group all are warmed again."""
    model, lr, thaw = three(), 1e-3, 40
    head, body = list(model[4].parameters()), list(model[:4].parameters())
    if by_another:
        model[:4].requires_grad_(False)
    held = [{"params": [*head, *body] if one_group else head}]
    optimizer = AdamW(held if one_group or by_another else [*held, {"params": body}], lr=lr)
    opt = AdaptiveWarmup(optimizer, model)
    opt.follow(Unfreezing(None) if by_another else Unfreezing([model[4], model[:4]], gamma=0.0, every=thaw))
    rates = applied(opt)
    train(opt, model, range(thaw))
    if by_another:
        model[:4].requires_grad_(True)
        if not one_group:
            opt.add_param_group({"params": body})
    train(opt, model, range(thaw, thaw + 30))
    assert rates[thaw - 1][0] == lr and opt.metrics["stage"] == 2
    first = rates[thaw]
    assert first[-1] < 0.7 * lr and (one_group or first[0] == lr)
    assert rates[-1] == [lr] * len(first)


@pytest.mark.slow
def test_backbone_finetuning_of_lightning_thaws_by_itself() -> None:
    """Slow: imports Lightning. Its callback adds a group, which alone is warmed, the head goes on."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import BackboneFinetuning

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = three()[:4], nn.Linear(8, 3)

        def training_step(self, batch: Any, index: int) -> Any:
            return nn.functional.mse_loss(self.head(self.backbone(batch[0])), batch[1])

        def configure_optimizers(self) -> Any:
            self.opt = AdaptiveWarmup(AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2), self)
            self.rates = applied(self.opt.follow(Unfreezing(None)))
            return self.opt

    torch.manual_seed(0)
    module = Module()
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=2, backbone_initial_lr=0.01, verbose=False)
    trainer = lightning.Trainer(
        max_epochs=4, callbacks=[callback], logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader([batch_of(step) for step in range(6)], batch_size=None))
    began = [row["step"] for row in module.opt.history if str(row["reason"]).startswith("started")]
    assert began == [1, 13] and len(module.opt.param_groups) == 2
    (head,), (kept, thawed) = module.rates[11], module.rates[12]
    assert kept >= 0.99 * head and thawed < 0.7 * 0.01


@pytest.mark.parametrize(
    ("stages", "error", "words"),
    [
        ([], ValueError, "stages is empty"),
        (nn.Linear(2, 2), TypeError, "must be a list of modules"),
        ([nn.Linear(2, 2), [3]], TypeError, "stage 2 must hold modules, got int"),
        ([nn.Linear(2, 2), nn.Tanh()], ValueError, "stage 2 has no trainable parameter"),
    ],
)
def test_bad_stages_are_named(stages: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        Unfreezing(stages)


def test_stages_that_the_optimizer_does_not_hold_are_named() -> None:
    model = three()
    with pytest.raises(ValueError, match="holds no parameter of stage 2 of 2"):
        drive(SGD(model[4].parameters(), lr=1.0), Unfreezing([model[4], model[0]]), [(1.0, "warmup")])
    with pytest.raises(ValueError, match=r"stages must be in \[1, 3\], the layers of Sequential: 4"):
        Unfreezing.by_depth(model, stages=4)
    for options, words in (({"gamma": -1.0}, "gamma must be"), ({"every": 0}, "every must be")):
        with pytest.raises(ValueError, match=words):
            Unfreezing([model], **options)  # type: ignore[arg-type]


def test_at_a_second_thaw_each_earlier_stage_keeps_a_rate_of_its_own() -> None:
    """The head is at the full rate, the second stage still on its way, when the third is thawed."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(64, 6), torch.randn(64, 3)
    with torch.no_grad():
        model[4].weight.mul_(8.0)  # steep below it
    stages = [model[4], model[2], model[0]]
    base = torch.optim.SGD([{"params": stage.parameters()} for stage in stages], lr=0.02)
    opt = AdaptiveWarmup(base, model).follow(Unfreezing(stages, gamma=0.0, every=3))
    rates: list[list[float]] = []
    opt.register_step_post_hook(lambda *args: rates.append([g["lr"] / 0.02 for g in opt.param_groups]))
    for _ in range(8):
        opt.step(closure_of(opt, lambda: (model(x) - y).square().mean()))
    assert rates[5][0] == 1.0 and rates[5][1] < 0.5  # before the thaw
    assert rates[6][:2] == rates[5][:2] and rates[6][2] < rates[6][1]
