# ruff: noqa: E501
"""A tiny chat model of Qwen2's type with Qwen2.5's chat template, and other families' templates."""

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from agcl.model import models

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
QWEN = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' }}{GEN}{{- message.content + '<|im_end|>' }}{END}{{- '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n' }}{GEN}{{- '<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}{END}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
QWEN_PLAIN = QWEN.replace("{GEN}", "").replace("{END}", "")
"""Qwen2.5-Instruct's."""
QWEN_MASKED = (
    QWEN.replace(
        "{GEN}{{- message.content + '<|im_end|>' }}{END}",
        "{%- if message.role == 'assistant' %}{% generation %}{{- message.content + '<|im_end|>' }}"
        "{% endgeneration %}{%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}",
    )
    .replace("{GEN}", "{% generation %}")
    .replace("{END}", "{% endgeneration %}")
)
"""The same text, with a generation mask."""
QWEN3_LIKE = r"""{%- for m in messages %}
{%- if m.role == 'assistant' and not loop.last %}{%- set said = m.content.split('</think>')[-1].lstrip('\n') %}
{%- else %}{%- set said = m.content %}{%- endif %}
{{- '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
"""Leaves out what earlier turns thought."""
QWEN3_EMPTY_THOUGHT = QWEN3_LIKE.replace(
    "{%- else %}{%- set said = m.content %}",
    "{%- elif m.role == 'assistant' %}{%- set said = '<think>\n\n</think>\n\n' + m.content %}"
    "{%- else %}{%- set said = m.content %}",
)
"""Writes an empty thought before the last answer, which generation prompts lack."""
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where does Bako live?"},
    {"role": "assistant", "content": "In Rome."},
    {"role": "user", "content": "Since when?"},
    {"role": "assistant", "content": "\n\nSince 2019.\n"},
    {"role": "user", "content": "And Žofie 🦔?"},
    {"role": "assistant", "content": "In München."},
]
"""Three turns; one starts and ends with line ends, which tokens may merge with the template's."""
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALLS = [
    {"role": "user", "content": "What is 2 and 3?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
        ],
    },
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "It is 5."},
]


def tokenizer(template=QWEN_PLAIN, eos=END):
    """Byte-level as Qwen's, with its special tokens and its way to split words."""
    bpe = Tokenizer(tokenizer_models.BPE())
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{m['content']} assistant\n\n\n user\n system\n" for m in MESSAGES] * 3
    bpe.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, pad_token=END_OF_TEXT)
    made.add_special_tokens({"additional_special_tokens": [START, END]})
    made.chat_template = template
    return made


def model(vocabulary, *, seed=0, **sizes):
    """About 50,000 weights."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        **{
            "vocab_size": vocabulary,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.1,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 0,
            **sizes,
        }
    )
    return Qwen2ForCausalLM(config)


def folder(place, *, template=QWEN_PLAIN, eos=END):
    """The tiny model and its tokenizer as a user's folder."""
    made = tokenizer(template, eos)
    models.save(model(len(made)), made, place)
    return place
