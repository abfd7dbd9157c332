import json
from typing import Any

import pytest
from datasets import Dataset, Features, List, Value, concatenate_datasets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import qwen2_5_chat_template

from distillkit.config.errors import UserError
from distillkit.data.rows import RowFormat, tokenize_rows
from tests.smollm2 import needs_smollm2, smollm2_tokenizer

CHAT = [{"role": "user", "content": "time?"}, {"role": "assistant", "content": "relative"}]
RENDERED = "<|im_start|>user\ntime?<|im_end|>\n<|im_start|>assistant\nrelative<|im_end|>\n"


def tokenize(
    columns: dict[str, list[Any]], tokenizer: PreTrainedTokenizerFast, **row_format: Any
) -> list[dict[str, Any]]:
    rows = Dataset.from_dict(columns)
    return tokenize_rows(rows, tokenizer, RowFormat(**row_format), num_proc=None, key="dataset.train_dataset").to_list()


def error(columns: dict[str, list[Any]], tokenizer: PreTrainedTokenizerFast, **row_format: Any) -> str:
    with pytest.raises(UserError) as caught:
        tokenize(columns, tokenizer, **row_format)
    return str(caught.value)


def plain(document: dict[str, Any]) -> list[int]:
    """The tokens of a document all of whose tokens count."""
    assert document["labels"] == document["input_ids"]
    return document["input_ids"]


def copied(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> PreTrainedTokenizerFast:
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=backend, **changes)


def test_a_text_ends_with_one_eos(tiny_tokenizer):
    eos = tiny_tokenizer.eos_token_id
    open_ended, closed = tokenize({"text": ["the theory", "the theory<|endoftext|>"]}, tiny_tokenizer)
    assert plain(open_ended) == [*tiny_tokenizer("the theory").input_ids, eos]
    assert plain(closed) == plain(open_ended)


def test_special_tokens_of_the_tokenizer_are_kept_and_eos_not_doubled(tiny_tokenizer):
    tokenizer = copied(tiny_tokenizer, eos_token="<|endoftext|>", bos_token="<|im_start|>")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    special = [("<|im_start|>", bos), ("<|endoftext|>", eos)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A <|endoftext|>", None, special)
    (document,) = tokenize({"text": ["time"]}, tokenizer)
    assert plain(document) == [bos, *tokenizer("time", add_special_tokens=False).input_ids, eos]


def test_empty_texts_are_left_out(tiny_tokenizer):
    assert len(tokenize({"text": ["", "time", None]}, tiny_tokenizer)) == 1


def test_a_text_column_of_another_name(tiny_tokenizer):
    (document,) = tokenize({"content": ["time"], "text": ["other"]}, tiny_tokenizer, text_field="content")
    assert tiny_tokenizer.decode(document["input_ids"]) == "time<|endoftext|>"


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": [CHAT]},
        {"conversations": [[{"from": "human", "value": "time?"}, {"from": "gpt", "value": "relative"}]]},
        {"conversations": [CHAT]},
        {"messages": [CHAT], "prompt": ["time?"], "source": ["a column that plays no part"]},
    ],
)
def test_conversations_are_rendered_by_the_chat_template(tiny_tokenizer, columns):
    (document,) = tokenize(columns, tiny_tokenizer)
    assert plain(document) == tiny_tokenizer(RENDERED, add_special_tokens=False).input_ids
    assert plain(document) == tiny_tokenizer.apply_chat_template(CHAT).input_ids


def test_fields_that_only_other_messages_have_are_not_seen_by_the_template(tiny_tokenizer):
    template = "{% for m in messages %}{{ m.content }}{% if m.name is defined %}({{ m.name }}){% endif %};{% endfor %}"
    tokenizer = copied(tiny_tokenizer, eos_token="<|endoftext|>", chat_template=template)
    named = [{"role": "user", "content": "a", "name": "b"}, {"role": "user", "content": "c"}]
    (document,) = tokenize({"messages": [named]}, tokenizer)
    assert tokenizer.decode(document["input_ids"]) == "a(b);c;"


