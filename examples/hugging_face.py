"""Hugging Face Trainer: a GPT-2 built from a tiny config, on the bytes of the standard library's source.

    python examples/hugging_face.py

The Trainer is given the wrapped optimizer and no warmup; `log_warmup` adds the wrapper's numbers to its logs. The rate
that counts is the optimizer's, from which the Trainer's cosine decay starts. It is far too high: the bare run is ahead
at first and ends well above. `control=False` only measures: that run is AdamW's own, bit for bit.
"""

import sysconfig
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from warmctl import AdaptiveWarmup
from warmctl.integrations.transformers import log_warmup

PEAK_RATE, STEPS, LENGTH = 0.1, 80, 64

text = b"".join(file.read_bytes() for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))[:640_000]
rows = [{"input_ids": row, "labels": row} for row in torch.tensor(list(text)).view(-1, LENGTH)]
train_set, eval_set = rows[:-500], rows[-500:]


def run(control: bool) -> tuple[float, float]:
    """Loss on held-out text, before and after training."""
    set_seed(0)
    shape = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.1)
    optimizer = AdaptiveWarmup(optimizer, model, control=control)  # the only new line
    optimizer.history.to_jsonl(f"hugging_face_{'adaptive' if control else 'bare'}.jsonl")
    args = TrainingArguments(
        output_dir="hugging_face",
        max_steps=STEPS,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=100,
        lr_scheduler_type="cosine",
        logging_steps=30,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, args, train_dataset=train_set, eval_dataset=eval_set, optimizers=(optimizer, None))
    log_warmup(trainer)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    return start, trainer.evaluate()["eval_loss"]


if __name__ == "__main__":
    print(f"bare AdamW, peak rate {PEAK_RATE}")
    start, bare = run(control=False)
    print("the same with AdaptiveWarmup")
    _, adaptive = run(control=True)
    assert adaptive < bare < start
    print(f"held-out loss: {start:.3f} at the start, {bare:.3f} with bare AdamW, {adaptive:.3f} with AdaptiveWarmup")
