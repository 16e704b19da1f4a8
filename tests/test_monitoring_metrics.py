"""metrics.jsonl, the trackers, the catalogue of metric names and summary.json."""

import json
import logging
import math
import re
import sys
import types
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo_ray.config.schema import Config, TrainConfig
from dvpo_ray.errors import InputError, ResourceError
from dvpo_ray.monitoring import catalogue
from dvpo_ray.monitoring.catalogue import GROUPS, METRICS, find_metric
from dvpo_ray.monitoring.metrics import MetricsLog
from dvpo_ray.monitoring.run_files import finite, read_json_lines, write_summary
from dvpo_ray.monitoring.trackers import TRACKERS


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_steps(folder: Path, steps, resume_step=None) -> None:
    with MetricsLog(folder, resume_step=resume_step) as log:
        for step in steps:
            log.write(step, {"policy/loss": step / 10})


# ------------------------------------------------------------------------------------------------ metrics.jsonl


def test_one_object_per_step(tmp_path):
    with MetricsLog(tmp_path / "new" / "run") as log:
        log.write(1, {"policy/loss": np.float32(0.5), "policy_version": 0})
        log.write(2, {"policy/loss": -0.25, "policy_version": 1})
    first, second = lines(tmp_path / "new" / "run")
    assert (first["step"], first["policy/loss"], first["policy_version"]) == (1, 0.5, 0)
    assert (second["step"], second["policy/loss"]) == (2, -0.25)
    assert first["time"] <= second["time"]


def test_a_step_is_on_disk_when_write_returns(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"policy/loss": 0.5})
        assert len(lines(tmp_path)) == 1


def test_values_that_are_not_finite_become_null_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), MetricsLog(tmp_path) as log:
        log.write(3, {"policy/loss": math.nan, "policy/grad_norm": math.inf, "value/mean": 1.0})
    (row,) = lines(tmp_path)
    assert row["policy/loss"] is None and row["policy/grad_norm"] is None and row["value/mean"] == 1.0
    assert sorted(record.getMessage() for record in caplog.records) == [
        "step 3: policy/grad_norm is inf, written as null",
        "step 3: policy/loss is nan, written as null",
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(ResourceError, match=r"metrics\.jsonl: no space left on the disk"), MetricsLog(tmp_path) as log:
        log.write(1, {"policy/loss": 0.5})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_under_tensorboard_is_the_same_line_without_a_traceback_of_its_thread(tmp_path, capfd):
    pytest.importorskip("tensorboard")
    with pytest.raises(ResourceError, match=r"/tensorboard: no space left on the disk"), MetricsLog(tmp_path, ["tensorboard"]) as log:
        (events,) = (tmp_path / "tensorboard").iterdir()
        events.unlink()
        events.symlink_to("/dev/full")
        for step in range(1, 40):
            log.write(step, {"policy/loss": 0.5})
    assert "Traceback" not in capfd.readouterr().err


def test_resume_drops_the_steps_after_the_checkpoint(tmp_path):
    write_steps(tmp_path, [1, 2, 3, 4])
    write_steps(tmp_path, [3, 4, 5], resume_step=2)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_resume_at_step_zero_starts_over(tmp_path):
    write_steps(tmp_path, [1, 2])
    write_steps(tmp_path, [1], resume_step=0)
    assert [row["step"] for row in lines(tmp_path)] == [1]


def test_resume_without_metrics_starts_a_file(tmp_path):
    write_steps(tmp_path, [6], resume_step=5)
    assert [row["step"] for row in lines(tmp_path)] == [6]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 400))
def test_resume_after_a_crash_at_any_byte(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("run")
    write_steps(folder, range(1, 6))
    whole = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(whole[:cut])
    kept = whole[:cut].count(b"\n")
    write_steps(folder, [9], resume_step=8)
    steps = [row["step"] for row in lines(folder)]
    # A line that lost only its newline is whole, and may be kept.
    assert steps in ([*range(1, kept + 1), 9], [*range(1, kept + 2), 9])


def test_resume_names_a_broken_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: not valid JSON .*remove the line to resume"):
        MetricsLog(tmp_path, resume_step=2)


def test_resume_names_a_line_without_a_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 2}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: `step` is missing"):
        MetricsLog(tmp_path, resume_step=2)


def test_a_new_run_does_not_write_into_an_old_one(tmp_path):
    write_steps(tmp_path, [1])
    with pytest.raises(InputError, match="holds the metrics of an earlier run; resume that run, or choose another --out"):
        MetricsLog(tmp_path)


# ---------------------------------------------------------------------------------------------------- catalogue


def test_an_unknown_metric_is_refused(tmp_path):
    with MetricsLog(tmp_path) as log, pytest.raises(ValueError, match=r"unknown metric 'policy/los'"):
        log.write(1, {"policy/los": 1.0})
    assert lines(tmp_path) == []


