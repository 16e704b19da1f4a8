"""What each `dvpo` command calls, with what, and what it prints of the result."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from cli_runs import LOCAL_CPU, ROOT, SHIPPED, refusal, without_loading

from dvpo_ray import cli
from dvpo_ray.config import dump_config, load_config
from dvpo_ray.evaluation.gain import gain_of

pytestmark = pytest.mark.usefixtures("in_empty_folder")


def test_train_calls_the_run(backend, capsys, tmp_path):
    calls = backend("dvpo_ray.training.policy", "train", Path("done"))
    (tmp_path / "run" / "checkpoints" / "step_000010").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(dump_config(load_config(LOCAL_CPU, ["gvm.path=g"])), encoding="utf-8")
    assert cli.main(["train", LOCAL_CPU, "gvm.path=g", "--out", "run", "--resume"]) == 0
    ((config,), options) = calls[0]
    assert (config.out, config.gvm.path, options) == ("run", "g", {"resume": True})
    assert without_loading(capsys.readouterr().out) == "done\n"


@pytest.mark.parametrize(
    ("argv", "module", "function"),
    [
        (["gvm", "train"], "value_model", "train_value_model"),
        (["rm", "train"], "value_model", "train_value_model"),
        (["sft", "data.sft=s.jsonl"], "sft", "train_sft"),
        (["dpo"], "dpo", "train_dpo"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_other_training_commands_call_theirs(argv, module, function, backend):
    command, settings = [word for word in argv if "=" not in word], [word for word in argv if "=" in word]
    calls = backend(f"dvpo_ray.training.{module}", function, Path("done"))
    assert cli.main([*command, LOCAL_CPU, *settings, "--out", "run"]) == 0
    config = load_config(LOCAL_CPU, settings)
    section = {"gvm": [config.gvm], "rm": [config.reward_model]}.get(argv[0], [])
    assert calls[0] == ((config, *section, Path("run"), False), {})


def test_quickstart_calls_the_quickstart(backend):
    calls = backend("dvpo_ray.quickstart.run", "quickstart", Path("run/report.html"))
    assert cli.main(["quickstart", "train.steps=3", "--out", "run"]) == 0
    assert calls[0] == ((Path("run"), ["train.steps=3"]), {})


ACCURACY = {
    "pairs": 40,
    "heldout_accuracy": {"mean": 0.8, "last": 0.75, "longer_wins": 0.55},
    "accuracy_ci95": {"mean": [0.7, 0.9], "last": [0.6, 0.85]},
    "objective": "monte_carlo",
    "notes": ["left out 2 of 42 pairs"],
}


def test_gvm_eval_calls_the_evaluation_and_says_what_it_means(backend, capsys, tmp_path):
    calls = backend("dvpo_ray.gvm.evaluation", "evaluate_gvm", ACCURACY)
    assert cli.main(["gvm", "eval", LOCAL_CPU, "seed=4", "--gvm", "g", "--out", "e"]) == 0
    assert cli.main(["gvm", "eval", LOCAL_CPU, "--gvm", "g"]) == 0
    assert calls[0] == ((load_config(LOCAL_CPU, ["seed=4"]), Path("g"), Path("e")), {})
    assert re.fullmatch(r"runs/local-cpu-gvm-eval-\d{8}-\d{6}", str(calls[1][0][2]))
    lines = capsys.readouterr().out.splitlines()
    lines = lines[lines.index("note: left out 2 of 42 pairs") : lines.index(f"{tmp_path}/e/evaluation.json") + 1]
    assert lines == [
        "note: left out 2 of 42 pairs",
        "held-out accuracy: 0.800 by mean value, 0.750 by last value, 40 pairs",
        'by mean value it is better than chance (0.5) and "the longer wins" (0.550): 95 % interval 0.700 to 0.900',
        "for dvpo train the mean value counts",
        "plots: e",
        "next, to use it:",
        f"dvpo train {LOCAL_CPU} seed=4 gvm.path=g",
        f"{tmp_path}/e/evaluation.json",
    ]


def test_what_follows_gvm_eval_takes_the_prompts_of_ones_own_pairs(backend, capsys):
    backend("dvpo_ray.gvm.evaluation", "evaluate_gvm", ACCURACY)
    assert cli.main(["gvm", "eval", LOCAL_CPU, "data.preferences.path=p.jsonl", "--gvm", "g", "--out", "e"]) == 0
    own = "data.prompts.path=p.jsonl data.prompts.heldout_path=null evaluation.judge=none"
    assert f"\ndvpo train {LOCAL_CPU} data.preferences.path=p.jsonl gvm.path=g {own}\n" in capsys.readouterr().out


def test_gvm_eval_of_a_reward_model_goes_by_its_last_value(backend, capsys):
    backend("dvpo_ray.gvm.evaluation", "evaluate_gvm", ACCURACY | {"objective": "bradley_terry"})
    assert cli.main(["gvm", "eval", LOCAL_CPU, "--gvm", "g", "--out", "e"]) == 0
    out = capsys.readouterr().out
    assert "held-out accuracy: 0.750 by last value, 40 pairs\n" in out
    assert f"\ndvpo train {LOCAL_CPU} algorithm=ppo reward_model.path=g\n" in out


def test_gvm_score_calls_the_scoring(backend, capsys):
    calls = backend("dvpo_ray.gvm.scoring", "score_file", 12)
    assert cli.main(["gvm", "score", LOCAL_CPU, "gvm.path=g", "--input", "in.jsonl", "--output", "out.jsonl"]) == 0
    assert calls[0] == ((load_config(LOCAL_CPU, ["gvm.path=g"]), Path("g"), Path("in.jsonl"), Path("out.jsonl")), {})
    assert capsys.readouterr().out.splitlines()[-1] == "out.jsonl: 12 rows"


def test_report_calls_the_report(backend, capsys, tmp_path):
    calls = backend("dvpo_ray.monitoring.report", "write_report", Path("run/report.html"))
    (tmp_path / "run").mkdir()
    assert cli.main(["report", "run"]) == 0
    (folder, _), _ = calls[0]
    assert folder == Path("run")
    assert capsys.readouterr().out == f"{tmp_path}/run/report.html\n"


def test_report_says_what_it_leaves_out(capsys, tmp_path):
    (tmp_path / "run" / "rollouts").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "run" / "rollouts" / "step_000001.jsonl").write_text('{"prompt": "cut o')  # written as a whole, so this is damage
    (tmp_path / "run" / "rollouts" / "step_000002.jsonl").write_text("")
    assert cli.main(["report", "run"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}/run/report.html\n"
    assert err.splitlines()[0] == "dvpo: warning: run/rollouts/step_000002.jsonl: no rows; the file is left out"
    assert err.splitlines()[1].startswith("dvpo: warning: run/rollouts/step_000001.jsonl:1: not valid JSON (")


def test_dry_run_of_rm_train_speaks_of_the_reward_model(capsys):
    assert cli.main(["rm", "train", LOCAL_CPU, "--dry-run", "gvm.epochs=7", "reward_model.epochs=3"]) == 0
    comments = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
    assert any("3 epochs x training pairs" in line for line in comments) and any("rm_trainer" in line for line in comments)
    assert not any("gvm" in line.lower() for line in comments)
    assert "reward_model.gpus_per_actor: 1.5 of a GPU; expected a whole number" in refusal(
        capsys, "rm", "train", LOCAL_CPU, "reward_model.gpus_per_actor=1.5"
    )


JUDGED = {
    "policy": "runs/a/final",
    "judge": "vader",
    "prompts": 3,
    "gold": {"mean": 0.5, "ci95": [-0.1, 0.9]},
    "response_length": {"mean": 20.0, "truncated_fraction": 0.25},
    "notes": ["most responses are cut off"],
}


def test_eval_calls_the_evaluation_of_a_policy(backend, capsys, tmp_path):
    calls = backend("dvpo_ray.training.evaluate", "evaluate_policy", JUDGED)
    assert cli.main(["eval", LOCAL_CPU, "--policy", "runs/a/final", "--out", "there"]) == 0
    printed = without_loading(capsys.readouterr().out)
    assert cli.main(["eval", LOCAL_CPU, "model.path=m"]) == 0
    assert calls[0] == ((load_config(LOCAL_CPU), "runs/a/final", Path("there")), {})
    (_, policy, out), _ = calls[1]
    assert policy == "m" and re.fullmatch(r"runs/local-cpu-eval-\d{8}-\d{6}", str(out))
    assert printed.splitlines() == [
        "gold score of runs/a/final by vader: +0.500, 95 % interval -0.100 to +0.900, 3 prompts",
        "responses: there/evaluation.jsonl",
        f"next, to compare with {load_config(LOCAL_CPU).model.path}:",
        f"dvpo eval {LOCAL_CPU}",
        f"{tmp_path}/there/evaluation.json",
    ]
    assert f"next, to compare with a trained policy:\ndvpo eval {LOCAL_CPU} model.path=m --policy RUN/final\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("estimate", "told"),
    [
        ({}, []),
        ({"mean": 0.5, "ci95": [0.4, 0.6]}, ["value model's estimate of a response: +0.500, 95 % interval +0.400 to +0.600"]),
        (
            gain_of([0.1, 0.1], [0.3, 0.3]),
            [
                "value model's estimate of a response: +0.100, 95 % interval +0.100 to +0.100 for m; +0.300, 95 % interval +0.300 to +0.300 for p",
                "gain: +0.200, 95 % interval +0.200 to +0.200; by the estimate the policy got better",
            ],
        ),
    ],
    ids=["no value model", "one side", "both sides"],
)
def test_eval_without_a_judge_says_what_there_is(backend, capsys, tmp_path, estimate, told):
    unjudged = {key: value for key, value in JUDGED.items() if key != "gold"} | {"judge": "none", "policy": "p", "beside": "m", "estimate": estimate}
    backend("dvpo_ray.training.evaluate", "evaluate_policy", unjudged)
    assert cli.main(["eval", LOCAL_CPU, "evaluation.judge=none", "model.path=m", "--policy", "p", "--out", "there"]) == 0
    assert without_loading(capsys.readouterr().out).splitlines() == [
        "responses of p to 3 held-out prompts, beside those of m",
        *told,
        "No judge scored them (evaluation.judge is none). The estimate is what a policy is optimised for, so read the responses too.",
        "responses: there/evaluation.jsonl",
        "next: read `before` and `response` of each row there, or give the file to a judge of yours (docs/training.md, Without a judge)",
        f"{tmp_path}/there/evaluation.json",
    ]


@pytest.mark.parametrize(
    ("argv", "module", "function", "result"),
    [
        (["eval"], "dvpo_ray.training.evaluate", "evaluate_policy", JUDGED),
        (["gvm", "eval", "--gvm", "g"], "dvpo_ray.gvm.evaluation", "evaluate_gvm", ACCURACY),
        (["train", "gvm.path=g", "--out", "run"], "dvpo_ray.training.policy", "train", {"state": "finished"}),
    ],
    ids=["eval", "gvm eval", "train"],
)
def test_json_has_standard_output_for_itself(argv, module, function, result, tmp_path):
    """What Python, C and this process's own console write beside it goes to standard error."""
    command = [word for word in argv if word in ("eval", "gvm", "train")]
    program = f"""
        import json, os, sys, types
        from pathlib import Path
        def work(*args, **kwargs):
            print("from Python")
            os.write(1, b"from C\\n")
            Path("run").mkdir()
            Path("run/summary.json").write_text(json.dumps({result!r}))
            return {result!r}
        sys.modules[{module!r}] = types.SimpleNamespace({function}=work)
        from dvpo_ray import commands
        from dvpo_ray.cli import main
        commands.train.problems = commands.results.problems = lambda _: []
        commands.results.no_artifact = lambda _: None
        sys.exit(main({[*command, LOCAL_CPU, f"model.path={tmp_path}", *argv[len(command) :], "--json"]!r}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == result
    assert {"from Python", "from C", "loading the libraries: starts"} <= set(done.stderr.splitlines())


def test_bench_step_calls_the_benchmark_and_keeps_its_results(backend, capsys, tmp_path):
    calls = backend("dvpo_ray.bench.step", "bench_step", {"benchmark": "step"})
    assert cli.main(["bench", "step", LOCAL_CPU, "gvm.path=g", "--out", "b", "--repeats", "2"]) == 0
    assert calls[0] == ((load_config(LOCAL_CPU, ["gvm.path=g"]), Path("b"), 2), {})
    assert json.loads((tmp_path / "b" / "bench.json").read_text(encoding="utf-8")) == {"benchmark": "step"}
    assert without_loading(capsys.readouterr().out) == f"{tmp_path}/b/bench.json\n"
    assert refusal(capsys, "bench", "step", LOCAL_CPU, "gvm.path=g", "--repeats", "0") == (
        "argument --repeats: '0' is not a whole number of at least 1; see `dvpo bench step --help`"
    )
    assert "gvm.path is not set" in refusal(capsys, "bench", "step", LOCAL_CPU)


def test_bench_trl_calls_the_benchmark_and_keeps_its_results(monkeypatch, capsys, tmp_path):
    calls = []
    monkeypatch.setattr("dvpo_ray.bench.trl.bench_trl", lambda *args: calls.append(args) or {"benchmark": "trl"})
    assert (
        cli.main(["bench", "trl", LOCAL_CPU, "--trl-python", "p", "--out", "b", "--repeats", "2", "--rounds", "3", "--set", "ppo:policy.threads=1"])
        == 0
    )
    assert calls == [(load_config(LOCAL_CPU), Path("p"), Path("b"), 2, {"ppo": ["policy.threads=1"], "dvpo": []}, 3)]
    assert json.loads((tmp_path / "b" / "bench.json").read_text(encoding="utf-8")) == {"benchmark": "trl"}
    assert without_loading(capsys.readouterr().out) == f"{tmp_path}/b/bench.json\n"
    assert "data.prompts.path is not set" in refusal(capsys, "bench", "trl", LOCAL_CPU, "data.prompts=null", "--trl-python", "p")
    assert "arguments are required: --trl-python" in refusal(capsys, "bench", "trl", LOCAL_CPU)


def test_bench_trl_reward_checks_its_paths_before_it_does_anything(backend, capsys):
    calls = backend("dvpo_ray.bench.trl_reward", "bench_trl_reward", {})
    command = ["bench", "trl-reward", LOCAL_CPU, "data.preferences.heldout_path=null"]
    given, here = [f"data.preferences.path={SHIPPED}/preferences.train.jsonl", "model.path=hub/model"], f"{Path.cwd()}, where this command starts"
    assert "data.preferences.path p.jsonl: no such file" in refusal(capsys, *command, "model.path=hub/model", "data.preferences.path=p.jsonl")
    assert f"gvm.path g: no such folder in {here}; give a GVM artifact" in refusal(capsys, *command, *given, "gvm.path=g")
    assert f"reward_model.path r: no such folder in {here}; give a reward model" in refusal(capsys, *command, *given, "reward_model.path=r")
    assert not calls


def test_bench_trl_reward_calls_the_benchmark_and_keeps_its_results(backend, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    calls = backend("dvpo_ray.bench.trl_reward", "bench_trl_reward", {"benchmark": "trl-reward"})
    assert cli.main(["bench", "trl-reward", LOCAL_CPU, "model.path=hub/model", "--out", str(tmp_path / "b")]) == 0
    assert calls[0] == ((load_config(LOCAL_CPU, ["model.path=hub/model"]), tmp_path / "b"), {})
    assert json.loads((tmp_path / "b" / "bench.json").read_text(encoding="utf-8")) == {"benchmark": "trl-reward"}
    assert without_loading(capsys.readouterr().out) == f"{tmp_path}/b/bench.json\n"
    assert "data.preferences.path is not set" in refusal(capsys, "bench", "trl-reward", LOCAL_CPU, "data.preferences=null")


def test_settings_of_one_algorithm_name_it_and_a_key(capsys):
    assert "--set rloo:policy.threads=1: expected ALGORITHM:KEY=VALUE with one of ppo, dvpo" in refusal(
        capsys, "bench", "trl", LOCAL_CPU, "--trl-python", "p", "--set", "rloo:policy.threads=1"
    )
    assert "--set ppo: expected ALGORITHM:KEY=VALUE" in refusal(capsys, "bench", "ledger", LOCAL_CPU, "--set", "ppo")
    assert "--set ppo:seed=1: the command itself chooses seed" in refusal(capsys, "bench", "ledger", LOCAL_CPU, "--set", "ppo:seed=1")
    assert "policy.thread" in refusal(capsys, "bench", "trl", LOCAL_CPU, "--trl-python", "p", "--set", "ppo:policy.thread=1")
