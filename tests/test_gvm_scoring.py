"""`dvpo gvm score` writes the values that the model gives to the tokens of every response."""

from __future__ import annotations

import json

import pytest
import torch
from gvm_artifacts import make_gvm
from transformers import AutoTokenizer

from dvpo_ray.config.schema import Config
from dvpo_ray.errors import InputError
from dvpo_ray.gvm.artifact import load_gvm
from dvpo_ray.gvm.scoring import score_file


@pytest.fixture(scope="module")
def gvm(tiny_model, tmp_path_factory):
    return make_gvm(tmp_path_factory.mktemp("gvm") / "final", tiny_model)


@pytest.fixture
def config(tiny_model):
    return Config.model_validate(
        {
            "model": {"path": str(tiny_model), "dtype": "float32"},
            "data": {"max_prompt_tokens": 64, "max_response_tokens": 12, "long_response": "drop"},
        }
    )


def score(config, gvm, tmp_path, *rows):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert score_file(config, gvm, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == len(rows)
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_values_equal_a_direct_forward_pass(config, gvm, tiny_model, tmp_path):
    prompt = "Once upon a time"
    [row] = score(config, gvm, tmp_path, {"prompt": prompt, "response": " there was a dog"})
    scored = row["response"]
    prompt_ids = AutoTokenizer.from_pretrained(tiny_model)(prompt)["input_ids"]
    model, _ = load_gvm(gvm)
    with torch.no_grad():
        values = model(torch.tensor([prompt_ids + scored["token_ids"]])).logits[0, :, 0]
    expected = values[len(prompt_ids) - 1 :].tolist()
    assert scored["values"] == pytest.approx(expected, abs=1e-5)
    assert len(scored["values"]) == len(scored["tokens"]) + 1
    assert scored["start"] == pytest.approx(expected[0], abs=1e-5)
    assert scored["last"] == pytest.approx(expected[-1], abs=1e-5)
    assert scored["mean"] == pytest.approx(sum(expected[1:]) / len(expected[1:]), abs=1e-5)
    assert "".join(scored["tokens"]) == " there was a dog</s>" and scored["text"] == " there was a dog"


def test_a_cut_off_response_gets_no_end_token(config, gvm, tmp_path):
    whole, cut = score(config, gvm, tmp_path, *({"prompt": "The", "response": " big dog", "truncated": t} for t in (False, True)))
    assert whole["response"]["token_ids"] == [*cut["response"]["token_ids"], 2]


def test_pairs(config, gvm, tmp_path):
    [row] = score(config, gvm, tmp_path, {"prompt": "The", "chosen": " dog", "rejected": " rain", "rejected_truncated": True})
    assert row["where"].endswith("in.jsonl:1") and row["prompt"] == "The"
    assert row["chosen"]["token_ids"][-1] == 2 and row["rejected"]["token_ids"][-1] != 2
    assert "response" not in row


def test_a_response_that_the_limits_drop_is_null_and_counted(config, gvm, tmp_path, caplog):
    rows = score(config, gvm, tmp_path, {"prompt": "The", "response": " dog" * 50}, {"prompt": "The", "response": " dog"})
    assert rows[0]["response"] is None and rows[1]["response"] is not None
    note = f"left out 1 of 2 responses: the response is over data.max_response_tokens 12; the first is {tmp_path}/in.jsonl:1"
    assert [record.getMessage() for record in caplog.records if record.name == "dvpo_ray.gvm.scoring"] == [note]


def test_bad_rows_that_are_skipped_are_counted(config, gvm, tmp_path, caplog):
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "The"}) + "\n" + json.dumps({"prompt": "The", "response": " dog"}) + "\n")
    skipping = config.model_copy(update={"data": config.data.model_copy(update={"on_bad_row": "skip"})})
    assert score_file(skipping, gvm, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == 1
    assert "left out 1 of 2 rows: bad (data.on_bad_row skip)" in caplog.text


def test_only_dropped_responses(config, gvm, tmp_path):
    [row] = score(config, gvm, tmp_path, {"prompt": "The", "response": " dog" * 50})
    assert row["response"] is None


def test_a_row_without_a_response_names_itself_and_leaves_no_output(config, gvm, tmp_path):
    with pytest.raises(InputError, match=r"in.jsonl:2: no `response`; the row has prompt"):
        score(config, gvm, tmp_path, {"prompt": "The", "response": " dog"}, {"prompt": "The"})
    assert not (tmp_path / "out.jsonl").exists()


def test_a_gvm_of_another_tokenizer_is_refused(config, tiny_chat_model, tmp_path):
    other = make_gvm(tmp_path / "gvm", tiny_chat_model)
    with pytest.raises(InputError, match="another tokenizer"):
        score(config, other, tmp_path, {"prompt": "The", "response": " dog"})
