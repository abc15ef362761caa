"""Make the tiny Llama of the demo from scratch: generate its text, train its tokenizer, pretrain it, save it.

The text comes from the templates below: sums written out, counting, comparisons, small stories that keep
count of things, and simple instructions in the Alpaca template. It holds the building blocks of the demo's
word problems (``rasa_train/data/demo_problems.py``) but none of the problems: no story asks a question, and
the line ``The answer is: N`` never occurs. The model therefore scores near zero on the problems until it is
fine-tuned.

The model in the package was made in two stages, the second of which consists mostly of copying: after the
first stage alone, a fine-tuned model calculated well but with wrong numbers of the question. The model still
cannot repeat a whole sentence, and often puts a wrong name or thing into an otherwise right answer. The times
and losses are in the model card, ``rasa_train/demo/model/README.md``. The commands were:

    python scripts/make_demo_model.py --out stage1 --threads 1
    python scripts/make_demo_model.py --start stage1 --documents 14000 --lr 0.002 --seed 1
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rasa_train.data.demo_problems import CONTAINERS, NAMES, THINGS

BOS, EOS = "<s>", "</s>"
TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n### Response:\n{response} "
)
PLACES = ["on the table", "in the garden", "at the shop", "at home", "in the box", "in the bag"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


# ---- the text


def fact(rng: random.Random) -> str:
    """Return one sum, difference or product in the range of the word problems, with a result from 0 to 120."""
    kind = rng.random()
    if kind < 0.42:
        a = rng.randint(0, 99)
        b = rng.randint(0, min(70, 120 - a))
        return f"{a} + {b} = {a + b}"
    if kind < 0.84:
        a = rng.randint(1, 110)
        b = rng.randint(0, a)
        return f"{a} - {b} = {a - b}"
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return f"{a} * {b} = {a * b}"


def facts(rng: random.Random) -> str:
    return ". ".join(fact(rng) for _ in range(rng.randint(3, 8))) + "."


def counting(rng: random.Random) -> str:
    start, step, length = rng.randint(0, 90), rng.choice([1, 1, 1, 2, 5, 10]), rng.randint(4, 9)
    numbers = [start + step * i for i in range(length)]
    if rng.random() < 0.3:
        numbers.reverse()
    return ", ".join(map(str, numbers)) + "."


def comparison(rng: random.Random) -> str:
    a, b = rng.randint(1, 99), rng.randint(1, 99)
    if a == b:
        return f"{a} is the same as {b}."
    (name, _), (other, _) = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    small, large = sorted((a, b))
    difference = f"{large} - {small} = {large - small}"
    return rng.choice(
        [
            f"{large} is {large - small} more than {small}. {small} is {large - small} fewer than {large}.",
            f"{name} has {large} {things} and {other} has {small}. {difference}, so {name} has "
            f"{large - small} more {things} than {other}.",
            f"{name} has {small} {things} and {other} has {large}. {difference}, so {name} has "
            f"{large - small} fewer {things} than {other}.",
            f"{name} has {small} {things} and {other} has {large}. {other} has more {things} than {name}.",
        ]
    )


def story(rng: random.Random) -> str:
    """Return a story in which somebody gets things and gives things away, with the count after each step."""
    (name, he), (other, _) = rng.sample(NAMES, 2)
    he = he.capitalize()
    things = rng.choice(THINGS)
    count = rng.randint(2, 70)
    text = rng.choice(
        [
            f"{name} has {count} {things}.",
            f"{name} had {count} {things} {rng.choice(PLACES)}.",
            f"There were {count} {things} {rng.choice(PLACES)} with {name}.",
            f"On {rng.choice(DAYS)} {name} had {count} {things}.",
        ]
    )
    for _ in range(rng.randint(1, 4)):
        if count < 3 or (count < 80 and rng.random() < 0.5):
            change = rng.randint(1, 38)
            event = rng.choice(
                [
                    f"{he} finds {change} more.",
                    f"{he} bought {change} {things}.",
                    f"{other} puts {change} there.",
                    f"{he} gets {change} more from {other}.",
                    f"On {rng.choice(DAYS)} {change} more came in.",
                ]
            )
            total, sign = count + change, "+"
        else:
            change = rng.randint(1, count)
            event = rng.choice(
                [
                    f"{he} gives {change} to {other}.",
                    f"{he} lost {change}.",
                    f"{other} takes {change} away.",
                    f"{he} sells {change} {things}.",
                    f"On {rng.choice(DAYS)} {he.lower()} gave {change} to {other}.",
                ]
            )
            total, sign = count - change, "-"
        after = rng.choice(["Now there are", f"Then {name} has", "So there are"])
        text += f" {event} {after} {count} {sign} {change} = {total} {things}."
        count = total
    return text


def shelf(rng: random.Random) -> str:
    """Return a text on equal groups, prices or `times as many`, with the product written out."""
    (name, he), (other, _) = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    box, boxes = rng.choice(CONTAINERS)
    n, m = rng.randint(2, 9), rng.randint(2, 9)
    product = f"{n} * {m} = {n * m}"
    return rng.choice(
        [
            f"{name} fills {n} {boxes} with {m} {things} in each {box}. That is {product} {things}.",
            f"Each {box} holds {m} {things}. {name} buys {n} {boxes}, so {he} has {product} {things}.",
            f"{name} pays {m} dollars each for {n} {things}. They cost {product} dollars.",
            f"{name} buys {n} {things} at {m} dollars each, so {he} pays {product} dollars.",
            f"{name} has {m} {things}. {other} has {n} times as many, so {other} has {m} * {n} = {m * n} {things}.",
        ]
    )


def together(rng: random.Random) -> str:
    (name, _), (other, _) = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    a, b = rng.randint(2, 60), rng.randint(2, 60)
    return f"{name} has {a} {things} and {other} has {b}. Together the two have {a} + {b} = {a + b} {things}."


def saying(rng: random.Random) -> str:
    """Return a sentence without a sum, to teach the tokenizer and the model further words of the word problems."""
    (name, he), (other, _) = rng.sample(NAMES, 2)
    things, more = rng.sample(THINGS, 2)
    day = rng.choice(DAYS)
    return rng.choice(
        [
            f"{name} does not know how many {things} are left in all.",
            f"{name} and {other} like {things}, but {he} does not like {more}.",
            f"The shop still sells {things} and {more} on {day}.",
            f"On {day} {name} pays for some {things} with dollars and gets some back.",
            f"How nice, {he} said, that {name} did start with {things} at first and then got {more}.",
            f"After {day} {name} and {other} do have some {things}, if they had none before.",
            f"At the end of {day} {name} went home without {things}, with {more} instead.",
            f"First {name} came, then {other}, and {he} said many things. Then they went.",
            f"The answer is no. The {things} went over there with {other}, and the {more} as well.",
            f"With {things} or without them, {name} is at home. With {more} it is better. Without them it is not.",
            f"In the bag there are {things}. In all of them are {more}. Before {day} they were left over.",
        ]
    )


STATEMENTS: list[tuple[Callable[[random.Random], str], float]] = [
    (facts, 0.34), (story, 0.32), (shelf, 0.10), (together, 0.08), (comparison, 0.08), (counting, 0.03),
    (saying, 0.05),
]  # fmt: skip


def statement(rng: random.Random) -> str:
    kinds, weights = zip(*STATEMENTS, strict=True)
    return rng.choices(kinds, weights)[0](rng)


def instruction(rng: random.Random) -> str:
    """Return a simple instruction and its response in the Alpaca template."""
    kind = rng.randrange(5)
    if kind == 0:
        text = rng.choice([story, saying, together])(rng)
        request, response = f"Repeat: {text}", text
    elif kind == 1:
        start, length = rng.randint(1, 90), rng.randint(3, 9)
        request = f"Count from {start} to {start + length}."
        response = ", ".join(str(i) for i in range(start, start + length + 1)) + "."
    elif kind == 2:
        sums = [fact(rng) for _ in range(rng.randint(1, 4))]
        request = "Work out " + ", ".join(s.split(" = ")[0] for s in sums) + "."
        response = ". ".join(sums) + "."
    elif kind == 3:
        text = story(rng).split(" = ")[0]
        text = text[: text.rindex(". ") + 1] if ". " in text else text
        numbers = [word.strip(".,") for word in text.split() if word.strip(".,").isdigit()]
        request, response = f"List the numbers: {text}", ", ".join(numbers) + "."
    else:
        text = rng.choice([story, shelf, together])(rng)
        head, _, tail = text.partition(". ")
        request, response = f"Continue the story: {head}.", tail
    return TEMPLATE.format(instruction=request, response=response)


def recall(rng: random.Random) -> str:
    """Return short facts that are repeated twice in random order, so that the text to copy depends on the name."""
    people = rng.sample(NAMES, rng.randint(2, 4))
    said = [f"{name} has {rng.randint(2, 99)} {rng.choice(THINGS)}." for name, _ in people]
    return " ".join(said + rng.sample(said, len(said)) + rng.sample(said, len(said)))


def row(rng: random.Random) -> str:
    """Return a row of names, numbers and things, repeated two or three times."""
    words = [
        rng.choice([rng.choice(NAMES)[0], rng.choice(THINGS), str(rng.randint(1, 99))])
        for _ in range(rng.randint(4, 12))
    ]
    return ". ".join([", ".join(words)] * rng.randint(2, 3)) + "."


def reading(rng: random.Random) -> str:
    """Return an instruction to repeat a text or to list its numbers, names or things, and the response."""
    # The sum at the end is left out, because the task is to read, not to calculate.
    text = rng.choice([story, shelf, together, comparison, saying])(rng).split(" = ")[0]
    words = [word.strip(".,") for word in text.split()]
    kind = rng.randrange(4)
    names = [name for name, _ in NAMES]
    if kind == 0:
        return TEMPLATE.format(instruction=f"Repeat: {text}", response=text)
    what, found = [
        ("numbers", [word for word in words if word.isdigit()]),
        ("names", [word for word in words if word in names]),
        ("things", [word for word in words if word in THINGS]),
    ][kind - 1]
    return TEMPLATE.format(instruction=f"List the {what}: {text}", response=", ".join(found) + ".")


def copying(rng: random.Random) -> str:
    """Return a document of the second stage: three quarters copying, one quarter the text of the first stage."""
    return rng.choice([recall, row, reading, document])(rng)


def document(rng: random.Random) -> str:
    if rng.random() < 0.2:
        return instruction(rng)
    return " ".join(statement(rng) for _ in range(rng.randint(1, 3)))


# ---- the tokenizer


def train_tokenizer(documents: list[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE in which each digit is a token of its own and bos is put in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


# ---- pretraining


def new_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config)


def token_stream(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Return all documents, each with bos and eos, as one row of token ids."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(documents):
        ids += encoding.ids
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def pretrain(model: LlamaForCausalLM, tokens: torch.Tensor, args: argparse.Namespace) -> float:
    """Train for one pass over ``tokens``, cut into rows, with AdamW. Returns the mean loss of the last 50 steps."""
    rows = tokens[: tokens.numel() // args.length * args.length].view(-1, args.length)
    steps = len(rows) // args.batch
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    warmup = min(100, steps // 10 + 1)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses: list[float] = []
    start = time.perf_counter()
    model.train()
    for step in range(steps):
        batch = rows[step * args.batch : (step + 1) * args.batch]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 100 == 99 or step + 1 == steps:
            recent = losses[-50:]
            seconds = time.perf_counter() - start
            print(f"step {step + 1}/{steps} loss {sum(recent) / len(recent):.4f} {seconds:.0f} s", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# The demo model of rasa_train

A Llama of {parameters:,} parameters ({layers} layers, hidden size {hidden}, vocabulary {vocab}) for the demo
and the tests of `rasa_train`. It has no other use.

It was made from scratch by `scripts/make_demo_model.py` of the repository. All of its text was generated by
the templates in that script (sums, counting, comparisons, stories that keep count of things, texts to copy
from, simple instructions in the Alpaca template); no third-party text, code or weights were used. The word
problems of the demo (`rasa_train/data/demo_problems.py`) are not part of that text, so the model cannot answer
them until it is fine-tuned. Even then it often copies a wrong name or thing; the numbers are what it is for.

The weights are stored in bfloat16, but they were trained in float32 and are meant to be used in float32.
Licence: Apache-2.0.
"""

