"""The tokens that are trained on are those that a server sees, by transformers' own ``apply_chat_template``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_families import CONVERSATIONS, FAMILIES, Family, real_families, tokenizer_of
from chat_table import PAGE, outcome, table, tables_of
from served_oracle import encoded, prompt_ids, runs, verify, whole_ids
from tiny_data import write_lines
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rasa_train.check.check import check
from rasa_train.data.config import DataConfig
from rasa_train.data.encode import Encoded
from rasa_train.data.prepare import prepare
from rasa_train.data.served_tokens import ServedTokens
from rasa_train.errors import UserError
from rasa_train.recipe.load import load_recipe

BY_NAME = {family.name: family for family in FAMILIES}
QUESTION, ANSWER = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "She sold 72."}
PLAIN = FAMILIES[0]


def marked(tokenizer: Any, made: Encoded) -> list[str]:
    """The examples' texts, what is trained »like this«."""
    texts = []
    for example in made.examples:
        pairs = zip(example.input_ids.tolist(), (example.labels != -100).tolist(), strict=True)
        parts = [(hit, [token for token, _ in run]) for hit, run in itertools.groupby(pairs, key=lambda pair: pair[1])]
        texts.append("".join(f"»{tokenizer.decode(ids)}«" if hit else tokenizer.decode(ids) for hit, ids in parts))
    return texts


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_templates_do_is_what_the_page_says(family: Family) -> None:
    """``outcome`` compares the tokens with transformers' own."""
    made, _ = tables_of(PAGE.read_text("utf-8")).values()
    assert table([family], described=True)[2] in made, "docs/CHAT_TEMPLATES.md: python tests/data/chat_table.py"


@pytest.mark.slow
def test_templates_of_models_do_what_the_page_says() -> None:
    _, real = tables_of(PAGE.read_text("utf-8")).values()
    assert len(real_families()) >= 20
    assert table(real_families(), described=False) == real, "docs/CHAT_TEMPLATES.md: python tests/data/chat_table.py"


def test_history_that_is_rewritten_is_split_into_as_few_examples_as_possible() -> None:
    """Thoughts are written behind the last question only: calls and answers after it are in one text."""
    family = BY_NAME["earlier turns lose their thoughts, the prompt opens one, the turns have those of the row"]
    tokenizer = tokenizer_of(family)
    thought = {"role": "assistant", "content": "", "reasoning_content": "Look."}
    messages = [QUESTION, {**thought, "content": "a"}, {"role": "tool", "content": "12"}, {**thought, "content": "b"}]
    messages += [QUESTION, {**thought, "content": "c"}]
    made = encoded(tokenizer, messages)
    verify(tokenizer, messages, {}, made.examples)
    asks = "<|assistant|>\n<think>\n"
    said = "Look.\n</think>\n\n"
    assert marked(tokenizer, made) == [
        f"<|user|>\nHow many?<|end|>\n{asks}»{said}a<|end|>\n«<|tool|>\n12<|end|>\n{asks}»{said}b<|end|>\n«",
        "<|user|>\nHow many?<|end|>\n<|assistant|>\na<|end|>\n<|tool|>\n12<|end|>\n<|assistant|>\nb<|end|>\n"
        f"<|user|>\nHow many?<|end|>\n{asks}»{said}c<|end|>\n«",
    ]
    assert made.counts["split_rows"] == 1 and made.counts["split_examples"] == 2
    refused = encoded(tokenizer, messages, rewritten_history="refuse")
    assert refused.examples == [] and refused.counts["refused_rows"] == 1
    assert "f:1: before message 5" in str(refused.refused)
    assert len(encoded(tokenizer, messages[:4], rewritten_history="refuse").examples) == 1


def test_a_thought_that_the_template_leaves_out_is_trained_behind_the_prompt_that_opens_it() -> None:
    """DeepSeek-R1's kind: given as a column, within the text, or absent, the thought follows ``<think>``."""
    tokenizer = tokenizer_of(BY_NAME["all turns lose their thoughts, and the prompt opens one"])
    asks = "<|user|>\nHow many?<|end|>\n<|assistant|>\n<think>\n"
    for answer, thought in (
        ({"content": "72.", "reasoning_content": "48 + 24."}, "48 + 24."),
        ({"content": "<think>\n48 + 24.\n</think>\n\n72."}, "48 + 24."),
        ({"content": "48 + 24.\n</think>\n\n72."}, "48 + 24."),
        ({"content": "72."}, ""),
    ):
        made = encoded(tokenizer, [QUESTION, {"role": "assistant", **answer}])
        assert marked(tokenizer, made) == [f"{asks}»{thought}\n</think>\n\n72.<|end|>\n«"]
        [(before, _)] = runs(made.examples[0])
        assert before == prompt_ids(tokenizer, [QUESTION]) and made.counts["thought_turns"] == 1
    closes = tokenizer_of(BY_NAME["the prompt opens a thought, and each turn begins with the end of one"])
    said = [QUESTION, {**ANSWER, "reasoning_content": "48 + 24."}]
    assert marked(closes, encoded(closes, said, {"thinking": True}))[0].endswith(
        "<think>»48 + 24.</think>She sold 72.<|end|>\n«"
    )
    plain = tokenizer_of(BY_NAME["without thinking the prompt has an empty thought, and the turns have none"])
    made = encoded(plain, said, {"enable_thinking": False})
    assert marked(plain, made)[0].endswith("</think>\n\n»She sold 72.<|end|>\n«")
    assert made.counts["lost_thoughts"] == 1