@pytest.mark.parametrize("name", ["memory/rollout_engine_gib", "memory/total_gib", "idle/policy_learner_fraction"])
def test_role_metrics_take_any_role(name):
    assert find_metric(name).name.replace("<role>", "") == re.sub("/.*_", "/_", name)


@pytest.mark.parametrize("name", ["memory/_gib", "memory/Rollout_gib", "memory/a/b_gib", "memory/rollout_engine", "xmemory/a_gib", "kl", ""])
def test_role_metrics_take_nothing_else(name):
    assert find_metric(name) is None


def test_every_metric_of_the_contract_is_listed():
    groups = {
        "reward": ["gold_mean"],
        "value": ["mean", "std", "terminal_mean", "explained_variance"],
        "advantage": ["mean", "std", "min", "max"],
        "policy": ["loss", "approx_kl", "clip_fraction", "ratio_max", "entropy", "grad_norm", "learning_rate"],
        "kl": ["reference_mean", "reference_max"],
        "mismatch": ["kl", "log_prob_abs_max", "token_mult_error"],
        "response_length": ["mean", "max", "truncated_fraction"],
        "time": [f"{stage}_seconds" for stage in ("generate", "score", "reference", "advantage", "update", "sync", "step")],
        "throughput": [f"{what}_per_second" for what in ("samples", "generated_tokens", "trained_tokens")],
    }
    for name in ["policy_version", *(f"{group}/{name}" for group, names in groups.items() for name in names)]:
        assert find_metric(name).name == name


def test_catalogue_is_consistent():
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    for metric in METRICS:
        assert metric.name.split("/")[0] in GROUPS and metric.meaning
        assert metric.trouble or (metric.above is None and metric.below is None), f"{metric.name} has bounds but does not say why"


def test_advice_names_settings_that_exist():
    sections = Config.model_fields
    for metric in METRICS:
        for section, key in re.findall(r"\b([a-z_]+)\.([a-z_]+)", metric.advice):
            if section in sections and f"{section}.{key}" != "gvm.heldout_accuracy":  # a number of summary.json
                assert key in sections[section].annotation.model_fields, f"{metric.name}: there is no setting {section}.{key}"


def test_bounds():
    assert find_metric("policy/clip_fraction").is_trouble(0.31)
    assert not find_metric("policy/clip_fraction").is_trouble(0.3)
    assert find_metric("policy/entropy").is_trouble(0.01)
    assert not find_metric("policy/loss").is_trouble(1e9)


def test_the_document_is_current():
    document = Path(__file__).parents[1] / "docs" / "metrics.md"
    assert document.read_text(encoding="utf-8") == catalogue.markdown(), "run: python -m dvpo_ray.monitoring.catalogue > docs/metrics.md"


# ----------------------------------------------------------------------------------------------------- trackers


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_the_same_names_and_numbers(tmp_path):
    with MetricsLog(tmp_path, ["tensorboard"]) as log:
        log.write(1, {"policy/loss": 0.5, "value/mean": math.nan})
        log.write(2, {"policy/loss": 0.25, "value/mean": 1.5})
    assert tensorboard_scalars(tmp_path / "tensorboard") == {"policy/loss": [(1, 0.5), (2, 0.25)], "value/mean": [(2, 1.5)]}


def test_tensorboard_shows_a_resumed_step_once(tmp_path):
    with MetricsLog(tmp_path, ["tensorboard"]) as log:
        for step in (1, 2, 3):
            log.write(step, {"policy/loss": 1.0})
    with MetricsLog(tmp_path, ["tensorboard"], resume_step=1) as log:
        log.write(2, {"policy/loss": 2.0})
    assert tensorboard_scalars(tmp_path / "tensorboard") == {"policy/loss": [(1, 1.0), (2, 2.0)]}


class FakeWandb(types.ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.finished = [], [], 0

    def init(self, **arguments):
        self.inits.append(arguments)
        run = types.SimpleNamespace(id=arguments["id"] or "new-id", define_metric=lambda *a, **k: None, log=self.logged.append)
        run.finish = lambda: setattr(self, "finished", self.finished + 1)
        return run


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    with MetricsLog(tmp_path, ["wandb"], config={"seed": 1}) as log:
        log.write(1, {"policy/loss": 0.5, "value/mean": math.inf})
    with MetricsLog(tmp_path, ["wandb"], resume_step=1) as log:
        log.write(2, {"policy/loss": 0.25})
    assert [(init["id"], init["resume"], init["name"]) for init in wandb.inits] == [(None, None, tmp_path.name), ("new-id", "allow", tmp_path.name)]
    assert wandb.inits[0]["config"] == {"seed": 1}
    assert wandb.logged == [{"step": 1, "policy/loss": 0.5}, {"step": 2, "policy/loss": 0.25}]
    assert wandb.finished == 2


class FakeMlflow(types.ModuleType):
    def __init__(self):
        super().__init__("mlflow")
        self.starts, self.logged, self.configs = [], [], []
        self.set_experiment = self.end_run = lambda *a: None

    def start_run(self, **arguments):
        self.starts.append(arguments)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="run-7"))

    def log_metrics(self, metrics, step):
        self.logged.append((step, metrics))

    def log_dict(self, config, name):
        self.configs.append(config)


