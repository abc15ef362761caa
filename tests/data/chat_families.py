"""What chat templates do, as small templates made for these tests, and the templates of models that TRL ships.

Each template here does one thing that published templates do, in as few words as possible: none is a copy of one.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tiny_data import byte_level_bpe
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

_SPECIAL = re.compile(r"<[|｜]?/?[\w▁:/.-]{2,40}[|｜]?>|\[/?[A-Z_]{3,}\]|<turn\|>|<\|turn>")
_TOOLS = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
_CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
_ASKS = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
_TURNS = f"{{% for m in messages %}}<|{{{{ m.role }}}}|>\n{{{{ m.content or '' }}}}{_CALLS}<|end|>\n{{% endfor %}}"
_ANSWER = "(m.content or '').split('</think>')[-1].lstrip('\n')"
_THOUGHT = "(m.reasoning_content or '')"


class Family(NamedTuple):
    """A template, what it does, and the models whose templates do so. ``end`` is the tokenizer's eos token."""

    name: str
    models: str
    template: str
    end: str = "<|end|>"
    variables: Mapping[str, Any] = {}


def _history(earlier: str, last: str, asks: str) -> str:
    """A template that writes the assistant's turns behind the last question as ``last``, the others as ``earlier``."""
    return (
        f"{_TOOLS}{{% set n = namespace(at=-1) %}}{{% for m in messages %}}{{% if m.role == 'user' %}}"
        "{% set n.at = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<|{{ m.role }}|>\n"
        f"{{% if m.role != 'assistant' %}}{{{{ m.content }}}}{{% elif loop.index0 > n.at %}}{last}{_CALLS}{{% else %}}"
        f"{earlier}{_CALLS}{{% endif %}}<|end|>\n{{% endfor %}}{{% if add_generation_prompt %}}<|assistant|>\n{asks}"
        "{% endif %}"
    )


_WITHOUT = f"{{{{ {_ANSWER} }}}}"
_BLOCK = f"<think>\n{{{{ {_THOUGHT} }}}}\n</think>\n\n{_WITHOUT}"
_WITH = f"{{% if m.reasoning_content %}}{_BLOCK}{{% else %}}{{{{ m.content or '' }}}}{{% endif %}}"

FAMILIES = [
    Family(
        "turns between a header and an end token, nothing rewritten",
        "Llama 4, Hermes 2 and 3, OLMo 2, Falcon 3, Granite 3, Phi-4, SmolLM2, Kimi K2, Yi",
        f"{_TOOLS}{_TURNS}{_ASKS}",
    ),
    Family(
        "a default system message with today's date",
        "Llama 3.1 to 3.3, Granite 3, Mistral Small 3, SmolLM3",
        "{% if messages[0].role != 'system' %}<|system|>\nToday is {{ strftime_now('%d %b %Y') }}<|end|>\n{% endif %}"
        f"{_TOOLS}{_TURNS}{_ASKS}",
    ),
    Family(
        "earlier turns lose their thoughts, the last one has a thought, perhaps an empty one",
        "Qwen3 and Qwen3-Thinking, GLM-4.5 and later",
        _history(_WITHOUT, _BLOCK, ""),
    ),
    Family(
        "earlier turns lose their thoughts, the prompt opens one, the turns have those of the row",
        "Qwen3.5, MiniMax M2, Nemotron 3, Kimi K2 Thinking",
        _history(_WITHOUT, _WITH, "<think>\n"),
    ),
    Family(
        "all turns lose their thoughts, and the prompt opens one",
        "DeepSeek-R1 and its distillates, QwQ",
        _history(_WITHOUT, _WITHOUT, "<think>\n"),
    ),
    Family(
        "the prompt opens a thought, and each turn begins with the end of one",
        "DeepSeek-V3.1",
        _history(f"</think>{_WITHOUT}", f"</think>{_WITHOUT}", "{{ '<think>' if thinking else '</think>' }}"),
        variables={"thinking": True},
    ),
    Family(
        "without thinking the prompt has an empty thought, and the turns have none",
        "Nemotron Nano 2, Hunyuan, Seed-OSS",
        _history(_WITHOUT, _WITH, "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"),
        variables={"enable_thinking": False},
    ),
    Family(
        "the last turn has another end token than earlier ones",
        "gpt-oss",
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}"
        f"{{{{ {_THOUGHT} }}}}<|channel|>{{{{ m.content or '' }}}}{_CALLS}<|return|>{{% else %}}"
        f"{{{{ m.content or '' }}}}{_CALLS}<|end|>{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        end="<|return|>",
    ),
    Family(
        "a token that ends the text follows the last turn",
        "Phi-3, Phi-3.5, Phi-4-mini, Zephyr",
        f"{_TOOLS}{_TURNS}{{% if add_generation_prompt %}}<|assistant|>\n{{% else %}}<|endoftext|>{{% endif %}}",
        end="<|endoftext|>",
    ),
    Family(
        "tools stand before the last question, and no header asks for an answer",
        "Mistral 7B v0.3, Mistral Nemo, Mistral Small",
        "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ m.content or '' }}" + _CALLS + "</s>{% else %}"
        "{% if tools and m == asked[-1] %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
        "[INST]{{ m.content }}[/INST]{% endif %}"
        "{% endfor %}",
        end="</s>",
    ),
    Family(
        "the system message stands in the last message, if that is a question",
        "Mistral 7B v0.3, Mistral Large 2407",
        "{% set s = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages if m.role != "
        "'system' %}{% if m.role == 'assistant' %} {{ m.content or '' }}" + _CALLS + "</s>{% else %}[INST] "
        "{{ s ~ '\n\n' if s and loop.last }}{{ m.content }}[/INST]{% endif %}{% endfor %}",
        end="</s>",
    ),
    Family(
        "generation marks stand around the header as well",
        "SmolLM3",
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|assistant|>\n<think>\n\n</think>\n\n"
        "{{ m.content or '' }}" + _CALLS + "<|end|>\n{% endgeneration %}{% else %}<|{{ m.role }}|>\n"
        "{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n<think>\n\n</think>\n\n{% endif %}",
    ),
    Family(
        "generation marks stand around the words alone",
        "many templates that were written for training",
        "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content or '' }}"
        + _CALLS + "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}" + _ASKS,
    ),
    Family(
        "no system message, and questions and answers alternate",
        "Gemma 1 and 2, Mistral 7B v0.1",
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant, without a system message') }}{% endif %}"
        "<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n{% endfor %}" + _ASKS,
    ),
    Family(
        "no token ends a turn",
        "GLM-4, GLM-4.5 and later",
        f"{_TOOLS}{{% for m in messages %}}<|{{{{ m.role }}}}|>\n{{{{ m.content or '' }}}}{_CALLS}{{% endfor %}}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        end="<|user|>",
    ),
    Family(
        "the prompt ends with a space that the tokenizer joins with the answer",
        "Vicuna and other plain-text templates",
        "{% for m in messages %}{{ m.role | upper }}: {{ m.content or '' }}" + _CALLS + "</s>{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}",
        end="</s>",
    ),
]  # fmt: skip

