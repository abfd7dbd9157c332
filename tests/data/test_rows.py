import json
from typing import Any

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from distillkit.config.errors import UserError
from distillkit.data.rows import RowFormat, tokenize_rows

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


def test_eos_label_token_ids_change_labels_alone(tiny_tokenizer):
    end, eos = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>"), tiny_tokenizer.eos_token_id
    (document,) = tokenize({"messages": [CHAT]}, tiny_tokenizer, eos_label_token_ids=(end,))
    assert document["input_ids"].count(end) == 2
    assert document["labels"] == [eos if token == end else token for token in document["input_ids"]]


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
