"""Chat templates like those of public models, and a tokenizer with all their control tokens."""

import functools
import json
from pathlib import Path

INST = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set preface = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set preface = '' %}{% set turns = messages %}{% endif %}"
    "{% for turn in turns %}{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles have to take turns') }}{% endif %}{% if turn['role'] == 'user' %}"
    "{{ '[INST] ' + (preface if loop.first else '') + turn['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + turn['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}\n"
    "{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>' }}\n"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
THINKS = """{%- if tools %}
    {{- '<|im_start|>system\\nYou may call:\\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set seen = namespace(question=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set seen.question = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set thought = message.reasoning_content
            if message.reasoning_content is string else '' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > seen.question %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
        {{- '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
HEADERS = (
    "{{- bos_token }}{%- for message in messages %}"
    "{%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}{%- continue %}"
    "{%- endif %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
TURNS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{% set who = 'model' %}"
    "{% else %}{% set who = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + who + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
TAGGED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

FAMILIES = {"inst": INST, "chatml": CHATML, "thinks": THINKS, "headers": HEADERS, "turns": TURNS}
"""Templates like those of Llama-2 and Mistral, Qwen2, Qwen3, Llama-3, Gemma."""
CONTROLS = (
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
)
LINES = [
    "say hi",
    "name a pet",
    "two plus two is four",
    "the assistant answers the user",
    "a dog and a cat",
    "system model tool\n\n",
]


def as_written(family: str, message: dict, is_after_question: bool = True) -> str:
    """Return the text that a model of a family writes for an answer, copied from its template."""
    content = message.get("content") or ""
    if family == "inst":
        return f" {content}</s>"
    if family == "thinks":
        thought = (
            f"<think>\n{message.get('reasoning_content', '')}\n</think>\n\n"
            if is_after_question
            else ""
        )
        calls = "".join(
            f'<tool_call>\n{{"name": "{one["function"]["name"]}", '
            f'"arguments": {json.dumps(one["function"]["arguments"])}}}\n</tool_call>'
            for one in message.get("tool_calls", [])
        )
        return f"{thought}{content}{calls}<|im_end|>"
    return (
        content
        + {
            "chatml": "<|im_end|>",
            "headers": "<|eot_id|>",
            "turns": "<end_of_turn>",
            "tagged": "<|im_end|>",
        }[family]
    )


WORD_PATTERN = r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""The words of newer tokenizers: line breaks end a word.

In GPT-2's pattern the last of several line breaks belongs to the next word.
"""


@functools.cache
def _made(like_gpt2: bool) -> str:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if not like_gpt2:
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    made.train_from_iterator(
        LINES * 4,
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=[AddedToken(word, special=True) for word in CONTROLS],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    made.add_tokens(
        [
            AddedToken(word, special=False, normalized=False)
            for word in ("<think>", "</think>", "<tool_call>", "</tool_call>")
        ]
    )
    return made.to_str()


def write_fast_tokenizer(
    directory: Path, template: str | None = None, like_gpt2: bool = False, **settings
) -> Path:
    """Write a byte-level tokenizer.json and its template, if any; return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(_made(like_gpt2), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        **settings,
    }
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory
