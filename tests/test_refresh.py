"""Refreshing the value model: which samples are pairs, what labellers get and may answer, which files training reads."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from gvm_artifacts import make_gvm
from hypothesis import given
from hypothesis import strategies as st

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config.schema import Config, DataConfig, PreferenceData, PromptData, RefreshConfig
from dvpo_ray.data.encoding import Encoder
from dvpo_ray.data.preferences import PreferencePair, load_preferences, parse_pair
from dvpo_ray.data.prompts import Prompt, load_prompts
from dvpo_ray.errors import InputError, ResourceError
from dvpo_ray.evaluation.judges import VaderJudge
from dvpo_ray.gvm.artifact import ContextSpec, ObjectiveSpec, OutcomeSpec, read_manifest
from dvpo_ray.gvm.model import new_value_model
from dvpo_ray.models.loading import load_tokenizer
from dvpo_ray.refresh import labels as label_sources
from dvpo_ray.refresh.labels import CandidatePair, Label, candidate_pairs, labelled_rows, labels_from_endpoint, labels_from_file, parse_label
from dvpo_ray.refresh.pairs import HELDOUT, NEW, TRAINING, as_row, heldout_fraction, pairs_of_data, pairs_of_refreshes, preference_rows, write_pairs
from dvpo_ray.refresh.samples import Sample, read_samples, usable_samples, write_samples
from dvpo_ray.training.refresh import Refreshed, Refresher, training_config
from dvpo_ray.training.run import Run


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pair(number: int = 0) -> CandidatePair:
    return CandidatePair(Prompt(f"prompt {number}"), Sample(f"first {number}", False), Sample(f"second {number}", True))


# -------------------------------------------------------------------------------------------------------- samples


def test_samples_are_those_that_give_their_tokens_again(tiny_model, tmp_path):
    tokenizer = load_tokenizer(str(tiny_model))
    encoder = Encoder(tokenizer, DataConfig(long_response="drop"), "auto", 256)
    prompts = [Prompt("Tell me", "p:1"), Prompt("The big dog", "p:2")]
    ids = [encoder.encode_prompt(prompt) for prompt in prompts]
    good = [*tokenizer(" was happy.", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    cut = tokenizer(" went home", add_special_tokens=False)["input_ids"]
    split = [tokenizer.convert_tokens_to_ids(letter) for letter in "inexact"] + [tokenizer.eos_token_id]
    batch = RaggedBatch.from_rows([ids[0]] * 3 + [ids[1]] * 3, [good, good, split, cut, good, [tokenizer.eos_token_id]], truncated=[0, 0, 0, 1, 0, 0])
    samples, notes = usable_samples(batch, prompts, 3, encoder, VaderJudge())
    assert [[(s.text, s.truncated) for s in answers] for answers in samples] == [
        [(" was happy.", False)],  # a repetition and one that reads alike in other tokens are left out
        [(" went home", True), (" was happy.", False)],  # and so is a blank one
    ]
    assert samples[0][0].score == pytest.approx(0.5719, abs=1e-4)
    write_samples(tmp_path / "samples.jsonl", prompts, samples)
    assert read_samples(tmp_path / "samples.jsonl") == list(zip(prompts, samples, strict=True))
    assert usable_samples(batch, prompts, 3, encoder, None)[0][0][0].score is None
    assert notes == [
        "left out 1 of 6 samples: the response is blank; the first is p:2",
        "left out 1 of 6 samples: the text of the response does not give its tokens again; the first is p:1",
        "left out 1 of 6 samples: the same response to the same prompt; the first is p:1",
    ]


def test_pairs_of_samples_that_are_not_made_are_counted():
    def scored(*scores):
        return [Sample(f"text {i}", False, score) for i, score in enumerate(scores)]

    answered = [(Prompt("a", "p:1"), scored(1.0, 0.0, 0.52, 0.5)), (Prompt("b", "p:2"), scored(0.3, 0.3)), (Prompt("c", "p:3"), scored(0.1))]
    rows, notes = preference_rows(answered, 2, 0.1)
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("text 0", "text 1")]
    assert notes == [
        "left out 1 of 3 prompts: fewer than two different usable samples; the first is p:3",
        "left out 2 of 3 pairs of samples: the scores tie or are closer than 0.1; the first is p:1",
    ]


@given(st.lists(st.integers(0, 7), max_size=5), st.integers(1, 4))
def test_no_sample_is_in_two_candidate_pairs(counts, limit):
    answered = [(Prompt(f"p{i}"), [Sample(f"{i}-{j}", False) for j in range(count)]) for i, count in enumerate(counts)]
    pairs = candidate_pairs(answered, limit)
    assert len(pairs) == sum(min(limit, count // 2) for count in counts)
    used = [sample.text for pair in pairs for sample in (pair.a, pair.b)]
    assert len(used) == len(set(used))


# --------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"preferred": "a"}, Label("a")),
        ({"preferred": "tie"}, Label("tie")),
        ({"score_a": 1, "score_b": 2.5}, Label("b", (1.0, 2.5))),
        ({"score_a": 1.0, "score_b": 1.0, "preferred": "tie"}, Label("tie", (1.0, 1.0))),
    ],
)
def test_a_label_is_a_preference_or_scores(row, label):
    assert parse_label({"id": "x", **row}, "here") == ("x", label)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"preferred": "a"}, "labels.jsonl: expected an object with the `id` of a pair"),
        ({"id": "x"}, "labels.jsonl: neither `preferred` nor `score_a` and `score_b`; give one of them"),
        ({"id": "x", "preferred": "A"}, 'labels.jsonl: `preferred` is "A"; give "a", "b" or "tie"'),
        ({"id": "x", "score_a": 1.0}, "labels.jsonl: `score_a` and `score_b` must both be finite numbers"),
        ({"id": "x", "preferred": "a", "score_a": 0.0, "score_b": 1.0}, 'labels.jsonl: `preferred` is "a", but the scores say "b"'),
        ([], "labels.jsonl: expected an object with the `id` of a pair"),
    ],
)
def test_a_bad_label_is_named(row, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse_label(row, "labels.jsonl")


def test_labels_become_rows_and_ties_none():
    pairs = [pair(0), pair(1), pair(2)]
    by_id = {pairs[0].id: Label("b"), pairs[1].id: Label("tie"), pairs[2].id: Label("a", (2.0, 1.0))}
    assert labelled_rows(pairs, by_id, needs_scores=False) == [
        {"prompt": "prompt 0", "chosen": "second 0", "rejected": "first 0", "chosen_truncated": True, "rejected_truncated": False},
        {
            "prompt": "prompt 2",
            "chosen": "first 2",
            "rejected": "second 2",
            "chosen_score": 2.0,
            "rejected_score": 1.0,
            "chosen_truncated": False,
            "rejected_truncated": True,
        },
    ]
    with pytest.raises(InputError, match=f"label {pairs[0].id}: no score_a and score_b, but the GVM was trained with gvm.outcome score"):
        labelled_rows(pairs, by_id, needs_scores=True)


def test_an_id_follows_from_the_texts_alone():
    assert pair(1).id == pair(1).id != pair(2).id
    swapped = CandidatePair(pair(1).prompt, pair(1).b, pair(1).a)
    assert swapped.id != pair(1).id  # else a label for one would say the opposite of the other


def silent(_: str) -> None:
    pass


def test_a_file_is_waited_for_until_it_answers_every_pair(tmp_path, monkeypatch):
    """The labeller comes in two goes, the first of which ends in the middle of a line."""
    pairs, said = [pair(i) for i in range(3)], []
    rows = [json.dumps({"id": p.id, "preferred": "a"}) + "\n" for p in pairs]
    goes = iter([rows[0] + rows[1][:9], rows[0] + rows[1], "".join(rows)])

    def labeller(_seconds: float) -> None:
        asked = rows_of(tmp_path / "to_label.jsonl")
        assert asked[0] == {"id": pairs[0].id, "prompt": "prompt 0", "response_a": "first 0", "response_b": "second 0"} and len(asked) == 3
        (tmp_path / "labels.jsonl").write_text(next(goes))

    monkeypatch.setattr(label_sources.time, "sleep", labeller)
    labels = labels_from_file(pairs, tmp_path, RefreshConfig(source="file"), said.append)
    assert labels == {p.id: Label("a") for p in pairs}
    assert len(said) == 1 and "to_label.jsonl in" in said[0]


def test_labels_that_were_there_before_are_not_waited_for(tmp_path, monkeypatch):
    (tmp_path / "labels.jsonl").write_text(
        json.dumps({"id": pair().id, "preferred": "b"}) + "\n" + json.dumps({"id": "stale", "preferred": "a"}) + "\n"
    )
    monkeypatch.setattr(label_sources.time, "sleep", lambda _: pytest.fail("waited"))
    assert labels_from_file([pair()], tmp_path, RefreshConfig(source="file"), silent)[pair().id] == Label("b")


def test_labels_that_do_not_come_are_one_line(tmp_path):
    with pytest.raises(ResourceError, match=r"labels.jsonl: no label for 1 of 1 pair of to_label.jsonl after 0.01 seconds .*go on with --resume"):
        labels_from_file([pair()], tmp_path, RefreshConfig(source="file", timeout_seconds=0.01), silent)


class Endpoint(BaseHTTPRequestHandler):
    """Prefers what is longer; `failures` are HTTP codes to answer with first."""

    failures: list[int]
    requests: list[dict]
    spoil: bool = False

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(asked)
        if self.failures:
            self.send_error(self.failures.pop(0))
            return
        labels = [{"id": p["id"], "preferred": "a" if len(p["response_a"]) > len(p["response_b"]) else "b"} for p in asked["pairs"]]
        body = json.dumps({"labels": labels[: 1 if self.spoil else None]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch):
    """A labelling server: its handler class and the settings that lead to it. Waiting between attempts takes no time."""
    handler = type("Handler", (Endpoint,), {"failures": [], "requests": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(label_sources.time, "sleep", lambda seconds: handler.waits.append(seconds))
    handler.waits = []
    yield handler, RefreshConfig(source="endpoint", url=f"http://127.0.0.1:{server.server_port}/label", pairs_per_request=2, retries=2)
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_endpoint_gets_some_pairs_at_a_time_and_no_pair_twice(endpoint, tmp_path):
    handler, settings = endpoint
    pairs = [pair(i) for i in range(3)]
    assert labels_from_endpoint(pairs, tmp_path, settings, silent) == {p.id: Label("b") for p in pairs}
    assert [len(request["pairs"]) for request in handler.requests] == [2, 1]
    assert handler.requests[0]["pairs"][0] == pairs[0].as_row()
    assert set(labels_from_endpoint([*pairs, pair(9)], tmp_path, settings, silent)) == {p.id for p in [*pairs, pair(9)]}
    assert [p["id"] for p in handler.requests[2]["pairs"]] == [pair(9).id]  # a resumed refresh asks for the rest only


def test_what_may_pass_is_tried_again(endpoint, tmp_path):
    handler, settings = endpoint
    handler.failures[:] = [503, 429]
    assert labels_from_endpoint([pair()], tmp_path, settings, silent)
    assert handler.waits == [1.0, 2.0]
    handler.failures[:] = [500, 500, 500]
    with pytest.raises(ResourceError, match=r"no answer in 3 attempts \(gvm.refresh.retries\): HTTP 500"):
        labels_from_endpoint([pair(1)], tmp_path, settings, silent)


def test_a_refusal_and_a_missing_label_are_errors_at_once(endpoint, tmp_path):
    handler, settings = endpoint
    handler.failures[:] = [404]
    with pytest.raises(InputError, match="HTTP 404 .*; gvm.refresh.url must take pairs by POST"):
        labels_from_endpoint([pair()], tmp_path, settings, silent)
    handler.spoil = True
    with pytest.raises(InputError, match=f"the answer has no label for 1 of 2 pairs, the first is {pair(1).id}"):
        labels_from_endpoint([pair(0), pair(1)], tmp_path, settings, silent)
    assert handler.waits == []


def test_an_endpoint_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(label_sources.time, "sleep", lambda _: None)
    with pytest.raises(ResourceError, match=r"http://127.0.0.1:9/: no answer in 2 attempts .*refused"):
        labels_from_endpoint([pair()], tmp_path, RefreshConfig(source="endpoint", url="http://127.0.0.1:9/", retries=1), silent)


# ---------------------------------------------------------------------------------------------------------- pairs


def preference(number: int, **changes) -> PreferencePair:
    return PreferencePair(**{"prompt": f"prompt {number}", "chosen": "good", "rejected": "bad"} | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"chosen_score": 1.0, "rejected_score": 0.0, "source_model": "m", "rejected_model": "n", "chosen_truncated": True},
        {
            "prompt": [{"role": "user", "content": "hi"}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        },
    ],
)
def test_a_pair_survives_being_written(changes):
    assert parse_pair(json.loads(json.dumps(as_row(preference(1, **changes)))), "") == preference(1, **changes)


def test_new_pairs_are_split_by_prompt_and_old_ones_join_the_training_pairs_only(tmp_path):
    rows = [{"prompt": f"prompt {i}", "chosen": "good", "rejected": f"bad {k}"} for i in range(20) for k in range(2)]
    old = [preference(i, chosen="old", where=f"pairs.jsonl:{i}") for i in range(60)]
    notes = write_pairs(tmp_path, rows, "policy@7", 0.3, old[:30], old[30:], share=0.5, seed=0)
    new, heldout, training = (rows_of(tmp_path / name) for name in (NEW, HELDOUT, TRAINING))
    assert len(new) + len(heldout) == 40 and not {row["prompt"] for row in new} & {row["prompt"] for row in heldout}
    mixed = training[len(new) :]
    assert training[: len(new)] == new and len(mixed) == round(0.5 * len(new)) and {row["chosen"] for row in mixed} == {"old"}
    assert not {row["prompt"] for row in training} & {row["prompt"] for row in heldout}
    assert {row["source_model"] for row in new + heldout} == {"policy@7"} and not any("source_model" in row for row in mixed)
    sets = load_preferences(PreferenceData(path=str(tmp_path / TRAINING), heldout_path=str(tmp_path / HELDOUT)), "error")
    assert len(sets.train) == len(training) and sets.notes == []
    held = [int(row["prompt"].split()[1]) for row in heldout]
    assert notes[0] == f"left out {len(set(held))} of 60 old pairs: their prompt is held out in this refresh; the first is pairs.jsonl:{min(held)}"
    assert f"left out {60 - len(set(held)) - len(mixed)} of 60 old pairs: 0.5 old pairs are mixed in for each new one" in notes[1]


@pytest.mark.parametrize("settings", [{"heldout_fraction": 0.1}, {"heldout_fraction": 0.4}, {"heldout_path": "heldout.jsonl"}])
def test_a_share_of_the_policys_training_prompts_is_held_out_whatever_its_own_split_is(tmp_path, settings):
    """Its prompts are those that `data.prompts` does not hold out, by the same hash."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"prompt {i}"}) + "\n" for i in range(1500)))
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"prompt": "another"}) + "\n")
    data = PromptData(path=str(prompts), **{name: str(tmp_path / value) if name.endswith("path") else value for name, value in settings.items()})
    trained = load_prompts(data, "error").train
    rows = [{"prompt": prompt.content, "chosen": "good", "rejected": "bad"} for prompt in trained]
    write_pairs(tmp_path, rows, "policy@1", heldout_fraction(data, 0.1), [], [], share=1.0, seed=0)
    assert len(rows_of(tmp_path / HELDOUT)) == pytest.approx(0.1 * len(trained), rel=0.3)


