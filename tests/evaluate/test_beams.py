"""Beam search against every sequence there is, against transformers' own, and through ``rasa-eval`` on E2E."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rasa_train.errors import Stopped, UserError
from rasa_train.evaluate.beams import NoRepeatInResponse, search
from rasa_train.evaluate.generate import Generation, SampleFile, generate
from rasa_train.evaluate.nlg_sets import load
from rasa_train.evaluate.suites import load_suite
from tests.evaluate.test_command import AlwaysStop

pytest.importorskip("lm_eval")
DECODING = {"num_beams": 10, "length_penalty": 0.8, "early_stopping": "never", "no_repeat_ngram_size": 4}
MODEL = Path(__file__).parents[2] / "rasa_train/demo/model"
QUESTION = {"question": "Who?", "sql": {"sel": 0, "agg": 0, "conds": [[1, 0, "7"]]}}
TABLE = {"header": ["Player", "No."], "types": ["text", "real"], "rows": [["Ann", 7]]}
METRICS = {
    "samsum": {"rouge1", "rouge2", "rougeL"},
    "wikisql": {"lf_accuracy", "lf_accuracy_ordered", "ex_accuracy"},
}
CSV = """mr,ref
"name[Blue Spice], area[riverside]",Blue Spice is by the river.
"name[Cotto], area[city centre]","Cotto, in the city centre, costs Â£20."
"name[Blue Spice], area[riverside]",By the river is Blue Spice.
"""


@pytest.fixture(scope="module")
def tiny_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=6, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5)
    return GPT2LMHeadModel(config).eval()


def best_of_all(model: Any, prompt: list[int], length: int, ends: list[int], repeat: int) -> list[int]:
    """Return the answer with the highest sum of log-probabilities over the number of its tokens to the power 0.8."""
    sequences = list(itertools.product(range(6), repeat=length))
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens] for tokens in sequences])).logits
    logs = logits.double().log_softmax(-1)[:, len(prompt) - 1 : -1]
    chosen = logs.gather(-1, torch.tensor(sequences)[..., None])[..., 0].cumsum(-1)
    scored: list[tuple[float, list[int]]] = []
    for tokens, sums in zip(sequences, chosen.tolist(), strict=True):
        answer = list(tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), length)])
        grams = [tuple(answer[i : i + repeat]) for i in range(len(answer) - repeat + 1)]
        if len(set(grams)) == len(grams):
            scored.append((sums[len(answer) - 1] / len(answer) ** 0.8, answer))
    return max(scored)[1]


def test_a_search_as_wide_as_all_sequences_finds_the_best(tiny_gpt2: Any) -> None:
    """Two end tokens, no pair of tokens twice, prompts of different length; a pair of the prompt may come again."""
    prompts, ends = [[1, 2, 1, 2], [3], [5, 5, 4]], [0, 3]
    decoding = {**DECODING, "num_beams": 216, "max_gen_toks": 4, "no_repeat_ngram_size": 2}
    ids = torch.tensor([[0] * (4 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (4 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = search(tiny_gpt2, ids, mask, decoding, ends).tolist()
    for prompt, tokens in zip(prompts, found, strict=True):
        best = best_of_all(tiny_gpt2, prompt, 4, ends, 2)
        assert tokens[: len(best)] == best and set(tokens[len(best) :]) <= {ends[0]}


@pytest.fixture(scope="module")
def e2e(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("e2e") / "testset_w_refs.csv"
    path.write_text(CSV)
    return path


def test_published_forms_of_e2e(e2e: Path, tmp_path: Path) -> None:
    """References of the same meaning are one question's, wherever they stand."""
    rows = load("e2e", str(e2e.parent))
    assert [row["query"] for row in rows] == ["name[Blue Spice], area[riverside]", "name[Cotto], area[city centre]"]
    assert rows[0]["references"] == ["Blue Spice is by the river.", "By the river is Blue Spice."]
    assert rows[1]["references"] == ["Cotto, in the city centre, costs £20."]
    lines = tmp_path / "test.txt"
    lines.write_text("name : Cotto | area : riverside||Cotto is there . \nname : Cotto | area : riverside||There . \n")
    assert load("e2e", str(tmp_path)) == [
        {"query": "name : Cotto | area : riverside", "references": ["Cotto is there .", "There ."]}
    ]
    for text, message in (("a|b", "test.txt:1: a line must be context"), ("", "has no rows")):
        lines.write_text(text)
        with pytest.raises(UserError, match=message):
            load("e2e", str(lines))
    lines.rename(tmp_path / "x.csv").write_text("mr,text\na,b\n")
    with pytest.raises(UserError, match=r"x.csv:2: the reference must be text in `ref` or .*; the row has mr, text"):
        load("e2e", str(tmp_path / "x.csv"))


