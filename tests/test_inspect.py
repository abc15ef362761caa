"""rasa-train inspect: what is shown are the tokens that are trained on, whoever wrote the data."""

from __future__ import annotations

import json
import re
import statistics
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from transformers import LlamaConfig, PreTrainedTokenizerFast

from rasa_train.check.examples import Piece, histogram, pieces_of
from rasa_train.check.examples_page import turns

from .conftest import Cli

sys.path.insert(0, str(Path(__file__).parent / "data"))
from tiny_data import byte_level_bpe, write_lines

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EVIL = (
    "<script>alert(1)</script></pre></mark><img src='http:pwn' onerror=alert(1)> "
    "\x1b]0;owned\x07 \u202ereversed\u202c & \"'"
)
RECIPE = """\
model: {{name: {base}, dtype: float32}}
adapter: {{method: rasa, r: 4, k: 1}}
data: {{dataset: rows.jsonl, {data}}}
{more}output_dir: run
"""


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerFast:
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = "<|im_end|>", "</s>", CHATML
    return tokenizer


@pytest.fixture(scope="module")
def base(chatml: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer and the configuration of a model, without weights."""
    path = tmp_path_factory.mktemp("base")
    chatml.save_pretrained(path)
    ids = {"bos_token_id": 0, "eos_token_id": chatml.eos_token_id, "pad_token_id": 1}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaConfig(vocab_size=len(chatml), **sizes, **ids).save_pretrained(path)
    return path


def conversation(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


def write(directory: Path, base: Path, rows: list[Any], data: str, more: str = "") -> None:
    write_lines(directory / "rows.jsonl", rows)
    (directory / "recipe.yaml").write_text(RECIPE.format(base=base, data=data, more=more))


class Elements(HTMLParser):
    """The elements of a page, and the text of those that show an example."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self._open.append(tag)
        if tag == "pre":
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "pre" in self._open:
            sign = self._open[-1] == "i"
            self.texts[-1] += {"·": " "}.get(data, "") if sign else data


def test_conversations(base: Path, chatml: PreTrainedTokenizerFast, cli: Cli, tmp_path: Path) -> None:
    rows = [
        conversation("Hello?", f"Yes. {EVIL}", "Étienne 你好 " + "why " * 30, "Naïve: 15 €.  "),
        conversation("Short?", "No."),
        conversation("Long? " + "so " * 200, "It is. " + "So " * 99),
        *[conversation(f"Is it {i}?", "Yes. " * (i % 5 + 1)) for i in range(40)],
    ]
    write(tmp_path, base, rows, "template: chat")
    printed = cli("train", "inspect", "recipe.yaml", "--json", "--html", "page/page.html", "--samples", "6", check=True)
    found = json.loads(printed.stdout)
    assert printed.stderr.endswith("page/page.html: 6 examples\n")
    whys = [sample["why"] for sample in found["samples"]]
    assert whys == ["first", "longest", "shortest", *["random"] * 3]
    assert [sample["index"] for sample in found["samples"][:3]] == [0, 2, 1]
    assert len({sample["index"] for sample in found["samples"]}) == 6
    # the text of the pieces is that of the tokens, and the trained ones hold the answers
    for sample in found["samples"]:
        turned = chatml.apply_chat_template(rows[sample["index"]]["messages"], tokenize=False)
        assert "".join(piece["text"] for piece in sample["pieces"]) == turned
        ids = chatml(turned, add_special_tokens=False)["input_ids"]
        assert sample["tokens"] == len(ids) == sum(piece["tokens"] for piece in sample["pieces"])
        specials = [piece["text"] for piece in sample["pieces"] if piece["special"]]
        assert specials == re.findall(r"<\|im_\w+\|>", turned)
        trained = "".join(piece["text"] for piece in sample["pieces"] if piece["trained"])
        answers = [m["content"] for m in rows[sample["index"]]["messages"] if m["role"] == "assistant"]
        assert trained.replace("\n", "") == "".join(f"{answer}<|im_end|>" for answer in answers).replace("\n", "")
    assert found["end_tokens"] == ["<|im_end|>"] and found["datasets"][0]["end_trained_share"] == 1.0

    # the page: nothing of the data is an element of it, and all of the text is there, one part a turn
    page = (tmp_path / "page" / "page.html").read_text()
    elements = Elements(page)
    assert not elements.names & {"script", "img", "iframe", "link2"} and "onerror" not in elements.attributes
    assert "default-src 'none'" in page and not re.search(r"https?://", re.sub(r"<pre>.*?</pre>", "", page, flags=re.S))
    first = chatml.apply_chat_template(rows[0]["messages"], tokenize=False)
    shown = (
        first.replace("\x1b", "\\x1b")
        .replace("\x07", "\\x07")
        .replace("\u202e", "\\u202e")
        .replace("\u202c", "\\u202c")
    )
    assert "".join(elements.texts[:4]) == shown
    assert [text.split("\n")[0] for text in elements.texts[:4]] == ["<|im_start|>user", "<|im_start|>assistant"] * 2
    assert all(text.endswith("<|im_end|>\n") for text in elements.texts[:4])

    text = cli("train", "inspect", "recipe.yaml", "data.max_length=60", check=True).stdout
    assert max(cell_len(line) for line in text.splitlines()) <= 80
    assert "cut at data.max_length" in text and "»Yes." in text and not re.search("[\x1b\x07\u202e]", text)
    again = cli("train", "inspect", "recipe.yaml", "--json", "--samples", "6", check=True)
    assert json.loads(again.stdout) == found, "the same examples each time"


def test_rows_of_tokens(recipe: Path, token_rows: Path, cli: Cli) -> None:
    """Rows of input_ids, without a tokenizer: their numbers are the text. The counts are those of the file."""
    rows = [json.loads(line) for line in token_rows.read_text().splitlines()]
    printed = cli("train", "inspect", recipe, "data.validation=null", "--json", check=True)
    [facts] = json.loads(printed.stdout)["datasets"]
    lengths = [len(row["input_ids"]) for row in rows]
    trained = sum(label != -100 for row in rows for label in row["labels"][1:])
    assert (facts["examples"], facts["tokens"], facts["trained_tokens"]) == (40, sum(lengths), trained)
    assert facts["trained_share"] == trained / sum(lengths) and facts["end_trained_share"] == 1.0
    assert (facts["shortest"], facts["longest"]) == (min(lengths), max(lengths))
    assert facts["median"] == statistics.median(lengths)
    assert sum(count for _, _, count in facts["histogram"]) == 40
    for least, most, count in facts["histogram"]:
        assert count == sum(least <= length <= most for length in lengths)
    sample = json.loads(printed.stdout)["samples"][0]
    assert "".join(piece["text"] for piece in sample["pieces"]).split() == [str(i) for i in rows[0]["input_ids"]]
    cut = json.loads(cli("train", "inspect", recipe, "data.validation=null", "data.max_length=12", "--json").stdout)
    ended = sum(length <= 12 for length in lengths)
    assert cut["datasets"][0]["end_trained_share"] == ended / 40 and cut["truncated"] == 40 - ended


def test_texts_with_labels(base: Path, cli: Cli, tmp_path: Path) -> None:
    rows = [{"text": f"The answer is {i}. {EVIL}", "label": ["no", "yes"][i % 3 > 0]} for i in range(12)]
    write(tmp_path, base, rows, "max_length: 256", "task: classification\n")
    text = cli("train", "inspect", "recipe.yaml", "--samples", "2", check=True).stdout
    assert "yes x 8" in text and "no x 4" in text and "66.7% of the answers" in text
    assert re.search(r"example 0 \(first\): \d+ tokens\n", text) and "-> no\n" in text and "»" not in text
    cli("train", "inspect", "recipe.yaml", "--samples", "2", "--html", "page.html", check=True)
    elements = Elements((tmp_path / "page.html").read_text())
    assert elements.texts[1] == "no" and "img" not in elements.names


def test_a_mixture(base: Path, cli: Cli, tmp_path: Path) -> None:
    """Each set has its own numbers and examples: one of long answers, one of short ones."""
    write_lines(tmp_path / "long.jsonl", [conversation(f"{i}?", "Long. " * (20 + i)) for i in range(9)])
    write_lines(tmp_path / "short.jsonl", [conversation(f"{i}?", "No.") for i in range(5)])
    write(tmp_path, base, [], "template: chat")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        recipe.read_text().replace("dataset: rows.jsonl", "mix: [{dataset: long.jsonl}, {dataset: short.jsonl}]")
    )
    arguments = ("train", "inspect", "recipe.yaml", "--samples", "2")
    found = json.loads(cli(*arguments, "--json", "--html", "page.html", check=True).stdout)
    long, short = found["datasets"]
    assert (long["name"], long["examples"], short["name"], short["examples"]) == ("long.jsonl", 9, "short.jsonl", 5)
    assert long["shortest"] > short["longest"] and long["trained_share"] > 0.5 > short["trained_share"]
    assert long["tokens"] + short["tokens"] == found["tokens"]
    of = [(sample["dataset"], "Long." in "".join(p["text"] for p in sample["pieces"])) for sample in found["samples"]]
    assert of == [("long.jsonl", True)] * 2 + [("short.jsonl", False)] * 2
    page = (tmp_path / "page.html").read_text()
    assert '<th scope="row">short.jsonl</th><td>5</td>' in page and "short.jsonl, example" in page
    text = cli(*arguments, check=True).stdout
    assert "short.jsonl: 5 examples" in text and "long.jsonl, example 0 (first)" in text
    assert max(map(len, text.splitlines())) <= 80