def test_mlflow_goes_on_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", mlflow := FakeMlflow())
    with MetricsLog(tmp_path, ["mlflow"], config={"seed": 1}) as log:
        log.write(1, {"policy/loss": 0.5})
    with MetricsLog(tmp_path, ["mlflow"], resume_step=1) as log:
        log.write(2, {"policy/loss": 0.25})
    assert mlflow.starts == [{"run_name": tmp_path.name}, {"run_id": "run-7"}]
    assert mlflow.logged == [(1, {"policy/loss": 0.5}), (2, {"policy/loss": 0.25})]
    assert mlflow.configs == [{"seed": 1}]


class FakeGauge:
    """A gauge of Ray, which refuses tags that it does not know, and keeps its last values by name and tags."""

    values: dict = {}

    def __init__(self, name, description, tag_keys):
        assert re.fullmatch(r"[a-zA-Z_]\w*", name) and description
        self.name, self.tag_keys = name, tag_keys

    def set(self, value, tags):
        assert set(tags) == set(self.tag_keys)
        self.values[self.name, *tags.values()] = value


@pytest.mark.parametrize("joined", [True, False])
def test_a_process_in_ray_gives_its_metrics_to_ray(tmp_path, monkeypatch, joined):
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(is_initialized=lambda: joined))
    monkeypatch.setitem(sys.modules, "ray.util.metrics", types.SimpleNamespace(Gauge=FakeGauge))
    monkeypatch.setattr(FakeGauge, "values", {})
    with MetricsLog(tmp_path, config={"name": "night"}) as log:
        log.write(1, {"policy/loss": 0.5, "memory/learner_gib": 2.0, "memory/reward_model_gib": 3.0, "value/mean": math.inf})
        log.write(2, {"policy/loss": 0.25})
    wanted = {
        ("dvpo_step", "night"): 2,
        ("dvpo_policy_loss", "night"): 0.25,
        ("dvpo_memory_gib", "night", "learner"): 2,
        ("dvpo_memory_gib", "night", "reward_model"): 3,
    }
    assert FakeGauge.values == (wanted if joined else {})


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_one_line(tmp_path, monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(ResourceError, match=rf"train\.trackers: {tracker} is not installed .*launch/install.sh {tracker}") as error:
        MetricsLog(tmp_path, [tracker])
    assert "\n" not in str(error.value)


def test_the_config_offers_every_tracker():
    assert set(get_args(get_args(TrainConfig.model_fields["trackers"].annotation)[0])) == set(TRACKERS)


def test_trackers_are_imported_only_when_asked_for():
    import subprocess

    program = "import sys, dvpo_ray.monitoring.metrics; print([m for m in ('torch', 'tensorboard', 'wandb', 'mlflow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ----------------------------------------------------------------------------------------------- summary, files


def test_summary_is_valid_json_of_plain_numbers(tmp_path):
    path = write_summary(tmp_path, {"gold": {"gain_ci95": (np.float32(0.5), math.nan)}, "steps": np.int64(3), "out": tmp_path})
    assert path == tmp_path / "summary.json"
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"gold": {"gain_ci95": [0.5, None]}, "steps": 3, "out": str(tmp_path)}


def test_a_failed_write_leaves_the_old_summary(tmp_path):
    write_summary(tmp_path, {"state": "running"})
    with pytest.raises(TypeError):
        write_summary(tmp_path, {"state": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"state": "running"}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_finite_keeps_what_is_not_a_number():
    assert finite({1: [True, None, "x", (-math.inf,)]}) == {"1": [True, None, "x", [None]]}


def test_bad_lines_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n[1]\n\xff\n{"a": 2}\n{"a": ')
    rows, bad = read_json_lines(path)
    assert rows == [{"a": 1}, {"a": 2}]
    assert bad[0] == f"{path}:3: expected a JSON object, found list"
    assert len(bad) == 2 and bad[1].startswith(f"{path}:4: not valid JSON")


def test_a_file_that_is_gone_is_one_line(tmp_path):
    with MetricsLog(tmp_path / "run") as log:
        (tmp_path / "run").rename(tmp_path / "moved")
        with pytest.raises(ResourceError, match=r"run/metrics\.jsonl: somebody removed or moved the file while the run wrote it"):
            log.write(1, {"time/step_seconds": 1.0})
