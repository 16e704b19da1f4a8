"""What the dry run says of the data: the same as the run, without torch and in a moment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import LOCAL_CPU, SHIPPED

from dvpo_ray import cli
from dvpo_ray.config import load_config
from dvpo_ray.data.answers import load_answers
from dvpo_ray.data.encoding import Encoder
from dvpo_ray.data.preferences import load_preferences
from dvpo_ray.data.preview import Preview, preview
from dvpo_ray.data.prompts import load_prompts
from dvpo_ray.models.loading import load_tokenizer
from dvpo_ray.monitoring.charts import number

WORDS = "Tell me what the weather will be like in the park tomorrow, please."


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(model: Path, path: Path, *overrides: str, section: str = "prompts"):
    paths = [f"model.path={model}", f"data.{section}.path={path}", f"data.{section}.heldout_path=null"]
    return load_config(LOCAL_CPU, ["model.chat_template=auto", *paths, *overrides])


@pytest.mark.parametrize("chat", [True, False])
def test_the_dry_run_counts_the_tokens_that_the_run_counts(chat, tiny_model, tiny_chat_model, tmp_path):
    model = tiny_chat_model if chat else tiny_model
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": WORDS}]
    rows = [{"prompt": WORDS * 2}, {"prompt": messages}, {"prompt": "Hi"}]
    settings = config(model, write(tmp_path / "p.jsonl", rows), "data.max_prompt_tokens=30", "data.prompts.heldout_fraction=0.01")
    encoder = Encoder(load_tokenizer(str(model)), settings.data, "auto", 4096)
    for prompt in load_prompts(settings.data.prompts, "error").train + load_prompts(settings.data.prompts, "error").heldout:
        encoder.encode_prompt(prompt)
    [said] = encoder.notes("prompts")
    [foreseen] = preview(settings, "data.prompts").notes
    assert said.startswith("shortened 2 of 3 prompts: the prompt is over data.max_prompt_tokens 30; the longest has ")
    assert foreseen.startswith(f"{tmp_path}/p.jsonl: data.long_prompt=truncate_left shortens 2 of 3 prompts: ")
    assert said.partition("prompts: ")[2].partition("; the first")[0] == foreseen.partition("prompts: ")[2].partition("; the first")[0]
    assert (f"the chat template alone takes {encoder.template_tokens}; " in said) is chat


@pytest.mark.parametrize("chat", [True, False])
def test_the_longest_response_is_the_run_s(chat, tiny_model, tiny_chat_model, tmp_path):
    model = tiny_chat_model if chat else tiny_model
    rows = [{"prompt": f"{WORDS} {i}", "chosen": f" {WORDS}" * i, "rejected": " No."} for i in range(1, 21)]
    settings = config(model, write(tmp_path / "p.jsonl", rows), "data.max_response_tokens=200", "data.max_prompt_tokens=99", section="preferences")
    encoder = Encoder(load_tokenizer(str(model)), settings.data, "auto", 4096)
    sets = load_preferences(settings.data.preferences, "error")
    encoder.data = encoder.data.model_copy(update={"max_response_tokens": 4000})
    pairs = sorted((encoder.encode_pair(pair) for pair in [*sets.train, *sets.heldout]), key=lambda pair: len(pair.chosen))
    over = sum(len(pair.chosen) > 200 for pair in pairs)
    found = preview(settings, "data.preferences")
    assert found.facts == {
        "preferences": f"20 pairs on 20 distinct prompts: {len(sets.train)} for training, {len(sets.heldout)} held out",
        "longest prompt": f"{max(len(pair.prompt) for pair in pairs)} tokens, data.max_prompt_tokens is 99",
        "longest response": f"{len(pairs[-1].chosen)} tokens, data.max_response_tokens is 200; over it: {over} pairs",
    }
    assert over and found.notes[0].startswith(
        f"{tmp_path}/p.jsonl: data.long_response=error stops the run at {over} of 20 pairs: the response is over"
    )
    assert found.train == len(sets.train)


@pytest.mark.parametrize("rows_counted", [2000, 10])
def test_rows_that_are_left_out_for_their_length_are_none_to_train_on(tiny_model, tmp_path, monkeypatch, rows_counted):
    """Where more rows are there than are counted, only the run finds out how many these are."""
    monkeypatch.setattr("dvpo_ray.data.preview.ROWS", rows_counted)
    rows = [
        {"prompt": f"{i} {WORDS} " * (i % 4 + 1), "chosen": f" a {i}", "rejected": f" {WORDS}" * (i % 3 + 1), "rejected_truncated": i % 5 < 3}
        for i in range(48)
    ]
    tokens = load_tokenizer(str(tiny_model))
    limit = len(tokens(f" {WORDS}" * 2, add_special_tokens=False)["input_ids"])  # what has an end token too is over it
    limits = ["data.max_prompt_tokens=99", "data.long_prompt=drop", f"data.max_response_tokens={limit}", "data.long_response=drop"]
    settings = config(tiny_model, write(tmp_path / "p.jsonl", rows), *limits, section="preferences")
    encoder = Encoder(tokens, settings.data, "auto", 4096)
    train = load_preferences(settings.data.preferences, "error").train
    kept = sum(encoder.encode_pair(pair) is not None for pair in train)
    assert 0 < kept < len(train) and preview(settings, "data.preferences").train == (kept if rows_counted == 2000 else None)
    none_left = config(tiny_model, tmp_path / "p.jsonl", *limits, "data.max_prompt_tokens=1", section="preferences")
    assert preview(none_left, "data.preferences").train is None


def test_the_dry_run_counts_steps_and_prompts(tiny_model, tmp_path, capsys):
    rows = [{"prompt": f"{WORDS} {i}", "chosen": " a", "rejected": " b"} for i in range(60)]
    path, own = write(tmp_path / "p.jsonl", rows), [f"model.path={tiny_model}", "gvm.path=g", "data.max_prompt_tokens=99"]
    sections = [f"data.{name}.{key}" for name in ("preferences", "prompts") for key in (f"path={path}", "heldout_path=null")]
    for command, told in (
        (["gvm", "train"], "optimizer steps          2.5 epochs x {} training pairs / 10 = {} steps"),
        (["train"], "samples in the run       3200, 3200 prompts with repeats: {} distinct ones, each about {} times"),
    ):
        assert cli.main([*command, LOCAL_CPU, *own, *sections, "gvm.epochs=2.5", "gvm.pairs_per_step=10", "--dry-run"]) == 0
        train = preview(load_config(LOCAL_CPU, [*own, *sections]), "data.prompts").train
        found = round(2.5 * -(-train // 10)) if command[0] == "gvm" else number(3200 / train)
        assert told.format(train, found) in capsys.readouterr().out


@pytest.mark.parametrize("model", ["tiny_model", "tiny_chat_model"])
@pytest.mark.parametrize("limit", [40, 999])
def test_answers_are_counted_as_the_run_counts_them(model, limit, request, tmp_path, capsys):
    from dvpo_ray.training.sft import encode_answers

    model = request.getfixturevalue(model)
    rows = [{"prompt": "Hi", "completion": f" {WORDS}" * 4}, {"prompt": f"{WORDS} " * 30, "completion": " No."}, {"text": f"{WORDS} " * 3}]
    rows += [{"prompt": "Hi", "completion": " Ho"}, {"prompt": "b"}]
    path = write(tmp_path / "a.jsonl", rows)
    settings = load_config(LOCAL_CPU, [f"model.path={model}", "model.chat_template=auto", f"data.sft={path}", f"sft.max_tokens={limit}"])
    answers, _ = load_answers(str(path), "skip")
    encoded, said = encode_answers(answers, load_tokenizer(str(model)), settings)
    found = preview(settings, "data.sft")
    assert found.notes[:2] == [
        f"{path}:5: no `completion`; the row has prompt; correct the row, or leave bad rows out with data.on_bad_row=skip",
        f"{path}: 1 of 5 rows are bad; the counts above are without them, as with data.on_bad_row=skip",
    ]
    told = [line.replace("leaves out", "left out").replace("cuts off", "cut off").removeprefix(f"{path}: ") for line in found.notes[2:]]
    assert told == said and len(said) == (2 if limit == 40 else 1)
    assert (found.facts["sft"], found.train) == ("4 answers", len(encoded)) and len(encoded) == 3
    assert cli.main(["sft", LOCAL_CPU, *(f"model.path={model}", f"data.sft={path}", f"sft.max_tokens={limit}"), "--dry-run"]) == 0
    assert "x 3 training rows / " in capsys.readouterr().out
    if limit == 999:
        alone = write(tmp_path / "b.jsonl", [rows[0], rows[2]])
        settings = load_config(LOCAL_CPU, [f"model.path={model}", "model.chat_template=auto", f"data.sft={alone}", "sft.max_tokens=200"])
        encoded, _ = encode_answers(load_answers(str(alone), "skip")[0], load_tokenizer(str(model)), settings)
        longest = max(len(row["input_ids"]) for row in encoded)
        assert preview(settings, "data.sft").facts["longest answer"] == f"{longest} tokens with its prompt, the limit is sft.max_tokens 200"


def test_answers_elsewhere_are_left_to_the_run(tiny_model, tmp_path):
    for elsewhere in ("org/name", tmp_path / "absent.jsonl"):
        assert preview(load_config(LOCAL_CPU, [f"model.path={tiny_model}", f"data.sft={elsewhere}"]), "data.sft") == Preview()


def test_a_template_that_fills_the_limit_is_said_with_the_remedy(tiny_chat_model, tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": f"{WORDS} {i}", "chosen": " a", "rejected": " b"} for i in range(60)])
    settings = config(tiny_chat_model, path, "data.max_prompt_tokens=21", "data.long_prompt=drop", section="preferences")
    [line] = preview(settings, "data.preferences").notes
    assert line.startswith(f"{path}: data.long_prompt=drop leaves out 60 of 60 pairs: the prompt is over data.max_prompt_tokens 21; the longest has ")
    assert "and the chat template alone takes " in line and " keeps all whole; the first is " in line
    assert preview(config(tiny_chat_model, path, "data.max_prompt_tokens=400", section="preferences"), "data.preferences").notes == []


def test_a_bad_row_is_found_by_the_dry_run(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"text": "b"}])
    assert cli.main(["train", LOCAL_CPU, f"model.path={tiny_model}", f"data.prompts.path={path}", "--dry-run"]) == 0
    assert (
        f"# note: {path}:2: no `prompt`; the row has text; correct the row, or leave bad rows out with data.on_bad_row=skip\n"
        in capsys.readouterr().out
    )


def test_every_fault_and_the_other_rows_are_shown_where_bad_rows_stop_the_run(tiny_model, tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"text": "b"}, {"prompt": 3}, {"text": "d"}, {"prompt": "e"}])
    found = preview(config(tiny_model, path, "data.on_bad_row=error"), "data.prompts")
    assert found.notes == [
        f"{path}:2: no `prompt`; the row has text; correct the row, or leave bad rows out with data.on_bad_row=skip",
        f"{path}: 3 of 5 rows are bad, with 2 faults; the counts above are without them, as with data.on_bad_row=skip",
        f"{path}:3: `prompt` must be text or a list of messages, got int",
    ]
    assert found.facts["prompts"].startswith("2 distinct prompts: ") and "longest prompt" in found.facts
    skipped = preview(config(tiny_model, path, "data.on_bad_row=skip"), "data.prompts")
    assert skipped.facts == found.facts and skipped.notes[0] == f"{path}: left out 3 of 5 rows: bad (data.on_bad_row skip), with 2 faults"
    own, other = write(tmp_path / "q.jsonl", [{"prompt": "a"}, {"prompt": ""}]), f"data.prompts.heldout_path={path}"
    told = f"{path}: 3 of 5 rows are bad, with 2 faults; the counts above are without them, as with data.on_bad_row=skip"
    assert [note for note in preview(config(tiny_model, own, other), "data.prompts").notes[1:3]] == [
        f"{own}: 1 of 2 rows are bad; the counts above are without them, as with data.on_bad_row=skip",
        told,
    ]


def test_the_first_row_that_is_too_long_is_the_first_of_the_file(tiny_model, tmp_path):
    """Whatever its side: held-out rows come after the others."""
    path = write(tmp_path / "p.jsonl", [{"prompt": f"{WORDS} {i}", "chosen": " a", "rejected": " b"} for i in range(40)])
    for section in ("prompts", "preferences"):
        settings = config(tiny_model, path, "data.max_prompt_tokens=2", f"data.{section}.heldout_fraction=0.6", section=section)
        load = load_prompts if section == "prompts" else load_preferences
        heldout = load(getattr(settings.data, section), "error").heldout
        first = min((one.where for one in heldout), key=lambda where: int(where.rpartition(":")[2]))
        rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join([rows[int(first.rpartition(":")[2]) - 1], *rows]), encoding="utf-8")  # the first line is held out
        [note] = preview(settings, f"data.{section}").notes[-1:]
        assert note.endswith(f"; the first is {path}:1")


def test_steps_of_dpo_and_sft_are_counted_as_the_trainer_counts_them(tiny_model, tmp_path, capsys):
    rows = [{"prompt": f"{WORDS} {i}", "chosen": " a", "rejected": " b"} for i in range(60)]
    path = write(tmp_path / "p.jsonl", rows)
    own = [f"model.path={tiny_model}", "data.max_prompt_tokens=99", f"data.preferences.path={path}", "data.preferences.heldout_path=null"]

    def dry_run(*settings):
        assert cli.main(["dpo", LOCAL_CPU, *own, *settings, "--dry-run"]) == 0
        return capsys.readouterr().out

    train = preview(load_config(LOCAL_CPU, own), "data.preferences").train
    few = dry_run("dpo.epochs=1.5")
    steps = -(-3 * -(-train // 8) // 2)
    assert f"1.5 epochs x {train} training pairs / 8 = {steps} steps" in few
    assert f"{steps} optimizer steps are too few to learn much: take 30 or more, for example by dpo.epochs=4, or raise dpo.learning_rate\n" in few
    assert "too few" not in dry_run("dpo.epochs=4")
    assert cli.main(["sft", LOCAL_CPU, *own, f"data.sft={write(tmp_path / 's.jsonl', [{'prompt': 'a', 'completion': ' b'}] * 9)}", "--dry-run"]) == 0
    assert "1 epoch x 9 training rows / 8 = 2 steps\n" in capsys.readouterr().out


def test_a_run_on_cpus_with_prompts_of_ones_own_says_what_tells_its_time(tiny_model, tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", [{"prompt": "Hi"}, {"prompt": "Ho"}])
    told = "#   length of the run        10 steps of 64 rollouts; `dvpo plan` with these settings estimates the time\n"
    own = ["data.prompts.heldout_path=null", f"data.prompts.path={path}"]
    for settings, expected in ((own, True), ([*own, "policy.gpus_per_actor=1"], False), ([], False)):
        assert cli.main(["train", LOCAL_CPU, f"model.path={tiny_model}", "train.steps=10", *settings, "--dry-run"]) == 0
        assert (told in capsys.readouterr().out) is expected


def test_pairs_without_the_scores_that_the_outcome_asks_for_are_told(tiny_model, tmp_path, capsys):
    rows = [{"prompt": f"{WORDS} {i}", "chosen": " a", "rejected": " b", "chosen_score": 1, "rejected_score": 0} for i in range(60)]
    del rows[4]["chosen_score"], rows[4]["rejected_score"], rows[9]["chosen_score"], rows[9]["rejected_score"]
    path = write(tmp_path / "p.jsonl", rows)
    argv = ["train", LOCAL_CPU, f"model.path={tiny_model}", f"data.preferences.path={path}", "data.preferences.heldout_path=null", "--dry-run"]
    told = f"# note: {path}:5: gvm.outcome is score, but the row has no chosen_score and rejected_score; add them or set gvm.outcome=binary\n"
    for command, outcome, expected in (("gvm", "score", True), ("gvm", "binary", False), ("rm", "score", False)):
        assert cli.main([command, *argv, f"gvm.outcome={outcome}"]) == 0
        assert (told in capsys.readouterr().out) is expected


def test_a_rollout_limit_below_the_responses_of_ones_own_pairs_is_told(tiny_model, tmp_path):
    """Of the pairs of the config, else of those in the prompts' file."""
    pairs = write(tmp_path / "p.jsonl", [{"prompt": f"{i}", "chosen": " a", "rejected": f" {WORDS}" * (i % 2 + 1)} for i in range(10)])
    longest = len(load_tokenizer(str(tiny_model))(f" {WORDS}" * 2, add_special_tokens=False)["input_ids"]) + 1
    prompts = write(tmp_path / "q.jsonl", [{"prompt": f"{i}"} for i in range(10)])
    line = (
        f"rollout.max_response_tokens {longest - 1} is below 5 of 20 responses in the pairs of {pairs}, the longest of {longest} tokens: "
        f"a policy that writes as they do is cut off there; rollout.max_response_tokens={longest} has room for all"
    )

    def notes(prompts, *settings):
        return preview(config(tiny_model, prompts, f"rollout.max_response_tokens={longest - 1}", *settings), "data.prompts").notes

    assert notes(prompts) == []
    assert notes(pairs) == notes(prompts, f"data.preferences.path={pairs}") == [line]
    assert notes(pairs, f"rollout.max_response_tokens={longest}") == []
    cut = [{"prompt": f"{i}", "chosen": " a", "rejected": f" {WORDS}" * 2, "rejected_truncated": True} for i in range(10)]
    assert notes(write(tmp_path / "c.jsonl", cut)) == []  # as the policy's own samples are


