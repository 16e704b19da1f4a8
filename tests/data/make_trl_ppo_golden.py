"""Golden numbers of TRL 1.12.0's PPO for tests/test_trl_ppo.py: TRL's own lines of `PPOTrainer.train`, run on fixed inputs.

Runs in the environment that launch/bench_trl.sh makes, which has that TRL:

    .venv-trl/bin/python tests/data/make_trl_ppo_golden.py > tests/data/trl_ppo_golden.json
"""

from __future__ import annotations

import inspect
import json
import os
import textwrap
from types import SimpleNamespace

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
import trl
from trl.experimental.ppo import ppo_trainer

ROWS, TOKENS = 4, 6
SETTINGS = {"kl_coef": 0.05, "gamma": 1.0, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1}
CASES = {  # tokens of each response, and lambda
    "full": ([6, 6, 6, 6], 0.95),
    "early": ([6, 3, 1, 5], 0.95),
    "early_lambda_1": ([6, 3, 1, 5], 1.0),
}
ADVANTAGES = ("# be very careful with `padding_mask_p1`", "advantages = torch.masked_fill(advantages, padding_mask, 0)")
LOSSES = ("new_logprobs = torch.masked_fill(", "loss = pg_loss + args.vf_coef * vf_loss")


def trl_lines(first: str, last: str) -> str:
    """The lines of TRL's training loop from the one with `first` to the one with `last`."""
    lines = inspect.getsource(ppo_trainer.PPOTrainer.train).splitlines()
    start = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i, line in enumerate(lines) if i > start and last in line)
    return textwrap.dedent("\n".join(lines[start : end + 1]))


def golden(lengths: list[int], lam: float, generator: torch.Generator) -> dict:
    """Inputs, and what TRL makes of them. Values and log-probs are [rows, tokens]; value t is that of the state before token t."""

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).round(decimals=4)

    logprobs = -normal(ROWS, TOKENS).abs()
    inputs = {
        "logprobs": logprobs,
        "ref_logprobs": logprobs + normal(ROWS, TOKENS, scale=0.3),
        "values": normal(ROWS, TOKENS),
        "scores": normal(ROWS),
        "new_logprobs": logprobs + normal(ROWS, TOKENS, scale=0.3),
        "new_values": normal(ROWS, TOKENS, scale=0.3),
    }
    inputs["new_values"] += inputs["values"]
    names = vars(ppo_trainer) | {
        "args": SimpleNamespace(**SETTINGS, lam=lam, kl_estimator="k1", whiten_rewards=False),
        "responses": torch.zeros(ROWS, TOKENS, dtype=torch.long),
        "sequence_lengths": torch.tensor(lengths) - 1,  # TRL's are indices of the last token
        **{name: inputs[name].clone() for name in ("logprobs", "ref_logprobs", "values", "scores")},
    }
    exec(trl_lines(*ADVANTAGES), names)

    new_logprobs, new_values = inputs["new_logprobs"].requires_grad_(), inputs["new_values"].requires_grad_()
    names |= {
        "micro_batch_inds": torch.arange(ROWS),
        "context_length": 1,
        "new_logprobs": new_logprobs,
        "vpred_temp": torch.cat([new_values, torch.zeros(ROWS, 1)], 1)[:, :, None],
        "mb_advantage": names["advantages"],
        "mb_logprobs": names["logprobs"],
        "mb_return": names["returns"],
        "mb_values": names["values"],
    }
    exec(trl_lines(*LOSSES), names)
    outputs = {
        "advantages": names["advantages"],
        "returns": names["returns"],
        "policy_loss": names["pg_loss"],
        "value_loss": names["vf_loss"],
        "value_clip_fraction": names["vf_clipfrac"],
        "policy_gradient": torch.autograd.grad(names["pg_loss"], new_logprobs)[0],
        "value_gradient": torch.autograd.grad(names["vf_loss"], new_values)[0],
    }
    return {"lengths": lengths, "lam": lam, "inputs": _lists(inputs), "outputs": _lists(outputs)}


def _lists(tensors: dict[str, torch.Tensor]) -> dict:
    return {name: json.loads(json.dumps(tensor.tolist()), parse_float=lambda text: float(f"{float(text):.8g}")) for name, tensor in tensors.items()}


if __name__ == "__main__":
    assert trl.__version__ == "1.12.0", trl.__version__
    generator = torch.Generator().manual_seed(0)
    cases = {name: golden(*case, generator) for name, case in CASES.items()}
    print(json.dumps({"trl": trl.__version__, "settings": SETTINGS, "cases": cases}))