def test_tools_reach_the_template(tiny_tokenizer):
    template = "{% for tool in tools %}{{ tool.name }};{% endfor %}{{ messages[0].content }}"
    tokenizer = copied(tiny_tokenizer, eos_token="<|endoftext|>", chat_template=template)
    (document,) = tokenize({"messages": [CHAT], "tools": [json.dumps([{"name": "clock"}])]}, tokenizer)
    assert tokenizer.decode(document["input_ids"]) == "clock;time?"


def test_of_prompt_and_completion_only_the_completion_counts(tiny_tokenizer):
    columns = {"prompt": ["the theory of"], "completion": [" relativity"]}
    (document,) = tokenize(columns, tiny_tokenizer)
    prompt = len(tiny_tokenizer("the theory of").input_ids)
    assert tiny_tokenizer.decode(document["input_ids"]) == "the theory of relativity<|endoftext|>"
    assert document["labels"] == [-100] * prompt + document["input_ids"][prompt:]
    (document,) = tokenize(columns, tiny_tokenizer, completion_only_loss=False)
    assert plain(document)


def test_conversational_prompt_and_completion(tiny_tokenizer):
    (document,) = tokenize({"prompt": [CHAT[:1]], "completion": [CHAT[1:]]}, tiny_tokenizer)
    assert tiny_tokenizer.decode(document["input_ids"]) == RENDERED
    counted = [label for label in document["labels"] if label != -100]
    assert tiny_tokenizer.decode(counted) == "relative<|im_end|>\n"


def test_tokens_are_kept_with_their_labels_and_without_padding(tiny_tokenizer):
    columns = {"input_ids": [[5, 6, 7], [8, 9, 3]], "labels": [[5, -100, 7], [8, 9, 3]]}
    assert [row["labels"] for row in tokenize(columns, tiny_tokenizer)] == [[5, -100, 7], [8, 9, 3]]
    padded = tokenize({**columns, "attention_mask": [[1, 1, 1], [1, 1, 0]]}, tiny_tokenizer)
    assert padded[1] == {"input_ids": [8, 9], "labels": [8, 9]}


def read_slowly(row: dict[str, Any], vocabulary: int) -> tuple[dict[str, Any], list[str]]:
    """The document that a row of tokens is, and what is wrong with it."""
    input_ids = row["input_ids"] or []
    labels = row["labels"] or input_ids
    mask = row["attention_mask"]
    faults = []
    for name, ids, lowest in (("input_ids", input_ids, 0), ("labels", labels, -100)):
        for strange in [token for token in ids if not lowest <= token < vocabulary][:1]:
            faults.append(
                f"dataset.train_dataset: {name} holds token {strange}, but the tokenizer has {vocabulary} tokens; "
                "the rows were made with another tokenizer"
            )
    found = f"dataset.train_dataset: a row has {len(input_ids)} input_ids and"
    if len(labels) != len(input_ids):
        faults.append(f"{found} {len(labels)} labels; both must have the same length")
    if mask is not None and len(mask) != len(input_ids):
        faults.append(f"{found} an attention_mask of {len(mask)}")
    seen = [index for index in range(len(input_ids)) if mask is None or mask[index : index + 1] != [0]]
    return {
        name: [ids[index] for index in seen if index < len(ids)]
        for name, ids in (("input_ids", input_ids), ("labels", labels))
    }, faults


