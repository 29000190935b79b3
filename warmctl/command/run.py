"""`warmctl run`: a script as it is, with its first optimizer wrapped."""

from __future__ import annotations

import ast
import os
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from warmctl.command.records import failure
from warmctl.record.shown import shown

if TYPE_CHECKING:
    from warmctl.command.wrapping import Wrapping

ANYTHING = {"allow_interspersed_args": False, "ignore_unknown_options": True}
"""What follows the script is the script's own."""


def run(
    script: Annotated[str, typer.Argument(metavar="SCRIPT", show_default=False)],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGS...", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option(help="Record: a JSONL file.", show_default="SCRIPT.jsonl, in the present folder")
    ] = None,
    target: Annotated[float, typer.Option(help="The stability ratio to stay below.")] = 0.8,
    monitor: Annotated[bool, typer.Option("--monitor", help="Only measure; the rates are the script's own.")] = False,
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module, as in python -m.")] = False,
) -> None:
    """Run a training script as it is, with the first optimizer over a module's parameters wrapped.

    Nothing is removed from the script: a warmup of its own stays. What happens goes to a record, and at the end it is
    said what to change in the script for good.
    """
    if not module and not Path(script).is_file():
        raise failure(f"{script}: no such file")
    from warmctl.command.wrapping import Wrapping

    record = out or Path(script.rpartition(".")[2] + ".jsonl" if module else Path(script).stem + ".jsonl")
    first_rank = os.environ.get("RANK", "0") == "0"
    with Wrapping(record if first_rank else None, target=target, control=not monitor) as wrapping:
        try:
            _execute(script, arguments or [], module)
        finally:
            if first_rank:
                for line in advice(wrapping, record, script):
                    typer.echo(shown(line), err=True)


def _execute(script: str, arguments: list[str], module: bool) -> None:
    """As `python SCRIPT ARGS...` would."""
    before = sys.argv, sys.path[:]
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.getcwd() if module else str(Path(script).resolve().parent))
    try:
        if module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before


def advice(wrapping: Wrapping, record: Path, script: str) -> list[str]:
    """What was done, and what to change for good."""
    lines = [f"warmctl: not wrapped: {why}" for why in wrapping.refused]
    opt, built = wrapping.opt, wrapping.built
    if opt is None or built is None:
        return [*lines, f"warmctl: {script} built no optimizer over a module's parameters: nothing was wrapped"]
    metrics = opt.metrics
    lines.append(
        f"warmctl: wrapped {type(opt.base).__name__} over {type(wrapping.model).__name__}, {metrics['step']} steps, "
        f"{metrics['probes']} probes, phase {metrics['phase']}, scale {metrics['scale']:.3g}; record: {record}"
    )
    if not metrics["step"]:
        return [*lines, "warmctl: its step was never called"]
    lines.append("warmctl: to keep it for good, import AdaptiveWarmup from warmctl and change")
    lines += _changes(wrapping)
    if rising := rise(opt.history["scheduled_lr"]):
        lines.append(
            f"  the script's own schedule rises for {rising} steps: leave its warmup out, AdaptiveWarmup ends its own"
        )
    return lines


def _changes(wrapping: Wrapping) -> list[str]:
    built, backward, opt = wrapping.built, wrapping.backward, wrapping.opt
    assert built is not None and opt is not None
    if "transformers" in Path(built.path).parts:
        if wrapping.on_graph:
            return [
                "  the Trainer's class: put WarmupTrainerMixin of warmctl.integrations.transformers before it, for its "
                "loss is made outside of the model",
                "  TrainingArguments(...): no warmup_steps",
            ]
        base = f"{type(opt.base).__name__}(model.parameters(), lr=...)"
        return [
            f"  Trainer(...): optimizers=(AdaptiveWarmup({base}, model), None)",
            "  TrainingArguments(...): no warmup_steps",
        ]
    name = assigned(built.text)
    lines = [f"  {built}  after this statement: {name} = AdaptiveWarmup({name}, {wrapping.name})"]
    failed = opt.meter.last.reason if opt.meter.last is not None else ""
    if backward is not None and wrapping.on_graph and "differentiated twice" in failed:
        lines.append(f"  {backward}  into a closure for {name}.step(closure), with zero_grad and the forward pass:")
        lines.append(f"    {failed}")
    elif backward is not None and wrapping.on_graph:
        lines.append(f"  {backward}  {backward.text}  becomes  {name}.backward({loss_of(backward.text)})")
    return lines


def assigned(statement: str) -> str:
    """The name that a statement gives its value to, "optimizer" where the line does not say."""
    head = statement.split("=")[0].strip()
    try:
        target: Any = ast.parse(head, mode="eval").body
    except SyntaxError:
        return "optimizer"
    return head if "=" in statement and isinstance(target, (ast.Name, ast.Attribute)) else "optimizer"


def loss_of(statement: str) -> str:
    """What a statement calls `backward` on, "loss" where it is not one call on one line."""
    try:
        call: Any = ast.parse(statement, mode="eval").body
        found = call.func.value if call.func.attr == "backward" and not call.args else None
    except (SyntaxError, AttributeError):
        return "loss"
    return ast.unparse(found) if found is not None else "loss"


def rise(rates: list[float]) -> int:
    """Steps for which a schedule rises at its start; 0 if it does not."""
    steps = 0
    while steps + 1 < len(rates) and rates[steps + 1] > rates[steps]:
        steps += 1
    return steps if steps > 1 else 0
