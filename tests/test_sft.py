"""The supervised warm start: which rows it takes, what of them it learns, and that it learns."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from loop_runs import without_times

from dvpo_ray.config import Config
from dvpo_ray.errors import InputError


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config(model, path: str = "rows.jsonl", **sections) -> Config:
    return Config(model={"path": str(model), "dtype": "float32"}, data={"sft": path}, **sections)


USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Good day"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "Once upon a time"}, [(None, "Once upon a time")]),
        ({"prompt": "Hi", "completion": "Good day"}, [("Hi", "Good day")]),
        ({"prompt": [USER], "completion": [ASSISTANT]}, [([USER], [ASSISTANT])]),
        ({"messages": [USER, ASSISTANT]}, [([USER], [ASSISTANT])]),
        ({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, [([USER], [ASSISTANT]), ([USER, ASSISTANT, USER], [ASSISTANT])]),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, [("Add\n\n1 2", "3")]),
        ({"instruction": "Add", "input": "", "output": "3"}, [("Add", "3")]),
    ],
)
def test_layouts(row, expected):
    from dvpo_ray.data.answers import parse_answers

    assert [(answer.prompt, answer.answer) for answer in parse_answers(row, "here")] == expected


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"prompt": "Hi"}, "rows.jsonl:2: no `completion`; the row has prompt"),
        ({"instruction": "Add", "input": "1"}, "rows.jsonl:2: no `output`; the row has instruction, input"),
        ({"instruction": "Add", "output": " "}, "rows.jsonl:2: `output` is empty text"),
        ({"messages": [USER]}, "rows.jsonl:2: `messages` has no assistant message after another message"),
        (
            {"question": "Hi"},
            "rows.jsonl:2: needs `messages`, `prompt` and `completion`, `instruction` and `output`, or `text`; the row has question",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, row, line):
    from dvpo_ray.data.answers import load_answers

    path = write_rows(tmp_path / "rows.jsonl", [{"text": "fine"}, row])
    with pytest.raises(InputError) as caught:
        load_answers(path, "error")
    assert str(caught.value) == f"{tmp_path}/{line}; correct the row, or leave bad rows out with data.on_bad_row=skip"
    answers, notes = load_answers(path, "skip")
    fault = line.removeprefix("rows.jsonl:2: ")
    assert len(answers) == 1
    assert notes == [f"{path}: left out 1 of 2 rows: bad (data.on_bad_row skip); the first is {path}:2: {fault}"]


def test_only_answers_are_learned_and_each_ends_once(tiny_chat_model):
    from dvpo_ray.data.answers import Answer
    from dvpo_ray.models.loading import load_tokenizer
    from dvpo_ray.training.sft import encode_answers

    tokenizer = load_tokenizer(str(tiny_chat_model))
    answers = [Answer([USER], [ASSISTANT], "a"), Answer(None, "Once", "b"), Answer(None, "Once<|im_end|>\n", "c")]
    (chat, text, ended), notes = encode_answers(answers, tokenizer, config(tiny_chat_model))
    assert ended == text and notes == []
    prompt = tokenizer.apply_chat_template([USER], add_generation_prompt=True, tokenize=False)
    answer = [*tokenizer("Good day", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(chat["input_ids"][: -len(answer)]) == prompt
    assert chat["input_ids"][-len(answer) :] == answer
    assert chat["labels"] == [-100] * (len(chat["input_ids"]) - len(answer)) + answer
    assert text["labels"] == text["input_ids"] == [*tokenizer("Once")["input_ids"], tokenizer.eos_token_id]


def test_what_is_left_out_or_cut_is_said(tiny_chat_model, tmp_path):
    from dvpo_ray.data.answers import load_answers
    from dvpo_ray.models.loading import load_tokenizer
    from dvpo_ray.training.sft import encode_answers

    long = {"role": "user", "content": "good day " * 60}
    rows = [
        {"messages": [ASSISTANT, USER, ASSISTANT]},
        {"prompt": [long], "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": [{"role": "assistant", "content": "good day " * 60}]},
        {"text": "good day " * 60},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    answers, notes = load_answers(path, "error")
    assert notes == [f"{path}: left out 1 of 5 answers: they begin their dialogue, so they answer nothing; the first is {path}:1"]
    tokenizer = load_tokenizer(str(tiny_chat_model))
    encoded, notes = encode_answers(answers, tokenizer, config(tiny_chat_model, path, sft={"max_tokens": 40}))
    assert [len(row["input_ids"]) for row in encoded][1:] == [40, 40] and all(any(label != -100 for label in row["labels"]) for row in encoded)
    assert notes == [
        f"left out 1 of 4 answers: the prompt leaves no room for the answer in sft.max_tokens 40; the first is {path}:2",
        f"cut off the end of 2 of 4 answers: with their prompt they are over sft.max_tokens 40; the first is {path}:3",
    ]
    with pytest.raises(InputError, match="rows.jsonl: no row is left; no prompt leaves room for its answer in the model's context of 256 tokens"):
        longer = [replace(answers[1], prompt=[{**long, "content": long["content"] * 3}])]
        encode_answers(longer, tokenizer, config(tiny_chat_model, path, sft={"max_tokens": 999}))


@pytest.mark.slow
def test_the_loss_falls_and_the_checkpoint_loads(tiny_chat_model, tmp_path):
    from dvpo_ray.models.loading import load_policy, load_tokenizer
    from dvpo_ray.training.sft import train_sft

    path = write_rows(tmp_path / "rows.jsonl", [{"instruction": f"Say it {n}", "output": "Good day to you"} for n in range(16)])
    settings = config(tiny_chat_model, path, sft={"learning_rate": 1e-2, "epochs": 6, "batch_size": 4}, checkpoint={"every_steps": 10})
    final = train_sft(settings, tmp_path / "run", resume=False)
    losses = [json.loads(line)["sft/loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 24
    assert losses[-1] < 0.2 * losses[0]

    model, tokenizer = load_policy(settings.model.model_copy(update={"path": str(final)})), load_tokenizer(str(final))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Say it 3"}], add_generation_prompt=True, return_tensors="pt")
    prompt = prompt["input_ids"] if not hasattr(prompt, "shape") else prompt
    answer = model.generate(prompt, max_new_tokens=30, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(answer) == "Good day to you<|im_end|>"


@pytest.mark.slow
def test_a_resumed_run_ends_like_an_uninterrupted_one(tiny_chat_model, tmp_path):
    import shutil

    import torch

    from dvpo_ray.models.loading import load_policy
    from dvpo_ray.training.sft import train_sft

    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"Number {n}", "completion": f"It is {n}"} for n in range(12)])
    settings = config(tiny_chat_model, path, sft={"learning_rate": 1e-3, "batch_size": 4, "epochs": 2}, checkpoint={"every_steps": 4})
    whole = train_sft(settings, tmp_path / "whole", resume=False)
    (tmp_path / "stopped" / "checkpoints").mkdir(parents=True)
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "checkpoint-4", tmp_path / "stopped" / "checkpoints" / "checkpoint-4")
    for file in ("config.yaml", "metrics.jsonl"):  # which holds the steps after the checkpoint too
        shutil.copy(tmp_path / "whole" / file, tmp_path / "stopped")
    resumed = train_sft(settings, tmp_path / "stopped", resume=True)

    logged = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "stopped")]
    assert without_times(map(json.loads, logged[0])) == without_times(map(json.loads, logged[1]))
    left, right = (load_policy(settings.model.model_copy(update={"path": str(folder)})) for folder in (whole, resumed))
    for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b), name
