"""MoRA and VeRA along the 60 steps of the reference implementation (tests/golden)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rasa_train.adapters.inject import attach
from rasa_train.adapters.saved import load_tensors, read_adapter
from rasa_train.adapters.state import trainable
from rasa_train.optim.optimizers import LionW, make_optimizer
from rasa_train.optim.schedule import ScheduleConfig, lr_factor, set_lr


def batches(path: Path) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(ids, attention mask, labels) of 6 rows in file order, padded on the right with token 0."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    out = []
    for start in range(0, len(rows), 6):
        ids = [torch.tensor(row["input_ids"]) for row in rows[start : start + 6]]
        labels = [torch.tensor(row["labels"]) for row in rows[start : start + 6]]
        pad = nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
        out.append((pad(ids, batch_first=True), mask, pad(labels, batch_first=True, padding_value=-100)))
    return out


@pytest.mark.parametrize(
    ("case", "tensors"), [pytest.param("llama-mora6-r8", 28, marks=pytest.mark.slow), ("llama-vera-r64", 56)]
)
def test_golden_trajectory(case: str, tensors: int, golden: Path) -> None:
    facts = json.loads((golden / case / "case.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(
        golden / "llama-base", dtype=torch.float32, attn_implementation="eager"
    )
    saved = read_adapter(golden / case / "init")
    assert saved.method.method == facts["method"] and saved.method.r == facts["config"]["r"]
    attach(model, saved.method)
    load_tensors(model, saved.tensors, origin=case)
    parameters = trainable(model)
    assert len(parameters) == tensors
    optimizer = make_optimizer(LionW(lr=facts["lr"], betas=facts["betas"]), parameters.values())
    data = batches(golden / case / "batches.jsonl")
    assert len(data) == 4 and len(facts["losses"]) == 60
    for step, (loss_there, norm_there) in enumerate(zip(facts["losses"], facts["grad_norms"], strict=True)):
        ids, mask, labels = data[step % 4]
        logits = model(ids, attention_mask=mask).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        assert loss.item() == pytest.approx(loss_there, abs=1e-5), step
        assert norm.item() == pytest.approx(norm_there, rel=1e-3), step
        set_lr(optimizer, facts["lr"] * lr_factor(ScheduleConfig(warmup_ratio=0.1), step, 60))
        optimizer.step()
        optimizer.zero_grad()
    ids, mask, _ = data[0]
    expected = load_file(golden / case / "final_logits_batch0.safetensors")["logits"]
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    # The stored logits are of sequences padded to a multiple of 8.
    assert (logits - expected[:, : ids.shape[1]])[mask.bool()].abs().max() < 1e-3
    final = read_adapter(golden / case / "final").tensors
    for name, parameter in parameters.items():
        # Lion moves by signs: rounding can turn single entries, which then differ by a step or two.
        agree = (parameter - final[name]).abs() < facts["lr"] / 100
        assert agree.float().mean() > 0.98, name
