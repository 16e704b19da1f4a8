"""The DPO baseline: it trains on the ids of the value model's pairs, on DPO's loss, and it learns and resumes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from loop_runs import without_times

from dvpo_ray.config import Config
from dvpo_ray.errors import InputError, ResourceError

CHAT_PAIRS = [
    {"prompt": "Tell me a story", "chosen": "A good day", "rejected": "A bad day"},
    {"prompt": "What to do?", "chosen": "I love this", "rejected": "I hate the awful storm", "rejected_truncated": True},
]


def config(model, folder, rows, **sections) -> Config:
    files = {"path": rows, "heldout_path": [{"prompt": "Held out", "chosen": "one", "rejected": "two"}]}
    for name, pairs in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    data = {"preferences": {name: str(folder / f"{name}.jsonl") for name in files}, "max_prompt_tokens": 64, "max_response_tokens": 64}
    return Config(model={"path": str(model), "dtype": "float32"}, data=data, **sections)


def test_rows_are_the_ids_of_the_value_models_pairs(tiny_chat_model, tmp_path):
    from dvpo_ray.gvm.dataset import load_gvm_data
    from dvpo_ray.models.loading import load_tokenizer
    from dvpo_ray.training.dpo import encode_pairs

    settings = config(tiny_chat_model, tmp_path, CHAT_PAIRS)
    tokenizer = load_tokenizer(str(tiny_chat_model))
    rows, notes = encode_pairs(settings, tokenizer)
    assert notes == []
    values = load_gvm_data(settings, settings.gvm).train.batch
    for i, row in enumerate(rows):
        for j, response in enumerate(("chosen_ids", "rejected_ids")):
            start, end = values.offsets[2 * i + j : 2 * i + j + 2]
            assert row["prompt_ids"] + row[response] == values.tokens[start:end].tolist()
    assert tokenizer.decode(rows[0]["prompt_ids"]) == "<|im_start|>user\nTell me a story<|im_end|>\n<|im_start|>assistant\n"
    assert rows[1]["chosen_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in rows[1]["rejected_ids"]  # cut off


def test_what_becomes_of_long_rows_is_said(tiny_chat_model, tmp_path):
    from dvpo_ray.models.loading import load_tokenizer
    from dvpo_ray.training.dpo import encode_pairs

    settings = config(tiny_chat_model, tmp_path, CHAT_PAIRS)
    tokenizer = load_tokenizer(str(tiny_chat_model))
    settings.data.max_response_tokens, settings.data.long_response = len(tokenizer("A good day")["input_ids"]) + 1, "drop"
    rows, notes = encode_pairs(settings, tokenizer)
    limit = f"data.max_response_tokens {settings.data.max_response_tokens}"
    assert len(rows) == 1
    assert notes == [f"left out 1 of 2 pairs: the response is over {limit}; the first is {tmp_path}/path.jsonl:2"]


def test_no_pair_left_is_one_line(tiny_chat_model, tmp_path):
    from dvpo_ray.models.loading import load_tokenizer
    from dvpo_ray.training.dpo import encode_pairs

    settings = config(tiny_chat_model, tmp_path, CHAT_PAIRS)
    settings.data.max_prompt_tokens, settings.data.long_prompt = 3, "drop"
    with pytest.raises(InputError, match="path.jsonl: no training pair is left; left out 2 of 2 pairs: the prompt is over data.max_prompt_tokens 3;"):
        encode_pairs(settings, load_tokenizer(str(tiny_chat_model)))


def response_log_probs(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Sum of the response's log-probs, one row at a time and without padding."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)].sum()


@pytest.mark.slow
def test_the_first_steps_are_dpos(tiny_model, tmp_path):
    """Loss 1 is log 2. After one step by hand, loss 2 is -log sigmoid of beta times the change of the log-ratio."""
    from dvpo_ray.models.loading import load_policy, load_tokenizer
    from dvpo_ray.training.dpo import encode_pairs, train_dpo

    rows = [{"prompt": "The big dog", "chosen": " was happy", "rejected": " was sad and bad"}]
    dpo = {"learning_rate": 1e-2, "beta": 0.3, "epochs": 2, "batch_size": 1}
    settings = config(tiny_model, tmp_path, rows, dpo=dpo)
    train_dpo(settings, tmp_path / "run", resume=False)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    (pair,), _ = encode_pairs(settings, load_tokenizer(str(tiny_model)))
    policy, reference = load_policy(settings.model), load_policy(settings.model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(2):
        ratio = [
            response_log_probs(policy, pair["prompt_ids"], pair[name]) - response_log_probs(reference, pair["prompt_ids"], pair[name]).detach()
            for name in ("chosen_ids", "rejected_ids")
        ]
        loss = -torch.nn.functional.logsigmoid(0.3 * (ratio[0] - ratio[1]))
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    assert [step["dpo/loss"] for step in logged] == pytest.approx(losses, abs=2e-4)
    assert logged[0]["dpo/loss"] == pytest.approx(0.6931, abs=1e-4)
    assert logged[1]["dpo/loss"] < 0.6 and logged[1]["dpo/accuracy"] == 1.0


@pytest.mark.slow
def test_it_learns_the_preference_and_a_resumed_run_ends_alike(tiny_chat_model, tmp_path):
    from dvpo_ray.models.loading import load_policy
    from dvpo_ray.training.dpo import train_dpo

    rows = [{"prompt": f"Tell me story {n}", "chosen": "A great sunny day", "rejected": "A terrible storm"} for n in range(12)]
    dpo = {"learning_rate": 3e-3, "batch_size": 4, "epochs": 2}
    settings = config(tiny_chat_model, tmp_path, rows, dpo=dpo, checkpoint={"every_steps": 4})
    whole = train_dpo(settings, tmp_path / "whole", resume=False)
    (tmp_path / "stopped" / "checkpoints").mkdir(parents=True)
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "checkpoint-4", tmp_path / "stopped" / "checkpoints" / "checkpoint-4")
    for file in ("config.yaml", "metrics.jsonl"):  # which holds the steps after the checkpoint too
        shutil.copy(tmp_path / "whole" / file, tmp_path / "stopped")
    resumed = train_dpo(settings, tmp_path / "stopped", resume=True)

    logged = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "stopped")]
    assert without_times(map(json.loads, logged[0])) == without_times(map(json.loads, logged[1]))
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert (summary["state"], summary["stage"], summary["steps"]) == ("finished", "dpo", 6)
    assert summary["last_step"]["dpo/accuracy"] == 1.0 and summary["last_step"]["dpo/margin"] > 0.1
    left, right = (load_policy(settings.model.model_copy(update={"path": str(folder)})) for folder in (whole, resumed))
    for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "finding"), [(2, r"dpo/(loss|grad_norm) is (nan|inf) at step 2"), (1, "is not finite after the last step")])
def test_a_run_that_diverges_is_stopped_and_leaves_no_model(tiny_model, tmp_path, monkeypatch, epochs, finding):
    from dvpo_ray.training.dpo import train_dpo
    from dvpo_ray.training.run_folder import check_new

    rows = [{"prompt": "The big dog", "chosen": " was happy", "rejected": " was sad and bad"}]
    settings = config(tiny_model, tmp_path, rows, dpo={"learning_rate": 3e38, "epochs": epochs, "batch_size": 1}, checkpoint={"every_steps": 1})
    with pytest.raises(ResourceError, match=f"training has diverged: .*{finding}; lower dpo.learning_rate"):
        train_dpo(settings, tmp_path / "run", resume=False)
    assert not (tmp_path / "run" / "final").exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert summary["state"] == "failed"
    (sound,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(sound)["step"] == 1
    with pytest.raises(InputError):
        check_new(tmp_path / "run")


@pytest.mark.slow
def test_only_whole_checkpoints_are_resumed(tiny_chat_model, tmp_path, caplog):
    from dvpo_ray.training.dpo import train_dpo
    from dvpo_ray.training.run import Run
    from dvpo_ray.training.trl_stage import last_trainer_checkpoint

    settings = config(tiny_chat_model, tmp_path, CHAT_PAIRS, dpo={"batch_size": 1}, checkpoint={"every_steps": 1})
    out = tmp_path / "run"
    train_dpo(settings, out, resume=False)
    with pytest.raises(InputError, match="the run is finished and its result is in final/$"):
        Run("dpo", settings, out, resume=True)
    shutil.rmtree(out / "final")
    folder, state = last_trainer_checkpoint(out)
    assert (folder.name, state["step"]) == ("checkpoint-2", 2)
    weights = out / "checkpoints" / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert last_trainer_checkpoint(out)[0].name == "checkpoint-1"
    assert "checkpoint-2 is damaged (model.safetensors has " in caplog.text
    optimizer = out / "checkpoints" / "checkpoint-1" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    with pytest.raises(InputError, match="no whole checkpoint to resume from"):
        last_trainer_checkpoint(out)
    with pytest.raises(InputError, match="a run of `dvpo dpo`, which `dvpo sft` cannot resume"):
        Run("sft", settings, out, resume=True)


def test_every_metric_is_in_the_catalogue():
    from dvpo_ray.monitoring.catalogue import find_metric
    from dvpo_ray.training.dpo import METRICS
    from dvpo_ray.training.trl_stage import OPTIMIZER_METRICS

    for stage, names in (("dpo", METRICS), ("sft", OPTIMIZER_METRICS)):
        for name in names.values():
            assert find_metric(f"{stage}/{name}").name == f"{stage}/{name}"
