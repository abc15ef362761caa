"""Masks against what they must be, worked out on characters."""

import itertools
from typing import Any

import pytest
from tiny_data import SENTENCES, character_tokenizer

from rasa_train.data.config import DataConfig
from rasa_train.data.encode import Encoder, Example, prompt_text
from rasa_train.errors import UserError

HEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n"
)
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}\n{% endgeneration %}{% else %}{{ m['content'] }}\n{% endif %}{% "
    "endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "no"},
]


def encode_one(tokenizer: Any, parts: Any, kind: Any = "pair", **options: Any) -> Example:
    options = {"dataset": "x"} | options
    (example,) = Encoder(DataConfig(**options), tokenizer, kind).encode([("f:1", parts, {})]).examples
    return example


def pieces(tokenizer: Any, example: Example) -> list[tuple[bool, str]]:
    """The text in runs of tokens with loss (True) and without."""
    marked = zip(example.labels, example.input_ids, strict=True)
    runs = itertools.groupby(marked, key=lambda pair: bool(pair[0] != -100))
    return [(with_loss, tokenizer.decode([token for _, token in run])) for with_loss, run in runs]


def test_alpaca_text_and_response_mask_by_hand(characters: Any) -> None:
    example = encode_one(characters, (" What is 2+2?\n", "\n4 "))
    assert pieces(characters, example) == [
        (False, f"<s>{HEAD}What is 2+2?\n\n### Response:\n"),
        (True, "4 </s>"),
    ]
    assert example.input_ids[-1] == characters.eos_token_id
    with_loss = example.labels != -100
    assert (example.labels[with_loss] == example.input_ids[with_loss]).all()
    assert example.input_ids.dtype == example.labels.dtype == "int32"


def test_paper_mask_leaves_out_the_question_only(characters: Any) -> None:
    example = encode_one(characters, ("What?", "4"), supervise="paper")
    assert pieces(characters, example) == [
        (True, f"<s>{HEAD}"),
        (False, "What?\n\n"),
        (True, "### Response:\n4 </s>"),
    ]


def test_paper_mask_ends_at_a_response_header_within_the_question(characters: Any) -> None:
    example = encode_one(characters, ("Say ### Response:\nno more", "4"), supervise="paper")
    assert pieces(characters, example) == [
        (True, f"<s>{HEAD}"),
        (False, "Say "),
        (True, "### Response:\nno more\n\n### Response:\n4 </s>"),
    ]
    assert pieces(characters, encode_one(characters, ("Say ### Response:\nno more", "4")))[-1] == (
        True,
        "4 </s>",
    )


def test_paper_mask_begins_again_at_an_instruction_header_within_the_answer(characters: Any) -> None:
    answer = "a ### Instruction:\nb ### Response:\nc"
    runs = pieces(characters, encode_one(characters, ("q", answer), supervise="paper"))
    masked = [text for with_loss, text in runs if not with_loss]
    assert masked == ["q\n\n", "b "]


def test_token_on_the_border_of_a_mask_goes_with_the_overlap(bpe: Any) -> None:
    """In the plain template a token may span query and response: part of the response, it is supervised."""
    example = encode_one(bpe, ("How many cl", "ips did"), template="plain")
    ids = bpe("<s>How many clips did</s>", add_special_tokens=False)["input_ids"]
    assert list(example.input_ids) == ids
    assert " clips" in [bpe.decode(i) for i in ids]  # the border is within a token, as the test means it
    assert pieces(bpe, example) == [(False, "<s>How many"), (True, " clips did</s>")]


@pytest.mark.parametrize("supervise", ["response", "paper", "all"])
@pytest.mark.parametrize("response", ["She sold 72  clips.", "é €\n\n 7", ""])
def test_bpe_text_is_whole_with_one_bos_and_one_supervised_eos(bpe: Any, supervise: str, response: str) -> None:
    example = encode_one(bpe, ("How many?", response), supervise=supervise)
    assert bpe.decode(example.input_ids) == f"<s>{HEAD}How many?\n\n### Response:\n{response} </s>"
    assert list(example.input_ids).count(bpe.bos_token_id) == list(example.input_ids).count(bpe.eos_token_id) == 1
    assert example.labels[-1] == bpe.eos_token_id
    if supervise == "response":
        assert pieces(bpe, example)[-1] == (True, f"{response} </s>")


def test_separated_is_the_text_of_loras_experiments(characters: Any) -> None:
    """context, bos, a space and the completion, eos; the loss begins after bos."""
    example = encode_one(characters, ("name : Cotto", "It is there . "), template="separated")
    assert pieces(characters, example) == [(False, "name : Cotto<s>"), (True, " It is there .</s>")]
    assert prompt_text("separated", "name : Cotto") == "name : Cotto"


def test_all_supervises_every_token_and_plain_adds_nothing(characters: Any) -> None:
    example = encode_one(characters, ("a ", " b "), template="plain", supervise="all")
    assert pieces(characters, example) == [(True, "<s>a  b </s>")]


def test_bos_and_eos_that_are_in_the_row_are_not_repeated(characters: Any) -> None:
    assert pieces(characters, encode_one(characters, ("<s>a", "b</s>"), template="plain")) == [
        (False, "<s>a"),
        (True, "b</s>"),
    ]
    assert pieces(characters, encode_one(characters, ("a", "b </s>\n")))[-1] == (True, "b </s>")


def test_tokenizer_without_bos_gets_none_and_without_eos_is_refused() -> None:
    no_bos = character_tokenizer(eos_token="</s>")
    assert no_bos.decode(encode_one(no_bos, ("q", "r")).input_ids).startswith("Below is")
    with pytest.raises(UserError, match="no eos token") as caught:
        encode_one(character_tokenizer(bos_token="<s>"), ("q", "r"))
    assert caught.value.key == "model.name"
    with pytest.raises(UserError, match="need a tokenizer"):
        encode_one(None, ("q", "r"))


