"""Fine-tune with RaSA in an ordinary PyTorch loop: the demo's model and word problems, offline, on a CPU.

python examples/plain_loop.py --steps 30 --output adapter
rasa-merge adapter --output merged
"""

import argparse
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rasa_train
from rasa_train import RaSA, adapt, save_adapter
from rasa_train.data.demo_problems import training_problems
from rasa_train.data.encode import prompt_text

parser = argparse.ArgumentParser(description="Fine-tune the demo's model with RaSA in an ordinary PyTorch loop.")
parser.add_argument("--steps", type=int, default=30, help="Number of optimizer steps.")
parser.add_argument("--output", type=Path, default=Path("adapter"), help="Directory for the adapter.")
options = parser.parse_args()

BASE = Path(rasa_train.__file__).parent / "demo" / "model"
tokenizer = AutoTokenizer.from_pretrained(BASE, pad_token="</s>")


def batch_of(problems: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """Tokenise problems. Only the tokens of the responses carry loss."""
    prompts = [tokenizer.bos_token + prompt_text("alpaca", problem["query"]) for problem in problems]
    texts = [p + problem["response"] + tokenizer.eos_token for p, problem in zip(prompts, problems, strict=True)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, prompt in zip(labels, prompts, strict=True):
        row[: len(tokenizer.tokenize(prompt))] = -100
    return {**batch, "labels": labels}


torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).train()
adapt(model, RaSA(r=8, k=1, alpha=16))  # freezes the base and puts the adapters in place
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
problems, draw = training_problems(), random.Random(0)

for step in range(1, options.steps + 1):
    mean_loss = 0.0
    for _ in range(2):  # gradients of two micro-batches of four problems add up to those of one step
        loss = model(**batch_of(draw.sample(problems, 4))).loss / 2
        loss.backward()
        mean_loss += loss.item()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {mean_loss:.4f}", flush=True)

save_adapter(model, options.output)
print(f"The adapter is in {options.output}. Merge it with: rasa-merge {options.output} --output merged")
