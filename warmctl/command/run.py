"""`warmctl run`: a script as it is, with its first optimizer wrapped."""

from __future__ import annotations

import itertools
import os
import runpy
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer

from warmctl.command.place import Place, loss_of
from warmctl.command.records import failure, unreadable
from warmctl.record.row_files import read_rows
from warmctl.record.shown import shown

if TYPE_CHECKING:
    from warmctl.command.wrapping import Wrapping

ANYTHING = {"allow_interspersed_args": False, "ignore_unknown_options": True}
"""What follows the script is the script's own."""


def run(
    script: Annotated[str, typer.Argument(metavar="SCRIPT", show_default=False)],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGS...", show_default=False)] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Record: a JSONL file. What another run left in it is replaced.",
            show_default="SCRIPT.jsonl, in the present folder, or SCRIPT-2.jsonl and so on",
        ),
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
    if not 0 < target <= 1.5:
        raise failure(f"--target must be in (0, 1.5], a fraction of the edge of stability at 1, got {target:g}")
    record = None
    if os.environ.get("RANK", "0") == "0":
        record = _checked(out) if out else _unused(script, module)
    from warmctl.command.wrapping import Wrapping

    wrapping = Wrapping(record, target=target, control=not monitor)
    try:
        with wrapping:
            _execute(script, arguments or [], module)
    except Exception as error:
        _say(wrapping, script)
        own = error.with_traceback(_own_part(error.__traceback__))
        sys.excepthook(type(own), own, own.__traceback__)  # the script may have set its own
        raise typer.Exit(1) from None
    except BaseException:  # sys.exit, Ctrl-C
        _say(wrapping, script)
        raise
    _say(wrapping, script)


def _unused(script: str, module: bool) -> Path:
    """The record's name where none is given: the first of SCRIPT.jsonl, SCRIPT-2.jsonl, … that holds nothing yet."""
    stem = script.rpartition(".")[2] if module else Path(script).stem
    names = itertools.chain([f"{stem}.jsonl"], (f"{stem}-{number}.jsonl" for number in itertools.count(2)))
    return next(path for path in map(Path, names) if not path.exists() or not path.stat().st_size)


def _checked(out: Path) -> Path:
    """As given. Says that an earlier run's rows will go; a message and exit 1 for a file of something else."""
    try:
        if out.exists() and next(read_rows(out), None):
            typer.echo(shown(f"warmctl: {out} holds an earlier run, whose rows this one replaces"), err=True)
    except OSError as error:
        raise unreadable(out, error) from None
    except ValueError as error:
        raise failure(str(error)) from None
    return out


def _own_part(trace: TracebackType | None) -> TracebackType | None:
    """A traceback without the frames that lead to the script."""
    while trace is not None and trace.tb_frame.f_globals.get("__name__") in (__name__, "runpy"):
        trace = trace.tb_next
    return trace


def _say(wrapping: Wrapping, script: str) -> None:
    if wrapping.record is not None:  # on the first rank
        for line in advice(wrapping, script):
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


def advice(wrapping: Wrapping, script: str) -> list[str]:
    """What was done, and what to change for good."""
    lines = [f"warmctl: not wrapped: {why}" for why in wrapping.refused]
    opt = wrapping.opt
    if opt is None:
        return [*lines, f"warmctl: {script} built no optimizer over a module's parameters: nothing was wrapped"]
    metrics, what = opt.metrics, f"{type(opt.base).__name__} over {type(wrapping.model).__name__}"
    own = f"the script wraps {what} itself ({wrapping.aside}) and was left to it"
    lines.append(
        f"warmctl: {own if wrapping.aside else f'wrapped {what}'}, {metrics['step']} steps, {metrics['probes']} "
        f"probes, phase {metrics['phase']}, scale {metrics['scale']:.3g}; record: {wrapping.record}"
    )
    lines += [
        f"warmctl: left bare, for only the first is wrapped: {what}" for what in dict.fromkeys(wrapping.bare.values())
    ]
    if not metrics["step"]:
        return [*lines, "warmctl: its step was never called"]
    if wrapping.aside:
        return lines
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
    lines = [f"  {built}  {in_place_of(built, wrapping.model_name)}"]
    name = wrapping.name or built.target or "optimizer"
    failed = opt.meter.last.reason if opt.meter.last is not None else ""
    if backward is not None and wrapping.on_graph and "differentiated twice" in failed:
        lines.append(f"  {backward}  into a closure for {name}.step(closure), with zero_grad and the forward pass:")
        lines.append(f"    {failed}")
    elif backward is not None and wrapping.on_graph:
        call = backward.call or backward.text
        lines.append(f"  {backward}  {call}  becomes  {name}.backward({loss_of(call)})")
    return lines


def in_place_of(built: Place, model: str) -> str:
    """How to wrap the optimizer that is built there: after the statement, or within it where none but it is named."""
    if name := built.target:
        return f"after this statement: {name} = AdaptiveWarmup({name}, {model})"
    if call := built.call:
        return f"{call}  becomes  AdaptiveWarmup({call}, {model})"
    return f"wrap the optimizer that is built here: AdaptiveWarmup(..., {model})"


def rise(rates: list[float]) -> int:
    """Steps for which a schedule rises at its start; 0 if it does not."""
    steps = 0
    while steps + 1 < len(rates) and rates[steps + 1] > rates[steps]:
        steps += 1
    return steps if steps > 1 else 0
