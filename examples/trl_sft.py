"""Fine-tune with TRL's SFTTrainer a model that ``adapt`` has adapted: the demo's model and word problems, offline.

    python examples/trl_sft.py --steps 20 --output adapter
    rasa-merge adapter --output merged

TRL is in the extra ``dev``; elsewhere ``pip install trl`` installs it. To let TRL make the adapter itself, pass it a
configuration of PEFT: docs/SERVING.md shows ``rasa_train.peft.RasaConfig``.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import rasa_train
from rasa_train import RaSA, adapt, save_adapter
from rasa_train.data.demo_problems import training_problems
from rasa_train.data.encode import prompt_text

BASE = Path(rasa_train.__file__).parent / "demo" / "model"

parser = argparse.ArgumentParser(description="Fine-tune the demo's model with RaSA in TRL's SFTTrainer.")
parser.add_argument("--steps", type=int, default=20, help="Number of optimizer steps.")
parser.add_argument("--output", type=Path, default=Path("adapter"), help="Directory for the adapter.")
options = parser.parse_args()

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(BASE, pad_token="</s>")
model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
adapt(model, RaSA(r=8, k=1, alpha=16))

rows = [{"prompt": prompt_text("alpaca", p["query"]), "completion": p["response"]} for p in training_problems()]
trainer = SFTTrainer(
    model=model,  # adapted already, so there is no peft_config
    processing_class=tokenizer,
    train_dataset=Dataset.from_list(rows[: 8 * options.steps]),
    args=SFTConfig(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",  # TRL would save the whole model; save_adapter writes the adapter alone
        report_to=[],
        use_cpu=True,
        bf16=False,
    ),
)
trainer.train()
save_adapter(model, options.output)
print(f"The adapter is in {options.output}. Merge it with: rasa-merge {options.output} --output merged")