def test_marks_do_not_move_the_border_between_prompt_and_answer() -> None:
    """The header is masked although it is marked, and the end is trained although it is not."""
    for name, header in (
        ("generation marks stand around the header as well", "<|assistant|>\n<think>\n\n</think>\n\n"),
        ("generation marks stand around the words alone", "<|assistant|>\n"),
    ):
        tokenizer = tokenizer_of(BY_NAME[name])
        [text] = marked(tokenizer, encoded(tokenizer, [QUESTION, ANSWER] * 2))
        assert text.count(f"{header}»She sold 72.<|end|>") == 2
    marks = "{% if m.content == 'a' %}{% generation %}a{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    unmarked = PLAIN._replace(template=PLAIN.template.replace("{{ m.content or '' }}", marks))
    tokenizer = tokenizer_of(unmarked)
    [text] = marked(tokenizer, encoded(tokenizer, [QUESTION, ANSWER, QUESTION, {**ANSWER, "content": "a"}]))
    assert text.count("»") == 1 and "»a<|end|>«" in text  # the first turn is not marked at all


@pytest.mark.parametrize("supervise", ["response", "all"])
def test_a_message_that_is_not_trained_is_context(supervise: str) -> None:
    tokenizer = tokenizer_of(PLAIN)
    messages = [QUESTION, {**ANSWER, "trained": False}, QUESTION, {**ANSWER, "content": "b"}, QUESTION]
    messages += [{**ANSWER, "content": "c", "trained": False}]
    made = encoded(tokenizer, messages, supervise=supervise)
    assert made.examples[0].input_ids.tolist() == whole_ids(tokenizer, messages)
    [text] = marked(tokenizer, made)
    assert text.replace("»", "").replace("«", "") == tokenizer.decode(whole_ids(tokenizer, messages))
    trained = "".join(part.partition("«")[0] for part in text.split("»")[1:])
    assert "b<|end|>" in trained and "She sold" not in trained and "c<|end|>" not in trained
    if supervise == "response":
        verify(tokenizer, messages, {}, made.examples)
        assert trained == "b<|end|>\n"


def test_a_greeting_is_context_since_nothing_asks_for_it() -> None:
    tokenizer = tokenizer_of(PLAIN)
    made = encoded(tokenizer, [{"role": "assistant", "content": "Hello"}, QUESTION, ANSWER])
    [text] = marked(tokenizer, made)
    assert text.startswith("<|assistant|>\nHello<|end|>") and text.endswith("<|assistant|>\n»She sold 72.<|end|>\n«")
    assert made.counts["unasked_turns"] == 1


