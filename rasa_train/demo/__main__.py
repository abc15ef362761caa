"""``make demo``: fine-tune the shipped tiny Llama with LoRA and RaSA of the same budget, merge, and compare.

    python -m rasa_train.demo [--output runs/demo] [--questions 200]

Every number is measured when the demo runs: ``rasa-train`` makes the two runs, ``rasa-merge`` merges them, and the
merged models answer, greedily, problems that are not in the training set.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..data.demo_problems import extract_answer, held_out
from ..evaluate.results import write_result
from ..recipe.load import load_recipe

METHODS = ("lora", "rasa")
MAX_NEW_TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare LoRA and RaSA on a tiny model, in a few minutes on a CPU.")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="directory for the runs")
    parser.add_argument("--questions", type=int, default=200, help="number of held-out problems to answer")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    console = Console(highlight=False)
    recipe = load_recipe("demo").recipe
    problems = held_out(options.questions)
    rows: list[dict[str, Any]] = [{"name": "base", "model": Path(recipe.model.name)}]
    for method in METHODS:
        run = options.output / method
        name = "demo" if method == "rasa" else f"demo_{method}"
        console.rule(f"rasa-train {name}")
        started = time.perf_counter()
        command("train", name, f"output_dir={run}", "--fresh")
        seconds = time.perf_counter() - started
        command("merge", run, "--output", run / "merged", "--overwrite")
        summary = json.loads((run / "summary.json").read_text())
        rows.append({"name": method, "model": run / "merged", "seconds": seconds, **summary})
    table = Table(title=f"{len(problems)} held-out word problems, greedy decoding, merged models")
    for heading in ("", "trained", "rank", "last loss", "training", "exact match"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        console.print(f"answering with {row['name']} ...")
        row["exact_match"] = exact_match(row["model"], problems)
        trained = "seconds" in row
        if trained:
            remember(options.output / row["name"], row, len(problems))
        table.add_row(
            {"lora": "LoRA", "rasa": "RaSA"}.get(row["name"], row["name"]),
            f"{row['trainable_parameters']:,}" if trained else "",
            str(max(row["effective_rank"].values())) if trained else "",
            f"{row['loss']:.3f}" if trained else "",
            f"{row['seconds']:.0f} s" if trained else "",
            f"{row['exact_match']:.1%}",
        )
    console.print(table)
    (options.output / "demo.json").write_text(json.dumps(rows, indent=2, default=str) + "\n")
    console.print(f"see the curves: rasa-report {options.output} --output {options.output / 'report.html'}")


def remember(run: Path, row: dict[str, Any], questions: int) -> None:
    """Write the score of a finished run where ``rasa-report`` finds it."""
    result = {
        "suite": "demo",
        "checkpoint": "adapter",
        "step": row["steps"],
        "epoch": row["epochs"],
        "headline": "exact_match",
        "metrics": {"exact_match": row["exact_match"]},
        "questions": questions,
        "protocol": {"prompt": "alpaca", "decoding": f"greedy, at most {MAX_NEW_TOKENS} tokens", "model": "merged"},
    }
    write_result(run / "evaluation", result)


def command(name: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", f"rasa_train.cli.{name}", *map(str, arguments)], check=True)


def exact_match(path: Path, problems: list[dict[str, str]], batch_size: int = 50) -> float:
    """Return the share of problems whose last ``The answer is: N`` is right, with greedy decoding and the training
    template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from ..data.encode import prompt_text

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    prompts = [tokenizer.bos_token + prompt_text("alpaca", p["query"]) for p in problems]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    right = 0
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            output = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
                pad_token_id=tokenizer.pad_token_id,
            )
        answers = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, answer in zip(chosen, answers, strict=True):
            gold = extract_answer(problems[i]["response"])
            right += gold is not None and extract_answer(answer) == gold
    return right / len(problems)


if __name__ == "__main__":
    main()