@st.composite
def token_rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows of tokens with or without labels and mask; now and then one that does not fit."""
    faulty = draw(st.integers(0, 3)) == 0
    rows = []
    for _ in range(draw(st.integers(1, 12))):
        length = draw(st.integers(0, 6))
        token = st.integers(0, 120 if faulty else 99)

        def entries(entry: st.SearchStrategy[int], length: int = length) -> list[int]:
            size = max(0, length + draw(st.integers(-1, 1))) if faulty else length
            return draw(st.lists(entry, min_size=size, max_size=size))

        rows.append(
            {
                "input_ids": draw(st.lists(token, min_size=length, max_size=length))
                if length
                else draw(st.sampled_from([None, []])),
                "labels": draw(st.sampled_from([None, [], entries(st.just(-100) | token)])),
                "attention_mask": draw(st.sampled_from([None, entries(st.integers(0, 1))])),
            }
        )
    return rows


HUNDRED_TOKENS = Tokenizer(WordLevel({str(index): index for index in range(100)}, "0"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(token_rows(), st.sampled_from(["uint8", "int32", "int64"]), st.sets(st.integers(0, 99), max_size=40), st.data())
def test_tokens_are_read_as_row_by_row(rows, integers, replaced, data):
    types = {"input_ids": integers, "labels": "int64", "attention_mask": data.draw(st.sampled_from(["int8", "bool"]))}
    features = Features({name: List(Value(kind)) for name, kind in types.items()})
    wanted = data.draw(st.permutations(range(len(rows))).map(lambda order: order[: len(rows) // 2 + 1]) | st.none())
    cut = data.draw(st.integers(0, len(rows) - 1))  # lists that start within a buffer, and in several buffers
    table = Dataset.from_list([rows[-1], *rows], features=features).select(range(1, len(rows) + 1))
    table = concatenate_datasets([table.select(range(cut)), table.select(range(cut, len(rows)))])
    if wanted is not None:
        table, rows = table.select(wanted), [rows[index] for index in wanted]

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=HUNDRED_TOKENS, eos_token="3")
    read = [read_slowly(row, 100) for row in rows]
    faults = [fault for _, found in read for fault in found]
    row_format = RowFormat(eos_label_token_ids=tuple(replaced))
    if faults:
        with pytest.raises(UserError) as caught:
            tokenize_rows(table, tokenizer, row_format, num_proc=None, key="dataset.train_dataset")
        assert str(caught.value) in faults
        return
    documents = tokenize_rows(table, tokenizer, row_format, num_proc=None, key="dataset.train_dataset")
    assert documents.to_list() == [
        {**document, "labels": [3 if label in replaced else label for label in document["labels"]]}
        for document, _ in read
        if document["input_ids"]
    ]


def test_rows_without_any_labels_or_mask(tiny_tokenizer):
    columns = {"input_ids": [[5, 6], None, [7]], "labels": [None] * 3, "attention_mask": [None] * 3}
    assert [plain(document) for document in tokenize(columns, tiny_tokenizer)] == [[5, 6], [7]]
    assert tokenize({"input_ids": [None, []]}, tiny_tokenizer) == []
    assert tokenize({"input_ids": [None]}, tiny_tokenizer) == []


def test_numbers_that_are_no_tokens(tiny_tokenizer):
    assert "input_ids holds token nan" in error({"input_ids": [[5, None]]}, tiny_tokenizer)


def test_eos_label_token_ids_change_labels_alone(tiny_tokenizer):
    end, eos = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>"), tiny_tokenizer.eos_token_id
    (document,) = tokenize({"messages": [CHAT]}, tiny_tokenizer, eos_label_token_ids=(end,))
    assert document["input_ids"].count(end) == 2
    assert document["labels"] == [eos if token == end else token for token in document["input_ids"]]


def test_eos_labels_that_do_not_exist_are_refused(tiny_tokenizer):
    size = len(tiny_tokenizer)
    assert error({"text": ["time"]}, tiny_tokenizer, eos_label_token_ids=(3, size)) == (
        f"dataset.eos_label_token_ids[1]: there is no token {size}; the tokenizer's ids are 0 to {size - 1}"
    )


def test_completions_asked_for_where_there_are_none(tiny_tokenizer, caplog):
    (document,) = tokenize({"messages": [CHAT]}, tiny_tokenizer, completion_only_loss=True)
    assert plain(document)
    line = "dataset.train_dataset: has no prompt and completion; dataset.completion_only_loss has no effect on it"
    assert caplog.messages == [line]


def test_columns_that_are_not_understood_are_named(tiny_tokenizer):
    assert error({"question": ["a"], "answer": ["b"]}, tiny_tokenizer) == (
        "dataset.train_dataset: has the columns question, answer; one of these is needed: "
        "input_ids, text, messages, conversations, or prompt and completion"
    )


def test_rows_that_do_not_fit_are_told_in_one_line(tiny_tokenizer):
    assert error({"text": [1]}, tiny_tokenizer).endswith("column 'text' must hold text, got int")
    assert "a conversation does not fit the tokenizer's chat template" in error(
        {"messages": [[{"say": "hi"}]]}, tiny_tokenizer
    )
    assert "the rows were made with another tokenizer" in error({"input_ids": [[5, 70000]]}, tiny_tokenizer)
    assert "2 input_ids and 1 labels" in error({"input_ids": [[5, 6]], "labels": [[5]]}, tiny_tokenizer)


def test_a_tokenizer_that_lacks_what_rows_need(tiny_tokenizer):
    silent = copied(tiny_tokenizer, eos_token="<|endoftext|>")
    assert "the tokenizer has no chat template" in error({"messages": [CHAT]}, silent)
    assert "the tokenizer has no EOS token" in error({"text": ["time"]}, copied(tiny_tokenizer))


TURNS = [
    {"role": "user", "content": "time?"},
    {"role": "assistant", "content": "relative\n"},
    {"role": "user", "content": "和 why?"},
    {"role": "assistant", "content": "the theory,  Ünïcödé 和 12345"},
]
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)


def said(document: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Each stretch of tokens that count, as text."""
    stretches: list[list[int]] = [[]]
    for token, label in zip(document["input_ids"], document["labels"], strict=True):
        assert label in (-100, token)
        stretches = [*stretches, []] if label == -100 else [*stretches[:-1], [*stretches[-1], token]]
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    return copied(tokenizer, eos_token="<|endoftext|>", chat_template=template)