def test_what_a_refresh_holds_out_was_not_trained_on_by_an_earlier_one(tmp_path):
    """Of few prompts none may be in the fraction; then one is held out that was not trained on, and if there is none, a note says so."""
    few = sorted((preference(i) for i in range(6)), key=lambda one: one.key)
    held = {}
    for name, pairs, earlier in (("new", few[:3], few[:1]), ("known", few[:3], few[:3]), ("first", few[:3], [])):
        notes = write_pairs(tmp_path / name, [as_row(pair) for pair in pairs], "policy@2", 1e-9, [], earlier, share=0.0, seed=0)
        held[name] = [row["prompt"] for row in rows_of(tmp_path / name / HELDOUT)]
        assert any("too good" in note for note in notes) == (name == "known")
    assert held == {"new": [few[1].prompt], "known": [few[0].prompt], "first": [few[0].prompt]}


def test_all_old_pairs_are_taken_where_they_are_too_few(tmp_path):
    rows = [{"prompt": f"prompt {i}", "chosen": "good", "rejected": "bad"} for i in range(10)]
    write_pairs(tmp_path, rows, "policy@1", 0.3, [preference(100)], [], share=5.0, seed=0)
    assert len(rows_of(tmp_path / TRAINING)) == len(rows_of(tmp_path / NEW)) + 1