def test_what_cannot_be_counted_in_a_moment_is_left_to_the_run(tiny_model, tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": WORDS}, {"prompt": "Hi"}])
    found = preview(config(Path("org/name"), path, "data.max_prompt_tokens=1"), "data.prompts")
    assert (found.notes, found.facts, found.train) == ([], {"prompts": "2 distinct prompts: 1 for training, 1 held out"}, 1)
    (tmp_path / "pairs.csv").write_text("prompt,chosen", encoding="utf-8")
    for elsewhere in ("org/name", tmp_path / "pairs.csv", tmp_path / "absent.jsonl"):
        assert preview(config(tiny_model, elsewhere, "data.max_prompt_tokens=1"), "data.prompts") == Preview()


def test_a_folder_is_read_as_the_run_reads_it(tiny_model, tmp_path):
    """Only the run's own reading can tell a folder of rows from another one: a run folder has JSON files too."""
    folder = tmp_path / "folder"
    folder.mkdir()
    [note] = preview(config(tiny_model, folder), "data.prompts").notes
    assert note == f"{folder}: a folder without .jsonl, .json or .parquet files, and not one written by save_to_disk"
    write(folder / "train.jsonl", [{"prompt": "Hi"}, {"prompt": "Ho"}, {"text": "x"}])
    note, _ = preview(config(tiny_model, folder), "data.prompts").notes
    assert note.startswith(f"{folder}[2]: no `prompt`")
    write(folder / "train.jsonl", [{"prompt": "Hi"}, {"prompt": "Ho"}])
    assert preview(config(tiny_model, folder), "data.prompts").facts["prompts"].startswith("2 distinct prompts: ")


@pytest.mark.parametrize("section", ["preferences", "prompts"])
def test_data_of_ones_own_beside_the_shipped_heldout_file(section, tiny_model, tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": prompt, "chosen": " a", "rejected": " b"} for prompt in ("Hi", "Ho")])
    shipped, key = SHIPPED / f"{section}.heldout.jsonl", f"data.{section}"
    settings = config(tiny_model, path, f"{key}.heldout_path={shipped}", "data.max_response_tokens=200", section=section)
    [line] = preview(settings, key).notes
    assert line.startswith(f"{key}.heldout_path is still {shipped}, which belongs to the quickstart's data and not to {path}: held-out results will")
    assert f"set {key}.heldout_path=null to hold out a share of it" in line
    assert (
        preview(
            config(tiny_model, SHIPPED / f"{section}.train.jsonl", f"{key}.heldout_path={shipped}", "data.max_response_tokens=200", section=section),
            key,
        ).notes
        == []
    )
    assert preview(config(tiny_model, path, section=section), key).notes == []
    if section == "prompts":
        assert load_prompts(settings.data.prompts, "error").notes[0] == line  # the run says it too


def test_the_dry_run_stays_without_torch(tiny_chat_model, tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": WORDS * n, "chosen": " a", "rejected": " b"} for n in (1, 2, 3)])
    argv = [
        "gvm",
        "train",
        LOCAL_CPU,
        "model.chat_template=auto",
        f"model.path={tiny_chat_model}",
        f"data.preferences.path={path}",
        "data.preferences.heldout_path=null",
        "--dry-run",
    ]
    code = f"import sys; from dvpo_ray import cli; cli.main({argv!r}); sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "data.long_prompt=truncate_left shortens 3 of 3 pairs" in done.stdout, done.stderr
