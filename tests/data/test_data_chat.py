# SPDX-License-Identifier: Apache-2.0
"""What of a conversation is trained, template by template: every expectation is readable text.

Trained parts stand between ⟦ and ⟧. `B` and `E` are BOS and EOS.
"""

import numpy as np
import pytest
from conversations import REASONED, conversation, marked
from tiny_tokenizers import TEMPLATES

from dsjax.data import decode_sample, encode_chat
from dsjax.data.chat import chat_examples
from dsjax.data.formats import parse_row


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("v3", "B<｜User｜>hi<｜Assistant｜>⟦yesE⟧"),
        # The prompt opened <think>, so the model must close it before it answers.
        ("r1", "B<｜User｜>hi<｜Assistant｜><think>\n⟦\n</think>\n\nyesE⟧"),
        ("v31", "B<｜User｜>hi<｜Assistant｜></think>⟦yesE⟧"),
        ("llm", "BUser: hi\n\nAssistant:⟦ yesE⟧"),
        ("coder", "B### Instruction:\nhi\n### Response:⟦\nyes\n<|EOT|>\n⟧"),
        ("chatml", "user\nhi<|im_end|>\nassistant\n⟦yes<|im_end|>\n⟧"),
    ],
)
def test_answer_and_its_end_are_trained(tokenizers, family, expected):
    assert marked(tokenizers[family], conversation("hi", "yes")) == [expected]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("v3", "B<｜User｜>hi<｜Assistant｜>⟦<think>\nwhy\n</think>\n\nyesE⟧"),
        ("r1", "B<｜User｜>hi<｜Assistant｜><think>\n⟦why\n</think>\n\nyesE⟧"),
        ("v31", "B<｜User｜>hi<｜Assistant｜><think>⟦\nwhy\n</think>\n\nyesE⟧"),
        ("llm", "BUser: hi\n\nAssistant:⟦ <think>\nwhy\n</think>\n\nyesE⟧"),
        ("chatml", "user\nhi<|im_end|>\nassistant\n⟦<think>\nwhy\n</think>\n\nyes<|im_end|>\n⟧"),
    ],
)
def test_reasoning_is_kept_though_templates_delete_it(tokenizers, family, expected):
    assert marked(tokenizers[family], conversation("hi", REASONED)) == [expected]


@pytest.mark.parametrize(
    ("content", "target"),
    [
        ("<think>why</think>yes", "why</think>yesE"),
        ("why</think>yes", "why</think>yesE"),
        ("\n<think>\nwhy</think>yes", "why</think>yesE"),
        ("<think>\n\n</think>\n\nyes", "\n</think>\n\nyesE"),
    ],
)
def test_r1_never_opens_reasoning_twice(tokenizers, content, target):
    prompt = "B<｜User｜>hi<｜Assistant｜><think>\n"
    assert marked(tokenizers["r1"], conversation("hi", content)) == [f"{prompt}⟦{target}⟧"]


def test_reasoning_without_its_opening_mark_gets_one_where_the_prompt_has_none(tokenizers):
    text = marked(tokenizers["v3"], conversation("hi", "why\n</think>\n\nyes"))
    assert text == ["B<｜User｜>hi<｜Assistant｜>⟦<think>\nwhy\n</think>\n\nyesE⟧"]


def test_reasoning_in_a_field_of_its_own_is_the_same(tokenizers):
    row = conversation("hi", "yes")
    row["messages"][1]["reasoning_content"] = "why"
    assert marked(tokenizers["r1"], row) == marked(tokenizers["r1"], conversation("hi", REASONED))


def test_all_turns_of_a_stable_template_share_one_sequence(tokenizers):
    row = conversation("a", "b", "c", "d")
    v3 = "B<｜User｜>a<｜Assistant｜>⟦bE⟧<｜User｜>c<｜Assistant｜>⟦dE⟧"
    llm = "BUser: a\n\nAssistant:⟦ bE⟧User: c\n\nAssistant:⟦ dE⟧"
    assert marked(tokenizers["v3"], row) == [v3]
    assert marked(tokenizers["llm"], row) == [llm]


def test_r1_turns_become_sequences_as_inference_shows_them(tokenizers):
    assert marked(tokenizers["r1"], conversation("a", REASONED, "c", REASONED)) == [
        "B<｜User｜>a<｜Assistant｜><think>\n⟦why\n</think>\n\nyesE⟧",
        "B<｜User｜>a<｜Assistant｜>\n\nyesE<｜User｜>c<｜Assistant｜><think>\n⟦why\n</think>\n\nyesE⟧",
    ]