def test_too_few_pairs_are_one_line(tmp_path):
    with pytest.raises(InputError, match=r"too few to train on some and hold out others: 1 new pair on 1 prompt; raise gvm.refresh.prompts"):
        write_pairs(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "b"}], "policy@1", 0.3, [], [], 1.0, 0)


def test_old_pairs_are_the_data_and_what_earlier_refreshes_collected(tmp_path):
    original = tmp_path / "pairs.jsonl"
    original.write_text("".join(json.dumps(as_row(preference(i))) + "\n" for i in range(20)))
    earlier = tmp_path / "refresh_000010"
    earlier.mkdir()
    (earlier / NEW).write_text(json.dumps(as_row(preference(99))) + "\n")
    data = DataConfig(preferences=PreferenceData(path=str(original)))
    assert pairs_of_data(data) == (load_preferences(data.preferences, "error").train, []) and pairs_of_data(DataConfig()) == ([], [])
    assert [p.prompt for p in pairs_of_refreshes([earlier])] == ["prompt 99"] and pairs_of_refreshes([]) == []
    limited = data.model_copy(update={"preferences": PreferenceData(path=str(original), limit=3)})
    assert "data.preferences.limit is 3" in pairs_of_data(limited)[1][0]


# ------------------------------------------------------------------------------------------------------- training