@needs_smollm2
@pytest.mark.parametrize(
    "columns",
    [
        {"messages": [TURNS]},
        {"conversations": [[{"from": "human", "value": "?"}, {"from": "gpt", "value": TURNS[1]["content"]}]]},
        {"messages": [TURNS[1:]]},
        {"messages": [[{"role": "system", "content": "relative\n"}, *TURNS]]},
        {"prompt": [TURNS[:3]], "completion": [TURNS[3:]]},
    ],
)
def test_of_what_smollm2_reads_exactly_the_assistants_turns_count(columns):
    tokenizer = smollm2_tokenizer()
    (document,) = tokenize(columns, tokenizer, assistant_only_loss=True)
    (whole,) = tokenize(columns, tokenizer, completion_only_loss=False)
    assert document["input_ids"] == whole["input_ids"]
    expected = [f"{turn['content']}<|im_end|>" for turn in TURNS if turn["role"] == "assistant"]
    expected = expected[:1] if "conversations" in columns else expected[1:] if "prompt" in columns else expected
    assert said(document, tokenizer) == expected


def test_marks_of_the_chat_template_tell_the_assistants_tokens(tiny_tokenizer):
    marked = with_template(tiny_tokenizer, MARKED)
    (by_marks,) = tokenize({"messages": [TURNS]}, marked, assistant_only_loss=True)
    assert said(by_marks, marked) == ["relative\n<|im_end|>", "the theory,  Ünïcödé 和 12345<|im_end|>"]
    spaced = [*TURNS[:3], {"role": "assistant", "content": " \n "}]
    for turns in (TURNS, spaced):
        (by_marks,) = tokenize({"messages": [turns]}, marked, assistant_only_loss=True)
        (by_turns,) = tokenize({"messages": [turns]}, tiny_tokenizer, assistant_only_loss=True)
        assert by_turns == by_marks


def test_a_template_without_a_generation_prompt_does_not_make_the_header_the_assistants(tiny_tokenizer):
    promptless = with_template(tiny_tokenizer, tiny_tokenizer.chat_template.split("{% if")[0])
    (document,) = tokenize({"messages": [TURNS]}, promptless, assistant_only_loss=True)
    assert said(document, promptless) == ["relative\n<|im_end|>", "the theory,  Ünïcödé 和 12345<|im_end|>"]
    headless = "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    (document,) = tokenize({"messages": [TURNS]}, with_template(tiny_tokenizer, headless), assistant_only_loss=True)
    assert said(document, tiny_tokenizer) == ["relative\n<|im_end|>", "the theory,  Ünïcödé 和 12345<|im_end|>"]