def test_prompt_text_is_the_beginning_of_the_training_text(characters: Any) -> None:
    text = characters.decode(encode_one(characters, (" q\n", "r")).input_ids)
    assert text == f"<s>{prompt_text('alpaca', ' q')}r </s>"
    assert prompt_text("plain", " q") == " q"
    with pytest.raises(ValueError, match="apply_chat_template"):
        prompt_text("chat", "q")


def test_truncation_cuts_on_the_right_and_loses_the_eos(characters: Any) -> None:
    whole = encode_one(characters, ("q", "response"))
    config = DataConfig(dataset="x", max_length=len(whole.input_ids) - 4)
    encoded = Encoder(config, characters, "pair").encode([("f:1", ("q", "response"), {}), ("f:2", ("q", "r"), {})])
    assert encoded.truncated == 1
    assert list(encoded.examples[0].input_ids) == list(whole.input_ids[:-4])
    assert list(encoded.examples[0].labels) == list(whole.labels[:-4])
    assert encoded.examples[1].input_ids[-1] == characters.eos_token_id


def test_counts_of_dropped_rows(characters: Any) -> None:
    rows = [("f:1", ("q", "r"), {}), ("f:2", ("q" * 50, "r"), {}), ("f:3", ("q" * 90, "r"), {})]
    limit = len(encode_one(characters, ("q" * 50, "r")).input_ids)
    drop = Encoder(DataConfig(dataset="x", max_length=limit, over_length="drop"), characters, "pair").encode(rows)
    assert (len(drop.examples), drop.dropped_over_length, drop.dropped_unsupervised, drop.truncated) == (
        2,
        1,
        0,
        0,
    )
    cut = Encoder(DataConfig(dataset="x", max_length=limit), characters, "pair").encode(rows)
    assert (len(cut.examples), cut.dropped_over_length, cut.dropped_unsupervised, cut.truncated) == (
        2,
        0,
        1,
        1,
    )


def test_first_token_alone_is_no_target() -> None:
    encoder = Encoder(DataConfig(dataset="x"), None, "tokens")
    encoded = encoder.encode([("f:1", ([5], None), {}), ("f:2", ([5, 6], [5, -100]), {}), ("f:3", ([5, 6], None), {})])
    assert (len(encoded.examples), encoded.dropped_unsupervised) == (1, 2)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (([1, 2], [1]), "2 input_ids but 1 labels"),
        (([1, 2.5], None), "must be a list of integers"),
        (([1, True], None), "must be a list of integers"),
        (([1, None], None), "must be a list of integers"),
        (([1, 2], "ab"), "labels must be a list"),
        (([1, -2], None), r"holds -2; token ids must be in \[0"),
        (([1, 2], [-1, 2]), "labels holds -1"),
        (([1, 103], None), r"holds 103; token ids must be in \[0, 102\]"),
        (([1, 1 << 40], None), "32 bits"),
    ],
)
def test_ready_tokens_are_checked(characters: Any, parts: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"f:1: .*{message}"):
        encode_one(characters, parts, kind="tokens")


def test_chat_rows_supervise_the_assistants_turns(characters: Any) -> None:
    characters.chat_template = CHATML
    expected = [
        (False, "<|user|>hi\n<|assistant|>"),
        (True, "ho\n"),
        (False, "<|user|>again\n<|assistant|>"),
        (True, "no\n"),
    ]
    assert pieces(characters, encode_one(characters, TURNS, "messages", template="chat")) == expected
    characters.chat_template = MARKED
    assert pieces(characters, encode_one(characters, TURNS, "messages", template="chat")) == expected
    characters.chat_template = CHATML
    pair = encode_one(characters, ("hi", "ho"), template="chat")
    assert pieces(characters, pair) == expected[:2]
    everything = encode_one(characters, TURNS, "messages", template="chat", supervise="all")
    assert [with_loss for with_loss, _ in pieces(characters, everything)] == [True]


def test_both_ways_of_finding_turns_agree_on_bpe(bpe: Any) -> None:
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), SENTENCES, strict=False)]
    found = []
    for template in (CHATML, MARKED):
        bpe.chat_template = template
        found.append(encode_one(bpe, messages * 2, "messages", template="chat"))
    bpe.chat_template = None
    assert list(found[0].input_ids) == list(found[1].input_ids)
    assert list(found[0].labels) == list(found[1].labels)


def test_template_that_rewrites_earlier_turns_is_refused(characters: Any) -> None:
    characters.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] if loop.last else '...' }}\n{% endfor %}"
    )
    with pytest.raises(UserError, match=r"f:1: .*changes earlier turns around message 1.*supervise: all"):
        encode_one(characters, TURNS, "messages", template="chat")
    characters.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"f:1: .*refuses this conversation: roles must alternate"):
        encode_one(characters, TURNS, "messages", template="chat")


def test_messages_in_alpaca_must_be_one_pair(characters: Any) -> None:
    assert list(encode_one(characters, TURNS[:2], "messages").input_ids) == list(
        encode_one(characters, ("hi", "ho")).input_ids
    )
    with pytest.raises(UserError, match=r"f:1: .*use data.template: chat"):
        encode_one(characters, TURNS, "messages")
    with pytest.raises(UserError, match="no chat template"):
        encode_one(characters, TURNS, "messages", template="chat")


def test_truncation_left_on_the_tokenizer_does_not_matter(bpe: Any) -> None:
    expected = list(encode_one(bpe, ("q", "r")).input_ids)
    bpe("some text of many words", truncation=True, max_length=3)
    assert list(encode_one(bpe, ("q", "r")).input_ids) == expected
