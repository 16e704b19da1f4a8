"""`dvpo gvm train` on real Ray and DeepSpeed: it learns, resumes exactly, and gives the same result on any number of workers."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dvpo_ray.config.schema import Config
from dvpo_ray.errors import InputError, ResourceError

pytestmark = pytest.mark.slow

GOOD = ["good", "great", "happy", "kind", "sunny", "wonderful"]
BAD = ["bad", "sad", "awful", "terrible", "storm", "hate"]
FILLER = ["the dog", "a girl", "in the park", "at home", "today", "one day", "very", "so"]
STEPS, CHECKPOINT_EVERY = 18, 4


def write_pairs(path: Path, count: int, seed: int) -> str:
    """Pairs with good words in the chosen and bad words in the rejected response, among the same filler, of random length."""
    rng = random.Random(seed)

    def text(words):
        parts = rng.choices(FILLER, k=rng.randint(1, 5)) + rng.choices(words, k=2)
        rng.shuffle(parts)
        return " " + " ".join(parts)

    rows = [{"prompt": f"Tell me story {seed} {i}", "chosen": text(GOOD), "rejected": text(BAD)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def settings(tiny_model, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("pairs")
    return {
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "data": {
            "preferences": {"path": write_pairs(folder / "train.jsonl", 65, 0), "heldout_path": write_pairs(folder / "heldout.jsonl", 40, 1)},
            "max_prompt_tokens": 64,
            "max_response_tokens": 64,
        },
        "gvm": {
            "learning_rate": 1e-2,
            "epochs": 2,
            "pairs_per_step": 8,  # 65 pairs: eight minibatches of 7 and one of 8
            "micro_batch_tokens": 256,
            "checkpoint_every_steps": CHECKPOINT_EVERY,
        },
        "checkpoint": {"keep": 10},
        "train": {"trackers": []},
    }


def train(settings: dict, out: Path, resume: bool = False, **gvm) -> Path:
    from dvpo_ray.training.value_model import train_value_model

    config = Config.model_validate(settings | {"gvm": settings["gvm"] | gvm})
    return train_value_model(config, config.gvm, out, resume)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def metrics(folder: Path) -> list[dict]:
    """Metrics of each step without timings."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name == "step" or name.startswith("gvm/")} for row in rows]


@pytest.fixture(scope="module")
def run(ray_session, settings, tmp_path_factory) -> Path:
    """An uninterrupted run on one worker."""
    out = tmp_path_factory.mktemp("run") / "gvm"
    assert train(settings, out) == out / "final"
    return out