def test_templates_that_trl_knows_get_its_marks_and_see_tools(tiny_tokenizer):
    known = with_template(tiny_tokenizer, qwen2_5_chat_template)
    call = {"function": {"name": "clock", "arguments": {"zone": "moon"}}}
    messages = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [call]}, *TURNS[2:]]
    columns = {"messages": [messages], "tools": [json.dumps([{"name": "a clock"}])]}
    (document,) = tokenize(columns, known, assistant_only_loss=True)
    calling, answer = said(document, known)
    assert '{"name": "clock", "arguments": {"zone": "moon"}}' in calling
    assert answer.endswith("12345<|im_end|>\n")
    assert "a clock" in known.decode(document["input_ids"])
    assert "a clock" not in calling + answer
    (whole,) = tokenize(columns, known)
    assert document["input_ids"] == whole["input_ids"]


def test_of_a_completion_only_the_assistants_part_counts(tiny_tokenizer):
    columns = {"prompt": [TURNS[:1]], "completion": [TURNS[1:]]}
    (both,) = tokenize(columns, tiny_tokenizer, assistant_only_loss=True)
    assert len(said(both, tiny_tokenizer)) == 2
    (later,) = tokenize({"prompt": [TURNS[:3]], "completion": [TURNS[3:]]}, tiny_tokenizer, assistant_only_loss=True)
    assert said(later, tiny_tokenizer) == said(both, tiny_tokenizer)[1:]
    unprompted = {"assistant_only_loss": True, "completion_only_loss": False}
    (all_turns,) = tokenize({"prompt": [TURNS[:3]], "completion": [TURNS[3:]]}, tiny_tokenizer, **unprompted)
    assert said(all_turns, tiny_tokenizer) == said(both, tiny_tokenizer)


def test_conversations_in_which_the_assistant_says_nothing_are_left_out(tiny_tokenizer, caplog):
    asked = {"assistant_only_loss": True}
    (expected,) = tokenize({"messages": [CHAT]}, tiny_tokenizer, **asked)
    assert not caplog.messages
    rows = {"messages": [CHAT[:1]] * 300 + [CHAT] + [TURNS[2:3]]}
    assert tokenize(rows, tiny_tokenizer, **asked) == [expected]
    left_out = "conversations are left out: they have no text of the assistant"
    assert caplog.messages == [f"dataset.train_dataset: 301 of 302 {left_out}"]
    silent = {"prompt": [TURNS[:1], TURNS[:3]], "completion": [TURNS[2:3], TURNS[3:]]}
    (completed,) = tokenize(silent, tiny_tokenizer, **asked)
    assert said(completed, tiny_tokenizer) == ["the theory,  Ünïcödé 和 12345<|im_end|>"]
    assert caplog.messages[1:] == [f"dataset.train_dataset: 1 of 2 {left_out}"]


def test_what_ends_the_assistants_turn_may_count_as_eos(tiny_tokenizer):
    end, eos = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>"), tiny_tokenizer.eos_token_id
    options = {"assistant_only_loss": True, "eos_label_token_ids": (end,)}
    (document,) = tokenize({"messages": [CHAT]}, tiny_tokenizer, **options)
    assert document["labels"].count(eos) == 1
    assert document["labels"].index(eos) == len(document["input_ids"]) - 2  # before the last line's end


def test_what_cannot_count_the_assistant_alone_is_told(tiny_tokenizer):
    asked = {"assistant_only_loss": True}
    for columns in ({"text": ["time"]}, {"input_ids": [[5, 6]]}, {"prompt": ["time"], "completion": ["is"]}):
        assert error(columns, tiny_tokenizer, **asked) == (
            f"dataset.train_dataset: column {next(iter(columns))} holds no conversations, so "
            "dataset.assistant_only_loss has no effect on it; remove assistant_only_loss, or name a dataset of "
            "conversations"
        )
    assert error({"messages": [CHAT[:1]]}, tiny_tokenizer, **asked) == (
        "dataset.train_dataset: no conversation has text of the assistant, so no token would count; name another "
        "dataset, or remove dataset.assistant_only_loss"
    )
    assert "the tokenizer has no chat template" in error(
        {"messages": [CHAT]}, with_template(tiny_tokenizer, None), **asked
    )
    forgetful = "{% for m in messages %}{{ m.content if loop.last else '...' }};{% endfor %}"
    assert error({"messages": [TURNS]}, with_template(tiny_tokenizer, forgetful), **asked) == (
        "dataset.assistant_only_loss: the tokenizer's chat template does not separate the assistant's text from the "
        "rest; give it a chat template with {% generation %} marks, or remove assistant_only_loss"
    )


