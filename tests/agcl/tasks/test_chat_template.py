"""Conversations by chat templates: which tokens carry loss, where turns end, what is refused."""

import pytest
from reference import chat

from agcl.errors import InputError
from agcl.tasks import Row, encode, messages
from agcl.tasks.chat_template import can_teach, template_of, turns
from agcl.tasks.encoding import encoded_rows

GEMMA = (
    "{{ '<bos>' }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DEEPSEEK_R1 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
ALWAYS_PROMPTS = LLAMA3.replace("{% if add_generation_prompt %}", "").replace("{% endif %}", "")
MASK_ON_WORDS = chat.QWEN_MASKED.replace(
    "{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}",
    "{% generation %}{{- message.content }}{% endgeneration %}{{- '<|im_end|>' }}",
)
MASK_WITH_HEADER = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def row_of(conversation, tools=None, **options):
    return messages.row_of(conversation, tools, "chat.jsonl, line 3", **options)


def encoded(tokenizer, conversation, tools=None, **options):
    [row] = encoded_rows(encode(tokenizer, [row_of(conversation, tools, **options)]))
    return row


def learned(tokenizer, row):
    return [tokenizer.decode(row.input_ids[a:b]) for a, b in row.spans]


def test_the_loss_is_on_assistant_turns_up_to_their_end_tokens():
    tokenizer = chat.tokenizer()
    row = encoded(tokenizer, chat.MESSAGES)
    # A token that joins the header's line end with an earlier turn's own carries no loss.
    said = ["In Rome.<|im_end|>", "Since 2019.\n<|im_end|>", "In München.<|im_end|>"]
    assert learned(tokenizer, row) == said
    text = tokenizer.apply_chat_template(chat.MESSAGES, tokenize=False)
    assert tokenizer.decode(row.input_ids) + "\n" == text


@pytest.mark.parametrize("last", [3, 5, 7])
def test_the_prompt_has_the_tokens_of_generation(last):
    tokenizer = chat.tokenizer()
    row = encoded(tokenizer, chat.MESSAGES[:last])
    asked = tokenizer.apply_chat_template(chat.MESSAGES[: last - 1], add_generation_prompt=True)
    assert row.input_ids[: row.prompt_tokens] == asked["input_ids"]
    answer = chat.MESSAGES[last - 1]["content"] + "<|im_end|>"
    assert tokenizer.decode(row.input_ids[row.prompt_tokens :]) == answer


@pytest.mark.parametrize(
    ("conversation", "tools"),
    [(chat.MESSAGES, None), (chat.MESSAGES[1:], None), (chat.CALLS, chat.TOOLS)],
)
def test_generation_mask_and_rendered_prefixes_agree(conversation, tools):
    plain, masked = (
        encoded(chat.tokenizer(template), conversation, tools)
        for template in (chat.QWEN_PLAIN, chat.QWEN_MASKED)
    )
    assert plain == masked
    assert len(plain.earlier) == sum(m["role"] == "assistant" for m in conversation) - 1


def test_the_spans_are_those_of_transformers_own_mask():
    tokenizer = chat.tokenizer(chat.QWEN_MASKED)
    conversation = [m | {"content": m["content"].strip()} for m in chat.MESSAGES]
    row = encoded(tokenizer, conversation)
    theirs = tokenizer.apply_chat_template(
        conversation, return_assistant_tokens_mask=True, return_dict=True
    )
    places = [i for i, counts in enumerate(theirs["assistant_masks"]) if counts]
    assert places == [i for a, b in row.spans for i in range(a, b)]
    assert theirs["input_ids"][:-1] == row.input_ids


@pytest.mark.parametrize("template", [MASK_ON_WORDS, MASK_WITH_HEADER])
def test_a_mask_without_the_end_token_or_with_the_header_gives_the_same_turns(template):
    row = encoded(chat.tokenizer(template), chat.MESSAGES)
    text = chat.tokenizer(template)
    assert learned(text, row)[0] == "In Rome.<|im_end|>"
    assert learned(text, row)[2] == "In München.<|im_end|>"


@pytest.mark.parametrize(
    ("template", "added", "ends", "answer"),
    [
        (GEMMA, ["<bos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", "In Rome."),
        (LLAMA2, ["<s>", "</s>"], "</s>", " In Rome. "),
        (LLAMA3, ["<|head|>", "<|/head|>", "<|eot_id|>"], "<|eot_id|>", "In Rome."),
        (ALWAYS_PROMPTS, ["<|head|>", "<|/head|>", "<|eot_id|>"], "<|eot_id|>", "In Rome."),
        (PHI3, ["<|user|>", "<|assistant|>", "<|end|>"], "<|end|>", "In Rome."),
        (NO_END, [], chat.END_OF_TEXT, "In Rome."),
    ],
)
def test_a_turn_ends_as_its_template_ends_it(template, added, ends, answer):
    tokenizer = chat.tokenizer(template, eos=chat.END_OF_TEXT)
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    row = encoded(tokenizer, chat.MESSAGES[1:3])
    assert learned(tokenizer, row) == [answer + ends]
    assert row.input_ids[-1] == tokenizer.convert_tokens_to_ids(ends)
    several = turns(template_of(tokenizer), row_of(chat.MESSAGES[1:3]).conversation)
    assert (several.answer, several.end) == (answer, "" if template == NO_END else ends)
    if template != ALWAYS_PROMPTS:
        said = learned(tokenizer, encoded(tokenizer, chat.MESSAGES[1:]))
        # Without an end token, a line end behind the words may share a token with them.
        assert said[0].rstrip("\n") == answer + ("" if template == NO_END else ends)


def test_a_template_whose_generation_prompt_starts_otherwise_is_refused():
    tokenizer = chat.tokenizer(DEEPSEEK_R1)
    assert not can_teach(tokenizer)
    assert can_teach(chat.tokenizer())
    assert not can_teach(chat.tokenizer(None))
    with pytest.raises(InputError) as error:
        encoded(tokenizer, chat.MESSAGES[:3])
    said = (
        "before message 3 differently once that follows ('<think>\\n' becomes 'In Rome.<|im_end|>')"
    )
    assert said in str(error.value)
    assert "one assistant turn" not in str(error.value)  # It has one.


def test_prompt_and_answer_are_a_users_message_and_the_assistants():
    """`chat_template: true`."""
    tokenizer = chat.tokenizer()
    [row] = encoded_rows(encode(tokenizer, [Row("Where?", " In Rome.")], chat=True))
    asked, said = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "In Rome."},
    ]
    assert row == encoded(tokenizer, [asked, said])
    assert row.input_ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_turns_of_the_context_carry_no_loss():
    for template in (chat.QWEN_PLAIN, chat.QWEN_MASKED):
        tokenizer = chat.tokenizer(template)
        row = encoded(tokenizer, chat.MESSAGES, context=4)
        assert learned(tokenizer, row) == ["Since 2019.\n<|im_end|>", "In München.<|im_end|>"]