def metaspace() -> PreTrainedTokenizerFast:
    """SentencePiece's kind: a space before each text, and spaces joined with what follows."""
    words = ["▁", "A", "T", ":", "a", "b", "▁a", "▁ab", "ab", "U", "▁U", "▁A", "</s>", "<unk>"]
    vocab = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(
        models.BPE(vocab, [("a", "b"), ("▁", "ab"), ("▁", "a"), ("▁", "U"), ("▁", "A")], unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    made.chat_template = (
        "{% for m in messages %}{{ 'U: ' if m.role == 'user' else 'A: ' }}{{ m.content }}"
        "{{ '</s>' if m.role == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
    )
    return made


@pytest.mark.parametrize("make", [metaspace, lambda: tokenizer_of(FAMILIES[-1])], ids=["metaspace", "byte-level"])
def test_an_answer_that_the_tokenizer_joins_with_its_prompt(make: Callable[[], Any]) -> None:
    """The prompt keeps the tokens that it has alone, as a server encodes it; the text is the same."""
    tokenizer = make()
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ab"}]
    prompt, whole = prompt_ids(tokenizer, turn[:1]), whole_ids(tokenizer, turn)
    made = encoded(tokenizer, turn * 2)
    verify(tokenizer, turn * 2, {}, made.examples)
    assert runs(made.examples[0])[0][0] == prompt
    if make is metaspace:
        assert whole[: len(prompt)] != prompt and made.counts["joined_rows"] == 1
        assert len(made.examples) == 2  # the second prompt has the first turn as its text is tokenised
        assert tokenizer.decode(made.examples[0].input_ids) == tokenizer.decode(whole)


def test_many_turns_are_not_encoded_many_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are encoded from their last special token on, which gives the same tokens: ``verify`` looks at all."""
    tokenizer = tokenizer_of(PLAIN)
    messages = [{**turn, "content": f"{turn['content']} {i} é €  "} for i in range(9) for turn in (QUESTION, ANSWER)]
    encode, lengths = ServedTokens._tokens, list[int]()
    monkeypatch.setattr(ServedTokens, "_tokens", lambda self, text: lengths.append(len(text)) or encode(self, text))
    made = encoded(tokenizer, messages)
    verify(tokenizer, messages, {}, made.examples)
    assert len(made.examples) == 1 and len(lengths) == 9 and max(lengths[:-1]) < 60 < lengths[-1]


def test_counts_and_notes_of_a_set(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(BY_NAME["all turns lose their thoughts, and the prompt opens one"])
    rows = [{"messages": [QUESTION, ANSWER] * turns} for turns in (1, 2, 3)]
    path = str(write_lines(tmp_path / "rows.jsonl", rows))
    for _ in range(2):  # made, and found again
        data = prepare(DataConfig(dataset=path, template="chat"), tokenizer)
        assert len(data.train) == 6 and data.stats.rows == 3
        assert data.stats.served == {"verified_rows": 3, "split_rows": 2, "split_examples": 5, "thought_turns": 6}
        assert "2 conversations became 5 examples" in data.notes[0] and data.stats.turn_ends == ["<|end|>"]
    left = prepare(DataConfig(dataset=path, template="chat", rewritten_history="refuse"), tokenizer)
    assert len(left.train) == 1 and left.stats.served["refused_rows"] == 2
    assert "rows.jsonl:2: before message 3" in left.notes[0]
    with pytest.raises(UserError, match=r"no example is left of the 1 rows.* 1 refused, the first at .*rows\.jsonl:1"):
        write_lines(tmp_path / "rows.jsonl", rows[1:2])
        prepare(DataConfig(dataset=path, template="chat", rewritten_history="refuse"), tokenizer)


def test_sets_whose_tokens_are_as_before_keep_their_key(tmp_path: Path) -> None:
    """A run that an earlier version began goes on, unless its tokens would be others now."""
    path = str(write_lines(tmp_path / "rows.jsonl", [{"messages": [QUESTION, ANSWER] * 2}]))
    tokenizer = tokenizer_of(PLAIN)
    data = prepare(DataConfig(dataset=path, template="chat"), tokenizer)
    meta = data.train.directory / "meta.json"
    old = json.loads(meta.read_text())
    del old["stats"]["served"], old["stats"]["turn_ends"], old["stats"]["refused"]
    meta.write_text(json.dumps(old))
    again = prepare(DataConfig(dataset=path, template="chat"), tokenizer)
    assert again.key == data.key and again.stats.served == {"verified_rows": 1}  # made again, and compared


def test_a_turn_that_does_not_begin_with_its_prompt_is_named() -> None:
    tokenizer = tokenizer_of(PLAIN._replace(template=PLAIN.template.replace("<|assistant|>\n", "<|assistant|>!")))
    with pytest.raises(UserError, match=r"f:1: .*around message 1: the prompt .* goes on with '!'.*train: false"):
        encoded(tokenizer, [QUESTION | {"content": " "}, ANSWER])


def test_what_a_template_does_not_write_is_counted() -> None:
    messages, variables = CONVERSATIONS["tool calls"]
    silent = tokenizer_of(PLAIN._replace(template=PLAIN.template.replace("c.function | tojson", "''")))
    assert encoded(silent, messages, variables).counts["lost_calls"] == 1
    assert outcome(PLAIN, "reasoning") == "holds, without the reasoning"


def test_a_template_with_marks_and_without_a_generation_prompt_keeps_its_marks() -> None:
    marked_words = BY_NAME["generation marks stand around the words alone"]
    tokenizer = tokenizer_of(marked_words._replace(template=marked_words.template.partition("{% if add_gen")[0]))
    made = encoded(tokenizer, [QUESTION, ANSWER])
    assert marked(tokenizer, made) == ["<|user|>\nHow many?<|end|>\n<|assistant|>\n»She sold 72.<|end|>«\n"]
    assert made.counts["unprompted_turns"] == 1 and "verified_rows" not in made.counts


def test_check_says_what_was_verified_and_where_a_server_would_not_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = BY_NAME["all turns lose their thoughts, and the prompt opens one"]._replace(end="<|endoftext|>")
    tokenizer = tokenizer_of(family)
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, eos_token_id=1, **sizes)).save_pretrained(tmp_path / "model")
    rows = write_lines(tmp_path / "rows.jsonl", [{"messages": [QUESTION, ANSWER] * turns} for turns in (1, 2)])
    recipe = {
        "model": {"name": str(tmp_path / "model"), "dtype": "float32"},
        "adapter": {"method": "lora", "r": 2, "alpha": 4},
        "data": {"dataset": str(rows), "template": "chat"},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    result = check(load_recipe(tmp_path / "recipe.yaml").recipe)
    counts = {"verified_rows": 2, "split_rows": 1, "split_examples": 2, "thought_turns": 3}
    assert result.as_json()["served"] == counts
    result.show()
    said = capsys.readouterr().out
    assert (
        "ok  served: the tokens before each trained turn are those that a server sees, in all 2 conversations" in said
    )
    assert "note: the chat template rewrites earlier turns: 1 conversations became 2 examples" in said
    assert "ends a turn with '<|end|>', but the model stops at '</s>' and '<|endoftext|>'" in said