def test_it_learns_what_held_out_pairs_ask_for(run):
    from dvpo_ray.gvm.artifact import load_gvm

    _, manifest = load_gvm(run / "final")
    assert manifest.heldout_accuracy["last"] >= 0.9
    assert manifest.heldout_accuracy["mean"] >= 0.9
    assert manifest.heldout_regression["explained_variance"] > 0.2
    rows = metrics(run)
    assert rows[0]["gvm/regression_loss"] == pytest.approx(0.5, abs=1e-6)  # a zero head against outcomes of ±1
    assert rows[0]["gvm/bradley_terry_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert rows[-1]["gvm/regression_loss"] < 0.4


def test_the_run_folder(run, settings):
    assert [row["step"] for row in metrics(run)] == list(range(1, STEPS + 1))
    assert (run / "logs" / "gvm_trainer-0.log").is_file()
    assert sorted(folder.name for folder in (run / "checkpoints").iterdir()) == [f"step_{s:06d}" for s in range(4, STEPS, CHECKPOINT_EVERY)]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["state"] == "finished" and summary["steps"] == STEPS
    assert summary["duration_seconds"] > 0 and summary["peak_memory_gib"] > 0
    evaluation = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert summary["gvm"]["heldout_accuracy"] == evaluation["heldout_accuracy"]
    assert summary["gvm"]["pairs"] == 40 and summary["gvm"]["accuracy_ci95"]["mean"] == evaluation["accuracy_ci95"]["mean"]
    assert evaluation["pairs"] == 40 and evaluation["value_spread"] > 0.2
    manifest = json.loads((run / "final" / "gvm.json").read_text())
    assert manifest["training_data"]["pairs"] == 65 and manifest["heldout_accuracy"] == evaluation["heldout_accuracy"]
    from dvpo_ray.config import load_config

    assert load_config(run / "config.yaml").gvm.pairs_per_step == settings["gvm"]["pairs_per_step"]


def test_evaluating_the_artifact_gives_the_numbers_of_training(run, settings, tmp_path):
    from dvpo_ray.gvm.evaluation import evaluate_gvm

    report = evaluate_gvm(Config.model_validate(settings), run / "final", tmp_path)
    trained = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert report["heldout_accuracy"] == trained["heldout_accuracy"]
    assert report["regression"]["mse"] == pytest.approx(trained["regression"]["mse"], abs=1e-5)


def interrupted(run: Path, out: Path, step: int) -> Path:
    """The folder of a run that stopped between two checkpoints."""
    shutil.copytree(
        run / "checkpoints", out / "checkpoints", ignore=lambda _, names: [n for n in names if n.startswith("step_") and int(n[5:]) > step]
    )
    shutil.copy(run / "config.yaml", out)
    rows = (run / "metrics.jsonl").read_text().splitlines()[: step + 1]
    (out / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    return out


def test_a_resumed_run_is_the_uninterrupted_one(run, settings, tmp_path):
    """The newest checkpoint is truncated, so the run resumes from the one before."""
    out = interrupted(run, tmp_path / "gvm", step=12)
    damaged = next(f for f in (out / "checkpoints" / "step_000012").rglob("*.pt"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    train(settings, out, resume=True)
    expected = weights(run)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(out).items())
    assert metrics(out) == metrics(run)


def test_a_run_is_not_resumed_with_another_length(run, settings, tmp_path):
    out = interrupted(run, tmp_path / "gvm", step=8)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="gvm.epochs was 2.0 and is 3.0 now"):
        train(settings, out, resume=True, epochs=3)
    fewer = settings["data"]["preferences"] | {"path": write_pairs(tmp_path / "train.jsonl", 30, 0)}
    kept = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(kept.replace(settings["data"]["preferences"]["path"], fewer["path"]))
    with pytest.raises(InputError, match="the run had 18 steps, .*train.jsonl gives 8 now; resume with the data of its start"):
        train(settings | {"data": settings["data"] | {"preferences": fewer}}, out, resume=True)
    (out / "config.yaml").write_text(kept)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_run_that_diverges_is_stopped_and_leaves_no_model(ray_session, settings, tmp_path):
    """A reward model is trained by the same code; the line names its own config section."""
    from dvpo_ray.training.value_model import train_value_model

    config = Config.model_validate(settings | {"reward_model": settings["gvm"] | {"learning_rate": 1e30}})
    line = r"training has diverged: gvm/(loss|grad_norm) is (nan|inf) at step \d; lower reward_model.learning_rate"
    with pytest.raises(ResourceError, match=line):
        train_value_model(config, config.reward_model, tmp_path / "run")
    assert not (tmp_path / "run" / "final").exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["state"] == "failed" and summary["steps"] == len(metrics(tmp_path / "run"))  # the diverged step is not counted


def test_two_workers_give_the_result_of_one(run, settings, tmp_path):
    """Minibatches of 7 and 8 pairs on two workers, with micro-batches of another size, under ZeRO-2."""
    out = tmp_path / "gvm"
    train(settings, out, num_actors=2, cpus_per_actor=1, micro_batch_tokens=120, deepspeed={"zero_stage": 2})
    for one, two in zip(metrics(run), metrics(out), strict=True):
        assert two == pytest.approx(one, rel=1e-2, abs=1e-3)
    assert (out / "logs" / "gvm_trainer-1.log").is_file()


def test_lora_under_zero_3_is_merged_into_a_plain_artifact(ray_session, settings, tiny_model, tmp_path):
    from dvpo_ray.gvm.artifact import load_gvm

    out = tmp_path / "gvm"
    options = {"num_actors": 2, "deepspeed": {"zero_stage": 3}, "lora": {"rank": 8}, "objective": "td_lambda", "bradley_terry_weight": 0.5}
    train(settings, out, **options, num_layers=1)
    model, manifest = load_gvm(out / "final")
    assert manifest.num_layers == 1 and manifest.objective.bradley_terry_weight == 0.5
    assert manifest.heldout_accuracy["last"] >= 0.8
    base, trained = load_file(tiny_model / "model.safetensors"), weights(out)
    assert not any("lora" in name or "base_layer" in name for name in trained)
    assert not torch.equal(trained["model.layers.0.self_attn.q_proj.weight"], base["model.layers.0.self_attn.q_proj.weight"])
    assert torch.equal(trained["model.embed_tokens.weight"], base["model.embed_tokens.weight"])  # no adapter there, so frozen


def write_styles(path: Path, count: int, seed: int) -> str:
    """Pairs of two models: all responses of one are good, all of the other bad, and the prompt does not tell which model answers."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        model, words, score = rng.choice([("cheerful", GOOD, 1.0), ("gloomy", BAD, -1.0)])
        chosen, rejected = (" " + " ".join(rng.sample(words, 3)) for _ in range(2))
        scores = {"chosen_score": score, "rejected_score": score}
        rows.append({"prompt": f"{rng.choice(FILLER)} {seed} {i}", "chosen": chosen, "rejected": rejected, "source_model": model} | scores)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_with_examples_of_the_policy_the_prompts_value_is_that_policys(ray_session, settings, tmp_path):
    """At the prompt only the examples tell the two models apart; without them the variance of the outcome stays unexplained."""
    preferences = {"path": write_styles(tmp_path / "train.jsonl", 64, 0), "heldout_path": write_styles(tmp_path / "heldout.jsonl", 40, 1)}
    data = settings["data"] | {"preferences": preferences}

    def explained_at_the_prompt(examples: int) -> float:
        out = tmp_path / f"examples-{examples}"
        train(settings | {"data": data}, out, outcome="score", context={"examples": examples, "max_tokens": 60}, micro_batch_tokens=1024)
        [weak] = json.loads((out / "summary.json").read_text())["warnings"]  # chosen and rejected are alike
        assert json.loads((out / "final" / "gvm.json").read_text())["heldout_warnings"] == [weak] and "is under 0.60" in weak
        first = json.loads((out / "evaluation" / "evaluation.json").read_text())["regression"]["by_position_decile"][0]
        return first["explained_variance"]

    assert explained_at_the_prompt(0) < 0.2
    assert explained_at_the_prompt(2) > 0.8