@pytest.mark.parametrize("template", [chat.QWEN_PLAIN, chat.QWEN_MASKED, MASK_WITH_HEADER])
@pytest.mark.parametrize("skipped", [2, 4])
def test_turns_of_weight_0_carry_no_loss(template, skipped):
    """OpenAI's: such an answer is shown, and not learned."""
    tokenizer = chat.tokenizer(template)
    talk = [dict(message) for message in chat.MESSAGES]
    every = encoded(tokenizer, talk)
    talk[skipped]["weight"], talk[-1]["weight"] = 0, 1
    some = encoded(tokenizer, talk)
    assert some.input_ids == every.input_ids
    assert some.spans == [span for n, span in enumerate(every.spans) if n != skipped // 2 - 1]


def test_messages_behind_the_last_answer_are_left_out():
    tokenizer = chat.tokenizer()
    assert encoded(tokenizer, chat.MESSAGES[:-1]) == encoded(tokenizer, chat.MESSAGES[:5])


def test_a_template_that_changes_earlier_turns_is_refused_for_several_turns():
    tokenizer = chat.tokenizer(chat.QWEN3_LIKE)
    thinking = [m | {"content": f"<think>\nHm.\n</think>\n{m['content']}"} if i % 2 == 0 else m
                for i, m in enumerate(chat.MESSAGES[1:], start=1)]  # fmt: skip
    tokenizer.name_or_path = "models/thinker"
    with pytest.raises(InputError) as error:
        encoded(tokenizer, thinking)
    assert str(error.value).startswith(
        "chat.jsonl, line 3: the chat template of models/thinker renders the messages before"
    )
    one = encoded(tokenizer, thinking[:2])
    assert learned(tokenizer, one) == ["<think>\nHm.\n</think>\nIn Rome.<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template"),
        (GEMMA, "line 3: the chat template of x cannot render the messages: System role not supp"),
        ("{{ messages[0].content }}", "line 3: the chat template of x does not render the ass"),
        (
            "{{ messages | length }}",
            "line 3: the chat template of x renders the messages before",
        ),
        ("{{ messages[0", "line 3: the chat template of x cannot render the messages: unexpected"),
    ],
)
def test_a_template_that_cannot_render_a_row_is_named_with_the_row(template, said):
    tokenizer = chat.tokenizer(template)
    tokenizer.name_or_path = "x"
    with pytest.raises(InputError) as error:
        encoded(tokenizer, chat.MESSAGES)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def chat_ml(rendered):
    return (
        "{% for m in messages %}{% if RENDERED %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ).replace("RENDERED", rendered)


@pytest.mark.parametrize(
    ("talk", "said"),
    [
        (chat.CALLS, "leaves out tool_calls"),
        (chat.CALLS[:2], "leaves out tool_calls"),
        ([*chat.MESSAGES[1:3], *chat.CALLS[2:]], "leaves out messages of the role tool"),
    ],
)
def test_a_template_that_leaves_out_calls_or_answers_of_tools_is_refused(talk, said):
    """As Phi-3's does both, SmolLM2's and Llama 3's the calls: an empty turn is in their place."""
    template = chat_ml("m.role != 'tool'" if "role tool" in said else "true")
    row = messages.row_of(talk, None, "f, line 3")
    with pytest.raises(InputError, match=f"^f, line 3: the chat template of .* {said}$"):
        encode(chat.tokenizer(template), [row])
    encode(chat.tokenizer(), [row])


def test_a_template_that_leaves_out_the_tools_is_refused_also_without_calls():
    row = messages.row_of(chat.MESSAGES, chat.TOOLS, "f, line 3")
    with pytest.raises(InputError, match=r"^f, line 3: .* leaves out the tools$"):
        encode(chat.tokenizer(chat_ml("true")), [row])
    encode(chat.tokenizer(), [row])


def test_a_template_that_leaves_out_reasoning_is_refused_unless_only_in_earlier_turns():
    asked, said = chat.MESSAGES[1], {**chat.MESSAGES[2], "reasoning_content": "A city."}
    row = messages.row_of([asked, said], None, "f, line 3")
    with pytest.raises(InputError, match=r"^f, line 3: .* leaves out reasoning_content$"):
        encode(chat.tokenizer(), [row])
    last = "m.role == 'assistant' and m.reasoning_content and loop.last"
    thought = (
        f"{{% if {last} %}}{{{{ '<think>' + m.reasoning_content + '</think>' }}}}{{% endif %}}"
    )
    template = LLAMA3.replace(" + m.content +", f" }}}}{thought}{{{{ m.content +")
    [row] = encoded_rows(encode(chat.tokenizer(template), [row]))
    assert row.loss_tokens
    talk = [asked, said, *chat.MESSAGES[3:5]]
    row = messages.row_of(talk, None, "f, line 3", context=3)
    encode(chat.tokenizer(template), [row])


def test_a_template_that_insists_on_calls_or_on_their_answers_renders_them():
    """Without them it raises an error, which says that it does not leave them out."""
    template = chat_ml("true").replace(
        "{% if true %}",
        "{% if m.role == 'tool' and (m.content != '5' or not messages[1].tool_calls) %}"
        "{{ raise_exception('no call') }}{% endif %}{% if true %}",
    )
    row = encoded(chat.tokenizer(template), chat.CALLS)
    assert len(row.spans) == 2


def test_a_mask_that_starts_inside_the_header_has_no_loss_on_the_header():
    """TRL's qwen2_5_training.jinja marks the line end behind the role, too."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ '\n' + m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ '\n' + m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = chat.tokenizer(template)
    talk = [m | {"content": m["content"].strip()} for m in chat.MESSAGES]
    assert learned(tokenizer, encoded(tokenizer, talk)) == [
        "In Rome.<|im_end|>",
        "Since 2019.<|im_end|>",
        "In München.<|im_end|>",
    ]