def test_turns_part_where_the_tokens_of_the_history_differ(tokenizers):
    # Alone, the prompt ends in ":"; in the history ":\n" is one token. The second turn sees that.
    texts = marked(tokenizers["coder"], conversation("a", "b", "c", "d"))
    head = "B### Instruction:\na\n### Response:"
    assert texts == [
        f"{head}⟦\nb\n<|EOT|>\n⟧",
        f"{head}\nb\n<|EOT|>\n### Instruction:\nc\n### Response:⟦\nd\n<|EOT|>\n⟧",
    ]


@pytest.mark.parametrize("family", ["v3", "r1", "v31", "llm", "coder", "chatml"])
def test_what_precedes_a_target_is_what_inference_sees(tokenizers, family):
    row = conversation("a", "b", "c", "d")
    chat = parse_row(row, "messages", "f:1")
    last, _ = chat_examples(tokenizers[family], chat, "f:1")[-1]
    shown = encode_chat(tokenizers[family], row["messages"][:3])
    assert last.input_ids[: len(shown)].tolist() == shown
    assert not last.loss_weights[len(shown) - 1] and last.loss_weights[len(shown)]


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("emits", [True, False])
def test_bos_stands_once(with_template, flag, emits):
    template = ("{{ bos_token }}" if emits else "") + "{% for m in messages %}[{{ m.content }}]"
    tokenizer = with_template(template + "{% endfor %}", add_bos_token=flag)
    (text,) = marked(tokenizer, {"messages": [{"role": "user", "content": "a"}]})
    assert text.count("B") == int(flag or emits)
    assert encode_chat(tokenizer, [{"role": "user", "content": "a"}]).count(
        tokenizer.bos_token_id
    ) == int(flag or emits)


def test_loss_weight_multiplies_and_can_train_other_roles(tokenizers):
    row = conversation("a", "b", "c", "d")
    weights = (0.25, 0.0, 0.0, 0.5)
    for message, weight in zip(row["messages"], weights, strict=True):
        message["loss_weight"] = weight
    chat = parse_row(row, "messages", "f:1")
    ((made, _),) = chat_examples(tokenizers["v3"], chat, "f:1")
    text = decode_sample(made, tokenizers["v3"])
    assert "<｜User｜>⟦a⟧<｜Assistant｜>b" in text and "<｜Assistant｜>⟦d" in text
    assert sorted(set(made.loss_weights.tolist())) == [0, 0.25, 0.5]


def test_a_trained_last_user_message_is_in_the_sequence(tokenizers):
    row = conversation("a", "b", "cc")
    row["messages"][2]["loss_weight"] = 1
    assert marked(tokenizers["v3"], row) == [
        "B<｜User｜>a<｜Assistant｜>⟦bE⟧<｜User｜>⟦cc⟧",
    ]


def test_a_row_with_nothing_to_train_stays_whole(tokenizers):
    assert marked(tokenizers["v3"], conversation("a")) == ["B<｜User｜>a"]


def test_every_message_is_trained_in_one_sequence_only(tokenizers):
    row = conversation("a", REASONED, "c", REASONED)
    row["messages"][0]["loss_weight"] = 1
    texts = marked(tokenizers["r1"], row)
    assert ["⟦a⟧" in text for text in texts] == [True, False]


def test_samples_without_tokenizer_show_ids():
    from dsjax.data import Example

    ids = np.arange(5, dtype=np.int32)
    weights = np.array([1, 0, 1, 1, 0], np.float32)
    assert decode_sample(Example(ids, ids, weights), None) == "0 1⟦2 3⟧4"


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("v3", ["B<｜Assistant｜>⟦hiE⟧<｜User｜>a<｜Assistant｜>⟦bE⟧"]),
        (
            "r1",
            [
                "B<｜Assistant｜><think>\n⟦\n</think>\n\nhiE⟧",
                "B<｜Assistant｜>hiE<｜User｜>a<｜Assistant｜><think>\n⟦\n</think>\n\nbE⟧",
            ],
        ),
        ("llm", ["BAssistant:⟦ hiE⟧User: a\n\nAssistant:⟦ bE⟧"]),
        ("chatml", ["assistant\n⟦hi<|im_end|>\n⟧user\na<|im_end|>\nassistant\n⟦b<|im_end|>\n⟧"]),
        (
            "first",
            ["<system>\nassistant\n⟦hi<|im_end|>\n⟧user\na<|im_end|>\nassistant\n⟦b<|im_end|>\n⟧"],
        ),
    ],
)
def test_conversations_that_the_assistant_begins_are_trained(
    tokenizers, with_template, family, expected
):
    # Some templates look at the first message, which at this point there is none.
    looks = "{% if messages[0]['role'] != 'system' %}<system>\n{% endif %}" + TEMPLATES["chatml"]
    tokenizer = with_template(looks) if family == "first" else tokenizers[family]
    row = conversation("a", "b")
    row["messages"].insert(0, {"role": "assistant", "content": "hi"})
    assert marked(tokenizer, row) == expected