REAL = {
    "cohere": ("Command R", "<|END_OF_TURN_TOKEN|>"),
    "cohere2": ("Command R7B", "<|END_OF_TURN_TOKEN|>"),
    "deepseek_r1_distill": ("DeepSeek-R1 distillates", "<｜end▁of▁sentence｜>"),
    "deepseekv3": ("DeepSeek-V3", "<｜end▁of▁sentence｜>"),
    "gemma": ("Gemma 2", "<end_of_turn>"),
    "gemma3": ("Gemma 3", "<end_of_turn>"),
    "gemma4": ("Gemma 4", "<turn|>"),
    "glm4moe": ("GLM-4.5", "<|user|>"),
    "gptoss": ("gpt-oss", "<|return|>"),
    "lfm2": ("LFM2", "<|im_end|>"),
    "lfm2_2_5": ("LFM2.5", "<|im_end|>"),
    "llama3": ("Llama 3", "<|eot_id|>"),
    "llama3_1": ("Llama 3.1", "<|eot_id|>"),
    "llama3_2": ("Llama 3.2", "<|eot_id|>"),
    "nemotron_3_nano": ("Nemotron 3 Nano", "<|im_end|>"),
    "nemotron_3_ultra": ("Nemotron 3 Ultra", "<|im_end|>"),
    "phi3": ("Phi-3", "<|endoftext|>"),
    "phi3_5": ("Phi-3.5", "<|endoftext|>"),
    "qwen2_5": ("Qwen2.5", "<|im_end|>"),
    "qwen3": ("Qwen3", "<|im_end|>"),
    "qwen3_instruct_2507": ("Qwen3-Instruct-2507", "<|im_end|>"),
    "qwen3_5_think": ("Qwen3.5 (thinking)", "<|im_end|>"),
    "qwen3_5_nothink": ("Qwen3.5 (not thinking)", "<|im_end|>"),
    "qwen3_6": ("Qwen3.6", "<|im_end|>"),
}
"""Files of ``trl/chat_templates``, the models that they belong to, and the eos token."""


@cache
def real_families() -> list[Family]:
    """The templates of models that the installed TRL ships; none without TRL."""
    found = importlib.util.find_spec("trl")
    folder = Path(str(found.origin)).parent / "chat_templates" if found else Path("-")
    paths = {name: folder / f"{name}.jinja" for name in REAL}
    return [
        Family(REAL[name][0], REAL[name][0], path.read_text("utf-8"), REAL[name][1])
        for name, path in paths.items()
        if path.is_file()
    ]


@cache
def _backend() -> str:
    return str(byte_level_bpe().backend_tokenizer.to_str())


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    """A small byte-level BPE with the family's special tokens and its template."""
    names = sorted({*_SPECIAL.findall(family.template), family.end, "<think>", "</think>"} - {"<s>", "</s>"})
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_backend()), bos_token="<s>", eos_token="</s>")
    made.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    made.eos_token, made.chat_template = family.end, family.template
    return made


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


_TOOL = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": "High tide",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "Place"}}},
    },
}
_CALL = {"type": "function", "id": "call12345", "function": {"name": "tide", "arguments": {"at": "Kiel"}}}
_RESULT = {"role": "tool", "name": "tide", "tool_call_id": "call12345", "content": "at 12"}

CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one turn": ([_user("How many clips?"), _assistant("She sold 72 clips.")], {}),
    "several turns": (
        [_user("How many?"), _assistant("She sold 72."), _user("And then?"), _assistant(" 24 + 24 = 48\n")],
        {},
    ),
    "with a system message": (
        [
            {"role": "system", "content": "Be brief."},
            *(_user("How many?"), _assistant("72."), _user("Why?"), _assistant("So.")),
        ],
        {},
    ),
    "reasoning": (
        [
            _user("How many?"),
            _assistant("72.", reasoning_content="48 + 24."),
            _user("And then?"),
            _assistant("96.", reasoning_content="72 + 24."),
        ],
        {},
    ),
    "tool calls": (
        [
            _user("High tide?"),
            _assistant("", tool_calls=[_CALL]),
            _RESULT,
            _assistant("At 12."),
            _user("Thanks"),
            _assistant("Yes."),
        ],
        {"tools": [_TOOL]},
    ),
}  # fmt: skip