def test_marks_that_leave_out_the_end_of_the_turn_are_told(tiny_tokenizer, caplog):
    template = MARKED.replace("{{ m.content + '<|im_end|>' }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}")
    tokenize({"messages": [CHAT]}, with_template(tiny_tokenizer, template), assistant_only_loss=True)
    assert "the student may not learn to stop" in caplog.text


def with_special_tokens(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """It puts <|im_start|> before a text and <|endoftext|> behind it."""
    tokenizer = copied(tiny_tokenizer, eos_token="<|endoftext|>", bos_token="<|im_start|>")
    special = [("<|im_start|>", tokenizer.bos_token_id), ("<|endoftext|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A <|endoftext|>", None, special)
    return tokenizer


def test_a_text_that_has_its_special_tokens_gets_no_others(tiny_tokenizer):
    tokenizer = with_special_tokens(tiny_tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    time, relative = (tokenizer(text, add_special_tokens=False).input_ids for text in ("time", " relative"))
    texts = ["time", "<|im_start|>time", "time<|endoftext|>", "<|im_start|>time<|endoftext|>"]
    assert [plain(each) for each in tokenize({"text": texts}, tokenizer)] == [[bos, *time, eos]] * 4
    both = {"prompt": ["time", "<|im_start|>time"], "completion": [" relative", " relative<|endoftext|>"]}
    for document in tokenize(both, tokenizer):
        assert document["input_ids"] == [bos, *time, *relative, eos]
        assert document["labels"] == [-100] * (1 + len(time)) + [*relative, eos]


def test_fields_that_a_table_adds_are_in_no_conversation(tiny_tokenizer, tmp_path):
    """Rows of a Parquet file say what the same rows say alone."""
    say = "{{ tools | tojson }}{{ thinking is defined }}{% for m in messages %}{{ m | tojson }}{% endfor %}"
    tokenizer = copied(tiny_tokenizer, chat_template=say, eos_token="<|endoftext|>")

    def row(name: str, options: dict[str, Any]) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": name, "arguments": {name: [1, None, {name: 2}]}}}
        tool = {"type": "function", "function": {"name": name, "parameters": {"properties": {name: {"type": "int"}}}}}
        talk = [{"role": "user", "content": name}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        return {"messages": talk, "tools": [tool], "chat_template_kwargs": options}

    call = {"a": 1, "b": 2}
    rows = [row("left", {"thinking": True}), row("right", {"day": "today"})]
    rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] = call
    rows[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"c": "d"}
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    together = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    read = tokenize_rows(together, tokenizer, RowFormat(), num_proc=None, key="dataset")["input_ids"][:]
    alone = [tokenize({name: [value] for name, value in row.items()}, tokenizer)[0]["input_ids"] for row in rows]
    assert read == alone
    assert "null" not in tokenizer.decode(read[0]) + tokenizer.decode(read[1])


def test_content_in_parts_is_its_text(tiny_tokenizer):
    parts = [{"type": "text", "text": "ti"}, {"type": "text", "text": "me?"}]
    (whole,) = tokenize({"messages": [CHAT]}, tiny_tokenizer)
    (in_parts,) = tokenize(
        {
            "messages": [
                [
                    {"role": "user", "content": parts},
                    {"role": "assistant", "content": [{"type": "text", "text": "relative"}]},
                ]
            ]
        },
        tiny_tokenizer,
    )
    assert in_parts == whole
    picture = [[{"role": "user", "content": [{"type": "image", "url": "a.png"}]}]]
    assert "its content has a part of type 'image'; a student of text reads" in error(
        {"messages": picture}, tiny_tokenizer
    )


def test_an_empty_first_prompt_does_not_speak_for_the_others(tiny_tokenizer):
    rows = {"prompt": [None, CHAT[:1]], "completion": [None, CHAT[1:]]}
    assert len(tokenize(rows, tiny_tokenizer)) == 1
    assert len(tokenize(rows, tiny_tokenizer, assistant_only_loss=True)) == 1