def test_responses_of_the_suite(lm: Any, e2e: Path, tmp_path: Path) -> None:
    """The prompt ends with bos; neither the batch nor an interruption changes a response; transformers agrees."""
    suite = load_suite("e2e", str(e2e))
    protocol = suite.protocol()["decoding"]
    expected = DECODING | {"do_sample": False, "max_gen_toks": 64, "until": ["\n\n"]}
    assert protocol == expected and suite.beams == 10
    suite.task.config.generation_kwargs["max_gen_toks"] = 12
    together = generate(lm, suite, suite.questions, SampleFile(None, {}), Generation(100_000))
    file = SampleFile(tmp_path / "samples.jsonl", {})
    with pytest.raises(Stopped):
        generate(lm, suite, suite.questions, file, Generation(1, stop=AlwaysStop(file, 1)))
    assert generate(lm, suite, suite.questions, file, Generation(1)) == together
    tokenizer = lm.tokenizer
    for question, (text,) in zip(suite.questions, together, strict=True):
        ids = tokenizer(question.prompt + tokenizer.bos_token, return_tensors="pt", add_special_tokens=False).input_ids
        assert ids[0, -1] == tokenizer.bos_token_id
        output = lm.model.generate(
            ids, num_beams=10, length_penalty=0.8, early_stopping="never", max_new_tokens=12, do_sample=False,
            logits_processor=[NoRepeatInResponse(4, ids.shape[1])], pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        assert text == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).partition("\n\n")[0] != ""


def test_suites_of_text(cli: Any, tmp_path: Path, e2e: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From files of questions to results, with what cannot be measured; a result that is there is not made again."""
    monkeypatch.setenv("PATH", "")
    run = (MODEL, "--suite", "e2e", "--data", e2e, "--output", tmp_path / "out", "--limit", 1)
    (result,) = json.loads(cli("eval", *run, "--json", check=True).stdout)["results"]
    assert result["headline"] == "bleu" and result["metrics"].keys() == {"bleu", "nist", "nist_perl"}
    assert "Java" in result["not_measured"]["meteor"] and result["protocol"]["decoding"]["num_beams"] == 10
    assert "is done already" in cli("eval", *run, check=True).stderr
    rows = [{"dialogue": "Ann: hello\r\nBo: hi", "summary": "Ann greets Bo."}]
    for suite, row in (("samsum", rows[0]), ("wikisql", {**QUESTION, "table": TABLE})):
        (tmp_path / f"{suite}.jsonl").write_text(json.dumps(row))
        run = (MODEL, "--suite", suite, "--data", tmp_path / f"{suite}.jsonl", "--output", tmp_path / "out")
        (result,) = json.loads(cli("eval", *run, "--json", check=True).stdout)["results"]
        assert result["metrics"].keys() == METRICS[suite] and result["not_measured"] == {}
        assert result["protocol"]["prompt_example"].startswith("Below is an instruction")


def test_a_classifier_does_not_write(cli: Any, e2e: Path, tmp_path: Path) -> None:
    """Neither a model of transformers nor an adapter with a head."""
    for name, facts, message in (
        ("config.json", {"architectures": ["RobertaForSequenceClassification"]}, "classifies texts, and this suite"),
        (
            "adapter_config.json",
            {"task": {"name": "classification", "labels": ["a", "b"]}},
            "--suite e2e does not fit a classifier, which writes no text",
        ),
    ):
        path = tmp_path / name.partition(".")[0]
        path.mkdir()
        (path / name).write_text(json.dumps(facts))
        (path / "adapter_model.safetensors").write_bytes(b"")
        done = cli("eval", path, "--suite", "e2e", "--data", e2e)
        assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "e2e", "--backend", "vllm"), "suite e2e decodes with 10 beams, which --backend vllm does not do"),
        (("--suite", "samsum"), "the dialogue must be text in `dialogue` or `query`; the row has mr, ref"),
        (("--suite", "wikisql"), "there is no table None"),
    ],
)
def test_bad_input(cli: Any, e2e: Path, arguments: tuple[str, ...], message: str) -> None:
    done = cli("eval", MODEL, "--data", e2e, *arguments)
    assert done.returncode == 2 and message in done.stderr