def test_what_cannot_be_inspected(base: Path, cli: Cli, tmp_path: Path) -> None:
    write(tmp_path, base, [conversation("Hello?", "Yes.")], "template: chat")
    for arguments, said in (
        (["recipe.yaml", "data.dataset=gone.jsonl"], "gone.jsonl"),
        (["recipe.yaml", "--samples", "0"], "--samples"),
        (["recipe.yaml", "--html", "recipe.yaml/page.html"], "--html recipe.yaml/page.html cannot be written"),
        (["recipe.yaml", "data.template=chatt"], "data.template"),
        ([], "RECIPE is missing"),
    ):
        refused = cli("train", "inspect", *arguments)
        assert refused.returncode == 2 and said in refused.stderr and "Traceback" not in refused.stderr


def test_a_character_that_is_divided_between_tokens() -> None:
    """Where the mask divides a character, its halves are shown as what cannot be decoded, and the rest as it is."""
    tokenizer = byte_level_bpe()
    ids = np.array(tokenizer("a你b", add_special_tokens=False)["input_ids"])
    assert len(ids) == 5
    pieces = pieces_of(tokenizer, ids, np.array([False, False, True, True, True]))
    assert [piece.tokens for piece in pieces] == [2, 3] and pieces[0].text[0] == "a" and pieces[1].text[-1] == "b"