def test_a_refresh_trains_on_from_the_artifact_in_the_scorers_room(tiny_model, tmp_path):
    objective = ObjectiveSpec(name="td_lambda", td_lambda=0.8, bradley_terry_weight=0.5, bradley_terry_value="mean")
    outcome, context = OutcomeSpec(kind="score", scale=2.0), ContextSpec(examples=2, max_tokens=40)
    gvm = str(make_gvm(tmp_path / "gvm", tiny_model, objective=objective, outcome=outcome, context=context))
    config = Config.model_validate(
        {
            "model": {"path": str(tiny_model)},
            "gvm": {"path": gvm, "num_actors": 8, "gpus_per_actor": 1, "num_layers": 1, "epochs": 3, "learning_rate": 7e-5, "context": {"pool": 5}},
            "scorer": {"num_actors": 2, "cpus_per_actor": 3, "gpus_per_actor": 2},
            "rollout": {"max_response_tokens": 4096},
            "train": {"trackers": ["wandb"]},
        }
    )
    changed = training_config(config, read_manifest(Path(gvm)), gvm, tmp_path / "refresh")
    settings = changed.gvm
    assert (settings.init_from, settings.keep_head, settings.num_layers, settings.epochs, settings.learning_rate) == (gvm, True, None, 1.0, 7e-5)
    assert (settings.objective, settings.td_lambda, settings.bradley_terry_weight, settings.bradley_terry_value) == ("td_lambda", 0.8, 0.5, "mean")
    assert (settings.outcome, settings.outcome_scale, settings.context.examples, settings.context.max_tokens) == ("score", 2.0, 2, 40)
    assert (settings.num_actors, settings.cpus_per_actor, settings.gpus_per_actor) == (2, 3, 2)
    assert changed.data.preferences.path == str(tmp_path / "refresh" / TRAINING) and changed.data.max_response_tokens == 4096
    assert changed.train.trackers == []


