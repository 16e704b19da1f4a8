"""A refresh of the value model in the middle of a real run: new pairs, a new artifact, scorers that use it, and an exact resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gvm_artifacts import make_gvm
from loop_runs import ON_ONE_GPU, rollouts, run, values_by_hand, without_times
from transformers import AutoModelForCausalLM, AutoTokenizer

from dvpo_ray.gvm.artifact import load_gvm

pytestmark = pytest.mark.slow


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


WORDS = "cry best sad hate good bad friend dog story day home time there was little big and the"


def speak_in_words(model: Path, folder: Path) -> Path:
    """A copy of the tiny model that samples whole words and the end token only, so that its texts give their tokens again.

    A first hidden unit that is 1 at every token holds down the logits of everything else through an output head of its own.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    spoken = [tokenizer.convert_tokens_to_ids(f"Ġ{word}") for word in WORDS.split()] + [tokenizer.eos_token_id]
    lm = AutoModelForCausalLM.from_pretrained(model, tie_word_embeddings=False)
    with torch.no_grad():
        head = torch.zeros_like(lm.model.embed_tokens.weight)
        head[:, 0] = -20.0
        head[spoken] = 0.1 * torch.randn(len(spoken), head.shape[1], generator=torch.Generator().manual_seed(0))
        lm.lm_head.weight = torch.nn.Parameter(head)
        lm.model.embed_tokens.weight[:, 0] = 1.0
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def refresh_settings(loop_settings, tiny_model, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("words")
    model = speak_in_words(tiny_model, folder / "model")
    loop_settings = loop_settings | {"gvm": {"path": str(make_gvm(folder / "gvm", model))}}
    loop_settings["model"] = loop_settings["model"] | {"path": str(model)}
    refresh = {"source": "judge", "prompts": 20, "samples_per_prompt": 6, "pairs_per_prompt": 2, "min_score_gap": 0.01, "heldout_fraction": 0.3}
    gvm = loop_settings["gvm"] | {"refresh_every_steps": 2, "refresh": refresh, "learning_rate": 3e-3, "pairs_per_step": 4, "micro_batch_tokens": 512}
    rollout = loop_settings["rollout"] | {"cpus_per_actor": 3}  # the run holds every CPU of its cluster
    return loop_settings | {"gvm": gvm, "rollout": rollout, "train": {"steps": 5, "trackers": []}, "checkpoint": {"every_steps": 3, "keep": 10}}


@pytest.fixture(scope="module")
def refreshed(refresh_settings, tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("refresh") / "run"
    return folder, run(refresh_settings, folder)


def test_the_judge_of_the_run_labels_the_policys_own_samples(refreshed):
    folder, metrics = refreshed
    assert [row.get("refresh/count", 0) for row in metrics] == [0, 0, 1, 1, 2]
    assert ["time/refresh_seconds" in row for row in metrics] == [False, False, True, False, True]
    first, second = folder / "gvm" / "refresh_000002", folder / "gvm" / "refresh_000004"
    new = [rows_of(part / name) for part in (first, second) for name in ("pairs.train.jsonl", "pairs.heldout.jsonl")]
    assert metrics[-1]["refresh/pairs_total"] == sum(map(len, new)) > 10
    assert {row["source_model"] for row in new[0] + new[1]} == {"policy@2"} and all(row["chosen_score"] > row["rejected_score"] for row in new[0])
    assert not {row["prompt"] for row in new[0] + new[2]} & {row["prompt"] for row in new[1] + new[3]}
    assert all(len({row["prompt"] for row in heldout}) > 1 for heldout in (new[1], new[3]))
    assert len(rows_of(second / "training.jsonl")) > len(new[2])  # pairs of the first refresh are mixed in
    assert metrics[2]["refresh/heldout_accuracy"] == pytest.approx(
        json.loads((first / "summary.json").read_text())["gvm"]["heldout_accuracy"]["last"]
    )
    assert metrics[2]["health/gold_divergence"] == 0.0  # a new estimate starts anew


def test_scorers_use_the_artifact_in_force(refresh_settings, refreshed):
    folder, _ = refreshed
    in_force = {
        2: refresh_settings["gvm"]["path"],
        3: str(folder / "gvm" / "refresh_000002" / "final"),
        5: str(folder / "gvm" / "refresh_000004" / "final"),
    }
    for step, path in in_force.items():
        row = rollouts(folder, step)[0]
        np.testing.assert_allclose(row["values"], values_by_hand(path, row), atol=1e-5)
        for other in set(in_force.values()) - {path}:
            assert not np.allclose(row["values"], values_by_hand(other, row), atol=1e-4)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["refresh"]["path"] == in_force[5] and summary["refresh"]["steps"] == [2, 4]


def test_training_goes_on_from_the_last_artifact(refresh_settings, refreshed):
    """Its objective and its head are kept: the head after a few steps is near the one before, and far from zero."""
    folder, _ = refreshed
    old, old_manifest = load_gvm(refresh_settings["gvm"]["path"])
    new, manifest = load_gvm(folder / "gvm" / "refresh_000002" / "final")
    assert manifest.objective == old_manifest.objective and manifest.base_model == refresh_settings["gvm"]["path"]
    moved = (new.score.weight - old.score.weight).norm() / old.score.weight.norm()
    assert 0 < moved < 0.5


def test_resuming_repeats_the_run_with_the_artifact_of_its_checkpoint(refresh_settings, refreshed, tmp_path):
    """From step 4, with the first refresh's artifact in force and the second refresh still to come."""
    folder, whole = refreshed
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [f"step_{step:06d}" for step in (2, 3, 4, 5)]
    stopped = tmp_path / "moved"
    shutil.copytree(folder, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step_000005")
    shutil.rmtree(stopped / "gvm" / "refresh_000004")
    shutil.rmtree(stopped / "final")
    resumed = run(refresh_settings, stopped, resume=True, **ON_ONE_GPU)  # the trainers are on the scorers' GPU, while the engines sleep
    assert without_times(resumed) == without_times(whole)