def test_turns_of_other_templates() -> None:
    """Turns whose prompt has no end token of its own, and a text without special tokens."""
    prompt, answer = Piece("[INST] a long question [/INST]", False, tokens=30), Piece(" answer", True, tokens=3)
    bos, eos = Piece("<s>", False, True), Piece("</s>", True, True)
    parts = [bos, prompt, answer, eos, prompt, answer, eos]
    assert turns(parts) == [[bos, prompt], [answer, eos], [prompt], [answer, eos]]
    assert turns([prompt, answer]) == [[prompt], [answer]] and turns([]) == []
    header, unended = Piece("### Response:\n", False, tokens=5), Piece("[end]", False, True)
    assert turns([header, answer, unended, header, answer, unended]) == [[header, answer, unended]] * 2


@pytest.mark.parametrize("lengths", [[1], [7] * 5, [1, 2, 3], [4, 4096, 4097], list(range(1, 5000, 7)), [10**6, 1]])
def test_a_histogram(lengths: list[int]) -> None:
    bars = histogram(np.array(lengths))
    assert 1 <= len(bars) <= 12 and sum(count for _, _, count in bars) == len(lengths)
    assert all(count == sum(a <= length <= b for length in lengths) for a, b, count in bars)
    assert all(bars[i][1] + 1 == bars[i + 1][0] for i in range(len(bars) - 1)) and bars[0][2] and bars[-1][2]