def test_a_head_is_kept_where_there_is_one(tiny_model, tmp_path):
    gvm = make_gvm(tmp_path / "gvm", tiny_model)
    kept = new_value_model(str(gvm), keep_head=True)
    assert kept.score.weight.abs().sum() > 0 and kept.score.bias.item() == 0.25
    assert new_value_model(str(gvm)).score.weight.abs().sum() == 0
    with pytest.raises(InputError, match="has no value head to keep; give a GVM artifact"):
        new_value_model(str(tiny_model), keep_head=True)


def refresher(run_folder: Path, **settings) -> Refresher:
    config = Config.model_validate({"model": {"path": "m"}, "evaluation": {"judge": "vader"}} | settings)
    return Refresher(Run("train", config, run_folder), None)


def test_when_a_refresh_is_due(tmp_path):
    source = {"source": "judge"}
    every = refresher(tmp_path, gvm={"path": "g", "refresh_every_steps": 3, "refresh": source})
    assert [step for step in range(1, 10) if every.is_due(step, alarmed=True)] == [3, 6, 9]
    alarmed = refresher(tmp_path, gvm={"path": "g", "refresh": source}, health={"on_alarm": "refresh"})
    assert alarmed.is_due(4, alarmed=True) and not alarmed.is_due(4, alarmed=False)
    assert not refresher(tmp_path, gvm={"path": "g"}).is_due(4, alarmed=True)