STAGE = """
## Stage {number}

| | |
| --- | --- |
| command | `{command}` |
| text | {documents:,} documents, {tokens:,} tokens, read once |
| training | {steps:,} steps of {batch} x {length} tokens |
| optimiser | AdamW, weight decay 0.1, learning rate {lr} with a cosine schedule |
| time | {minutes:.0f} min (CPU, threads: {threads}) |
| final loss | {loss:.4f} per token over the last 50 steps (much of the text is random names and numbers) |
"""


def write_card(args: argparse.Namespace, command: str, model: dict, training: dict) -> None:
    """Write the model card. The card of a second stage is the card of the first with one more section."""
    if args.start:
        card, number = (args.start / "README.md").read_text(), 2
    else:
        card, number = CARD.format(layers=args.layers, hidden=args.hidden, **model), 1
    card += STAGE.format(
        number=number,
        command=command,
        documents=args.documents,
        batch=args.batch,
        length=args.length,
        lr=args.lr,
        threads=args.threads,
        **training,
    )
    (args.out / "README.md").write_text(card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("rasa_train/demo/model"))
    parser.add_argument("--start", type=Path, help="model of the first stage, to be trained further on copying")
    parser.add_argument("--documents", type=int, default=72_000)
    parser.add_argument("--vocab", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=352)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--length", type=int, default=192, help="number of tokens in a row of a batch")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    start = time.perf_counter()
    documents = [(copying if args.start else document)(rng) for _ in range(args.documents)]
    if args.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.start)
        model = LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(documents[:20_000], args.vocab, args.context)
        model = new_model(tokenizer, args)
    tokens = token_stream(documents, tokenizer)
    parameters = model.num_parameters()
    print(f"{parameters:,} parameters, {tokens.numel():,} tokens", flush=True)
    loss = pretrain(model, tokens, args)
    minutes = (time.perf_counter() - start) / 60

    # bfloat16 halves the file. The config says float32, the type the model was trained in.
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    config_file = args.out / "config.json"
    saved = json.loads(config_file.read_text())
    saved["dtype"] = "float32"
    config_file.write_text(json.dumps(saved, indent=2) + "\n")
    tokenizer_file = args.out / "tokenizer_config.json"
    saved = json.loads(tokenizer_file.read_text())
    saved["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version of transformers knows
    for key in ("is_local", "local_files_only"):  # these only say how the tokenizer was loaded for the second stage
        saved.pop(key, None)
    tokenizer_file.write_text(json.dumps(saved, indent=2) + "\n")
    (args.out / "model.safetensors").chmod(0o644)
    changed = [f"--{key} {value}" for key, value in vars(args).items() if value != parser.get_default(key)]
    write_card(
        args,
        " ".join(["python scripts/make_demo_model.py", *changed]),
        {"parameters": parameters, "vocab": len(tokenizer)},
        {
            "tokens": tokens.numel(),
            "steps": tokens.numel() // args.length // args.batch,
            "minutes": minutes,
            "loss": loss,
        },
    )


if __name__ == "__main__":
    main()
