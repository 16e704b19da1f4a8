"""Steps of TRL's PPOTrainer, timed stage by stage. A script for the environment of launch/bench_trl.sh: it imports nothing from dvpo_ray.

    python -P trl_ppo_steps.py REQUEST.json RESULT.json

`dvpo_ray.bench.trl` writes the request. Standard output gets a line `step N` after each step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class StageClock(TrainerCallback):
    """Seconds of the stages of each step.

    `generation`: sampling. `scoring`: from there to the first forward pass of the update: log-probs of the reference, values,
    rewards, advantages. `training`: the update, with its logging. The rest of a step is the data loader and the garbage collector.
    """

    def __init__(self, trainer: PPOTrainer) -> None:
        """Puts clocks around the functions that TRL's loop calls."""
        self.steps: list[dict[str, float]] = []
        self.training_since: float | None = None
        generate, forward = ppo_trainer.batch_generation, ppo_trainer.forward

        def timed_generation(model, queries, *args, **kwargs):
            started = time.perf_counter()
            sequences, logits = generate(model, queries, *args, **kwargs)
            self.generated = (started, time.perf_counter())
            self.response_tokens = sequences.shape[0] * (sequences.shape[1] - queries.shape[1])
            return sequences, logits

        def marked_forward(model, *args, **kwargs):
            if model is trainer.model and self.training_since is None:
                self.training_since = time.perf_counter()
            return forward(model, *args, **kwargs)

        ppo_trainer.batch_generation, ppo_trainer.forward = timed_generation, marked_forward
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        now = time.perf_counter()
        started, ended = self.generated
        stages = {"generation": ended - started, "scoring": self.training_since - ended, "training": now - self.training_since}
        self.steps.append({"step": now - self.started, **stages, "response_tokens": self.response_tokens})
        self.started, self.training_since = now, None
        print(f"step {len(self.steps)}", flush=True)


def make_trainer(request: dict, folder: Path) -> PPOTrainer:
    """Policy, reference, reward and value model of one architecture, all from the policy's checkpoint; the two heads are random."""
    path, rows = request["model"], request["rows"]
    options = {"dtype": getattr(torch, request["dtype"]), "trust_remote_code": request["trust_remote_code"]}
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=request["trust_remote_code"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    policy, reference = (AutoModelForCausalLM.from_pretrained(path, **options) for _ in range(2))
    reward, value = (AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, **options) for _ in range(2))
    arguments = PPOConfig(
        output_dir=str(folder / "trl"),
        # One micro-batch a minibatch. With gradient accumulation TRL steps the optimizer once for all minibatches of an epoch.
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=rows,
        total_episodes=rows * request["steps"],
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        num_sample_generations=0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=request["seed"],
        **request["ppo"],
    )
    return PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": request["prompts"]}),
    )


def main(request_file: Path, result_file: Path) -> None:
    request = json.loads(request_file.read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    trainer = make_trainer(request, result_file.parent)
    clock = StageClock(trainer)
    trainer.train()
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    result_file.write_text(json.dumps({"steps": clock.steps, "versions": versions}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