@pytest.mark.parametrize("source", ["judge", "file"])
def test_samples_that_make_no_pair_are_noted_on_the_console_and_for_the_summary(tmp_path, tiny_model, source):
    settings = {"source": source, "pairs_per_prompt": 1, "min_score_gap": 0.2, "timeout_seconds": 0.01}
    gvm = make_gvm(tmp_path / "gvm", tiny_model)
    one = refresher(tmp_path / "run", gvm={"path": str(gvm), "refresh": settings})
    one.inputs, warned = SimpleNamespace(notes=["of the start"]), []
    scores = {"p:1": (1.0, 0.0), "p:2": (0.5, 0.4), "p:3": (0.7,)}
    prompts = [Prompt(where, where) for where in scores]
    write_samples(tmp_path / "samples.jsonl", prompts, [[Sample(f"{s}", False, s) for s in those] for those in scores.values()])
    pairs = candidate_pairs(read_samples(tmp_path / "samples.jsonl"), 1)
    answers = [{"id": pair.id, "preferred": preferred} for pair, preferred in zip(pairs, ("a", "tie"), strict=True)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    rows = one._label(tmp_path, 7, tmp_path / "samples.jsonl", SimpleNamespace(warn=warned.append, say=silent))
    assert [row["prompt"] for row in rows] == ["p:1"]
    why = "the scores tie or are closer than 0.2" if source == "judge" else "labelled a tie"
    assert warned == [
        "refresh after step 7: left out 1 of 3 prompts: fewer than two different usable samples; the first is p:3",
        f"refresh after step 7: left out 1 of 2 pairs of samples: {why}; the first is p:2",
    ]
    assert one.inputs.notes == ["of the start", *warned]


def test_a_checkpoint_names_the_artifact_relative_to_a_folder_that_may_move(tmp_path):
    first = refresher(tmp_path / "old", gvm={"path": "runs/gvm/final"})
    first.state = Refreshed(str(tmp_path / "old/gvm/refresh_000002/final"), (2,), 11, 0.4, 0.7)
    second = refresher(tmp_path / "new", gvm={"path": "runs/gvm/final"})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state == Refreshed(str(tmp_path / "new/gvm/refresh_000002/final"), (2,), 11, 0.4, 0.7)
    assert second.scoring_config.gvm.path == second.state.path
    assert second.state.metrics["refresh/pairs_total"] == 11
    untouched = refresher(tmp_path / "old", gvm={"path": "runs/gvm/final"})
    third = refresher(tmp_path / "new", gvm={"path": "runs/gvm/final"})
    third.load_state_dict(json.loads(json.dumps(untouched.state_dict())))
    assert third.state == Refreshed("runs/gvm/final") and third.state.metrics == {}
