"""The training engine on two ranks: ZeRO 3 cuts a model as it is read, and state that was away is as before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ray._common.network_utils import find_free_port
from tiny_models import tiny_config, tiny_language_model
from torch import nn

from dvpo_ray.config.schema import ModelConfig
from dvpo_ray.models import offload
from dvpo_ray.models.deepspeed import _spans
from dvpo_ray.models.loading import each_weight, load_policy
from dvpo_ray.models.offload import HostMemory

KINDS = ("policy", "adapters", "value model")
BLOCKS = ((0, "bfloat16"), (1, "bfloat16"), (2, "float32"))
ROUND_TRIPS = ((0, "float32"), (0, "bfloat16"), (1, "bfloat16"), (2, "float32"), (3, "bfloat16"))


@pytest.mark.parametrize("piece", [2**28, 7, 12])
def test_memory_is_given_back_and_views_see_their_content_again(monkeypatch, piece):
    monkeypatch.setattr(offload, "PINNED_BYTES", piece)
    held = torch.arange(8.0)
    view, parameter, scratch = held[2:4], nn.Parameter(torch.ones(3)), torch.ones(5)
    memory = HostMemory(torch.device("cpu"))
    for _ in range(2):  # the second time into the same memory of the host
        memory.take([held, view, parameter.data], scratch=[scratch])
        assert {t.untyped_storage().nbytes() for t in (held, view, parameter, scratch)} == {0}
        memory.take([held])  # already away
        memory.bring_back()
        assert held.tolist() == list(range(8)) and view.tolist() == [2, 3] and parameter.tolist() == [1, 1, 1] and len(scratch) == 5
        held += 0
    view[0] = 7.0
    assert held[2] == 7


def test_each_weight_is_placed_once_before_the_next_is_read(tiny_model):
    placed = []
    with each_weight(placed.append):
        model = load_policy(ModelConfig(path=str(tiny_model), dtype="float32"))
    assert sorted(map(id, placed)) == sorted(id(parameter) for parameter in model.parameters())
    load_policy(ModelConfig(path=str(tiny_model), dtype="float32"))
    assert len(placed) == len(list(model.parameters()))  # the context is over


def test_spans_cover_all_and_hold_no_more_than_they_may():
    assert list(_spans([4, 4, 4, 20, 1], 8)) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert list(_spans([], 8)) == []


@pytest.fixture(scope="module")
def results(tiny_model, tmp_path_factory) -> dict[tuple, dict]:
    """What two processes with a group of their own found, by case. Experts have other names in their checkpoint than in the model."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_language_model(tiny_config("qwen3_moe")).save_pretrained(folder / "experts")
    paths = dict.fromkeys(KINDS, str(tiny_model)) | {"adapters": str(folder / "experts")}
    cases = [("agreement", paths[kind], kind) for kind in KINDS] + [("round_trip", str(tiny_model), *case) for case in ROUND_TRIPS]
    cases += [("small_gradients", str(tiny_model))]
    cases += [("in_blocks", str(tiny_model), *case, "blocks") for case in BLOCKS]
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("training_ranks.py"))]
    arguments = ["2", str(find_free_port()), json.dumps(cases), str(folder / "out.json")]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    ranks = [subprocess.Popen([*command, str(rank), *arguments], **output) for rank in range(2)]
    said = [rank.communicate(timeout=300)[0].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(text[-3000:] for text in said)
    return dict(zip([case[2:] for case in cases], json.loads((folder / "out.json").read_text()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_zero_3_reads_and_trains_the_same_weights(results, kind):
    found = results[(kind,)]
    assert found["cut"] > 10 and found["same_start"]
    assert found["described"] and (kind != "adapters" or any(".experts.3." in name for name in found["names"]))
    assert found["numbers"][1] == pytest.approx(found["numbers"][0], rel=1e-5)
    assert found["weights_differ"] < 1e-5 < 1e-3 < found["changes"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_state_that_was_away_trains_on_as_if_it_had_stayed(results, case):
    found = results[case]
    assert found["got"] == found["expected"]
    assert found["empty"] == 0 < found["freed"] and found["kept"] > 0


@pytest.mark.slow
def test_small_gradients_count_in_float16(results):
    found = results[()]
    assert found["float16"] == pytest.approx(found["float32"], rel=0.02)
    assert found["float32"][-2] < 0.95 * found["float32"][0]  # the loss has come down


@pytest.mark.slow
@pytest.mark.parametrize("case", BLOCKS)
def test_logits_in_blocks_train_as_whole_ones(results, case):
    """DeepSpeed prepares a backward pass where it begins at the model's output, which is not so with blocks."""
    found = results[(*case, "blocks")]
    assert found["blocks"] == pytest.approx(found["whole"], rel=1e-3)
    assert found["passes"] == [0, 3 * 2 * 2 * 2 + 1]  # steps, micro-batches, blocks, each twice; and the comparison


@pytest.mark.slow
def test_the_first_step_in_bfloat16_is_as_long_with_and_without_zero(results):
    assert results[(0, "bfloat16")]["steps_at_start"] == 0  # DeepSpeed's own would need gradients in two precisions
    without, with_zero = (results[(stage, "bfloat16")]["expected"] for stage in (0, 1))
    assert without == pytest.approx(with_zero, abs=5e-3)
