"""Paths as a user writes them: `~` is the home folder in every path of a config and in every option."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runs import LOCAL_CPU, ROOT, refusal

from dvpo_ray import cli
from dvpo_ray.config import load_config
from dvpo_ray.config.keys import known_keys
from dvpo_ray.config.paths import QUICKSTART_MODEL, from_home, in_home, path_option
from dvpo_ray.errors import InputError
from dvpo_ray.experiments.transfer import Domain
from dvpo_ray.quickstart import openings, self_preferences

PATHS = re.compile(r"(^|[._])(path|out|init_from|ensemble|folder|file|dir)$|^data\.sft$")
"""Settings that hold a path, by their names."""
PATH_METAVARS = ("DIR", "FILE", "RUN", "MODEL", "CONFIG_JSON")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DVPO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path


def test_the_home_folder_stands_at_the_start_only(home):
    assert in_home("~/a") == f"{home}/a" and in_home("~") == str(home)
    assert in_home("~root/a") == str(Path("~root/a").expanduser())
    for path in ("org/name", "runs/~/a", "./~/a", "a~", "", "/b"):
        assert in_home(path) == path
    for shown in ("~/a", "/b", "org/name", f"{home}er/a"):
        assert from_home(in_home(shown)) == shown
    with pytest.raises(ValueError, match=r"~nobody-here/a: no user nobody-here has a home folder; a file of this name is \./~nobody-here/a"):
        in_home("~nobody-here/a")


def test_the_walk_finds_the_paths_of_a_config():
    found = [name for name, key in known_keys().items() if key.section is None and PATHS.search(name)]
    assert {"model.path", "data.sft", "data.prompts.heldout_path", "gvm.path", "gvm.init_from", "scorer.ensemble", "out"} <= set(found)


@pytest.mark.parametrize("name", [name for name, key in known_keys().items() if key.section is None and PATHS.search(name)])
def test_home_in_every_path_of_a_config(home, name):
    is_list = known_keys()[name].expected.startswith("a list")
    found = load_config(LOCAL_CPU, [f"{name}={'[~/a]' if is_list else '~/a'}"])
    for part in name.split("."):
        found = getattr(found, part)
    assert found == ([f"{home}/a"] if is_list else f"{home}/a")
    with pytest.raises(InputError, match=f"^override .*{re.escape(name)}.*: ~nobody-here/a: no user nobody-here"):
        load_config(LOCAL_CPU, [f"{name}={'[~nobody-here/a]' if is_list else '~nobody-here/a'}"])


def test_home_in_the_config_argument(home, capsys):
    assert refusal(capsys, "train", "~/x.yaml") == f"{home}/x.yaml: no such file"
    assert refusal(capsys, "train", "~nobody-here/x.yaml").startswith("~nobody-here/x.yaml: no user nobody-here")


# ---------------------------------------------------------------------------------------------------- options


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of all its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from parsers(sub)


def path_actions() -> dict[str, argparse.Action]:
    """Every argument of every command that takes a path, by command and name. CONFIG is read by `load_config`."""
    return {
        f"{parser.prog} {action.option_strings[0] if action.option_strings else action.dest}": action
        for parser in parsers(cli.build_parser())
        for action in parser._actions
        if action.metavar in PATH_METAVARS or action.type in (Path, path_option)
    }


def test_the_walk_finds_the_options_of_all_commands():
    found = path_actions()
    assert {"dvpo train --out", "dvpo quickstart --out", "dvpo report run_folder", "dvpo gvm score --input", "dvpo plan --json"} <= set(found)
    assert {"dvpo bench ledger --random-weights", "dvpo experiment bound --policy", "dvpo eval --policy"} <= set(found)


@pytest.mark.parametrize("name", path_actions())
def test_home_in_every_path_of_a_command_line(home, name):
    parse = path_actions()[name].type
    assert parse is not None and str(parse("~/a")) == f"{home}/a" and str(parse("org/name")) == "org/name"
    with pytest.raises(argparse.ArgumentTypeError, match="no user nobody-here"):
        parse("~nobody-here/a")


def test_no_option_is_a_bare_path():
    """Holds for the tools outside of `dvpo` too, whose parsers are inside their functions."""
    files = [file for file in (ROOT / "dvpo_ray").rglob("*.py") if re.search(r"type=(pathlib\.)?Path\b", file.read_text(encoding="utf-8"))]
    assert files == []


def test_a_command_writes_into_the_home_folder(home, capsys, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    (home / "run").mkdir()
    (home / "run" / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    assert cli.main(["report", "~/run"]) == 0
    assert capsys.readouterr().out == f"{home}/run/report.html\n" and (home / "run" / "report.html").is_file() and not Path("~").exists()


def test_home_in_the_domains_of_an_experiment(home):
    assert Domain.parse("a=~/t.jsonl,~/h.jsonl") == Domain("a", f"{home}/t.jsonl", f"{home}/h.jsonl")


def test_home_in_the_options_of_a_tool(home, capsys):
    """The tools' parsers are inside their `main`; the folder that each looks for shows what it made of `~`."""
    assert openings.main(["~/no-model", "--out", "~/p.jsonl"]) == 2
    assert f"{home}/no-model: no such checkpoint folder" in capsys.readouterr().err
    assert self_preferences.main(["~/x.yaml", "--out", "~/p"]) == 2
    assert f"{home}/x.yaml: no such file" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ the quickstart's model


def test_a_config_finds_the_model_that_the_quickstart_fetched(home, monkeypatch):
    assert load_config(LOCAL_CPU).model.path == QUICKSTART_MODEL
    for cache in (home / ".cache" / "dvpo_ray", home / "elsewhere"):
        folder = cache / "SmolLM2-135M-Instruct"
        folder.mkdir(parents=True)
        assert load_config(LOCAL_CPU).model.path == str(folder)
        assert load_config(LOCAL_CPU, ["model.path=org/SmolLM2-135M-Instruct"]).model.path == "org/SmolLM2-135M-Instruct"
        monkeypatch.setenv("DVPO_CACHE", "~/elsewhere")
