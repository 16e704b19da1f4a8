"""What the experience builder tells judges and people of a prompt."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dvpo_ray.actors import experience_builder
from dvpo_ray.actors.experience_builder import ExperienceBuilder, ScoredChunk
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config import Config
from dvpo_ray.data.prompts import ids_key
from dvpo_ray.runtime import process

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How was  your day?"}]


class Recorder:
    """A judge that scores everything 0.5."""

    name = "recorder"
    prompts: list[str]

    def score(self, prompts, responses):
        self.prompts = list(prompts)
        return np.full(len(responses), 0.5, dtype=np.float32)


@pytest.fixture
def builder(tiny_chat_model, tmp_path, monkeypatch) -> ExperienceBuilder:
    monkeypatch.setattr(process, "redirect_process_output", lambda file: None)
    monkeypatch.setattr(experience_builder.ray, "get", list)
    builder = ExperienceBuilder(Config.model_validate({"model": {"path": str(tiny_chat_model)}}), 0, str(tmp_path))
    builder.judge = Recorder()
    return builder


def answered(prompts: list[list[int]]) -> ScoredChunk:
    """Each prompt with a response of two tokens; the last one is cut off."""
    numbers, cut = [[0.0, 0.0]] * len(prompts), [False] * (len(prompts) - 1) + [True]
    by_token = {"log_probs": numbers, "reference_log_probs": numbers}
    return ScoredChunk(RaggedBatch.from_rows(prompts, [[70, 71]] * len(prompts), truncated=cut, by_response_token=by_token))


def test_judges_and_files_get_the_words_of_the_data_and_not_the_template(builder, tmp_path):
    chat = builder.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    plain = builder.tokenizer("Tell me a story")["input_ids"]
    builder.know_prompts({ids_key(chat): CHAT})
    assert builder.evaluate(0, [answered([chat, plain])]) == {"kl": 0.0, "gold": 0.5}
    assert builder.judge.prompts == ["Be kind.\nHow was  your day?", "Tell me a story"]
    rows = [json.loads(line) for line in (tmp_path / "evaluation" / "step_000000.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [CHAT, "Tell me a story"]  # of a prompt that it does not know it has the tokens
    assert [row["truncated"] for row in rows] == [False, True]
