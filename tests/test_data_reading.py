"""Reading rows: formats, labels, and the one line that names what is wrong."""

import json
import os
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dvpo_ray.data import reading
from dvpo_ray.data.reading import read_rows
from dvpo_ray.errors import InputError

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def columns(path, split="train"):
    return [row.columns for row in read_rows(str(path), split)]


def labels(path, split="train"):
    return [row.where for row in read_rows(str(path), split)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_jsonl_rows_are_labelled_by_line_and_blank_lines_count(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n{"prompt": "b\\u2028c"}')
    assert [row.columns for row in read_rows(str(path), "train")] == [{"prompt": "a"}, {"prompt": "b\u2028c"}]
    assert labels(path) == [f"{path}:1", f"{path}:3"]


def test_json_list_is_labelled_by_row(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    assert columns(path) == ROWS
    assert labels(path) == [f"{path}[0]", f"{path}[1]"]


def test_parquet_file_folder_and_saved_dataset_give_the_same_rows(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset.select([0]), "test": dataset.select([1])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "train.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "folder" / "test.jsonl", ROWS[1:])

    assert columns(tmp_path / "rows.parquet") == ROWS
    assert labels(tmp_path / "rows.parquet")[1] == f"{tmp_path / 'rows.parquet'}[1]"
    assert columns(tmp_path / "saved") == ROWS
    for folder in ("splits", "folder"):
        assert columns(tmp_path / folder, "train") == ROWS[:1]
        assert columns(tmp_path / folder, "test") == ROWS[1:]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "caf\xe9"}', "not UTF-8 at byte 15"),
        (b'{"prompt": "a"', "not valid JSON"),
        (b'{"prompt": "a"},', "not valid JSON (',' after the end of the value at column 16); each line must be one JSON object"),
        (b"prompt,chosen,rejected", "not valid JSON"),
        (b'["a"]', "must be a JSON object with named columns, got list"),
        (b'{"prompt": "a", "chosen": "b", "prompt": "c"}', "the key `prompt` is there twice; keep one of them"),
        (b'{"prompt": [{"role": "user", "role": "system", "content": "x"}]}', "the key `role` is there twice"),
    ],
)
def test_a_bad_line_names_itself_and_does_not_stop_the_others(tmp_path, line, problem):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    rows = list(read_rows(str(path), "train"))
    assert [row.problem is None for row in rows] == [True, False, True]
    assert rows[1].where == f"{path}:2"
    assert problem in rows[1].problem


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.tsv", b"a,b\n", "unknown format .tsv; use .jsonl, .json, .parquet"),
        ("rows.csv", b"a,b\n", "/rows.csv: CSV is not read; convert it, for example by pandas.read_csv('"),
        ("rows.jsonl", b'\nprompt,chosen,"rejected"\na,b,c\n', "looks like CSV, with the columns prompt, chosen, rejected; convert it, for"),
        ("rows.jsonl", b'\xef\xbb\xbfid;"prompt"\n1;a\n', "looks like CSV, with the columns id, prompt; convert it"),
        ("rows.jsonl", b'[\n{"prompt": "a"},\n{"prompt": "b"}\n]', "/rows.jsonl: is one JSON list; name it "),
        ("rows.jsonl", b'[{"prompt": "a"},\n{"prompt": "b"}]\n', "/rows.json"),
        ("rows.jsonl", b'[{"prompt": "a"}, {"prompt": "b"}]\n', "/rows.jsonl: is one JSON list; name it "),
        ("rows.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "/rows.jsonl: is UTF-16; save it as UTF-8"),
        ("rows.jsonl", '{"prompt": "a"}\n'.encode("utf-16-be"), "/rows.jsonl: is UTF-16; save it as UTF-8"),
        (
            "rows.json",
            b'{"prompt": "a"}\n{"prompt": "b"}\n',
            ".json: not valid JSON ('{' after the end of the value at line 2, column 1); it must be one list of rows; one object per line",
        ),
        ("rows.json", b'{"prompt": "a"}', "must be a JSON list of rows, got dict"),
        ("rows.json", b'[{"prompt": "a", "prompt": "b"}]', "the key `prompt` is there twice; keep one of them"),
        ("rows.json", b'[{"prompt": "caf\xe9"}]', "not UTF-8 at byte 16"),
        ("rows.parquet", b"no parquet at all", "could not be read (Parquet magic bytes not found"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        list(read_rows(str(path), "train"))
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_first_line_that_is_a_bad_row_is_only_that(tmp_path):
    for line in ('["a"]', "some text, and more", "{prompt, chosen", '"prompt"'):
        (tmp_path / "rows.jsonl").write_text(f'{line}\n{{"prompt": "b"}}\n', encoding="utf-8")
        bad, good = read_rows(str(tmp_path / "rows.jsonl"), "train")
        assert bad.problem is not None and good.columns == {"prompt": "b"}


@pytest.mark.parametrize("name", ["missing.jsonl", "some/where/deep/pairs"])
def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path, name, monkeypatch):
    monkeypatch.setattr(reading, "_read_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="no such file or folder"):
        read_rows(str(tmp_path / name), "train")


def test_a_file_of_a_folder_whose_rows_are_not_read_is_a_bad_row(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS[:1])
    (folder / "dataset_infos.json").write_text("{}")
    assert columns(folder) == ROWS[:1]

    write_jsonl(folder / "more.jsonl", ROWS[1:])  # its name says no split, beside one that does
    write_jsonl(folder / "train-2.jsonl", ROWS[1:])
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "train-3.parquet")  # another format
    rows = list(read_rows(str(folder), "train"))
    unread = {row.where: row.problem.partition(":")[0] for row in rows if row.problem}
    assert unread == dict.fromkeys((f"{folder}/more.jsonl", f"{folder}/train-3.parquet"), "the rows of this file are in no split")
    assert sorted(row.columns["n"] for row in rows if not row.problem) == [1, 2]


def test_a_folder_names_the_bad_line_inside_it_and_an_unknown_split(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_bytes(b'{"prompt": "a"}\n{oops\n')
    with pytest.raises(InputError, match=r"train\.jsonl:2: not valid JSON"):
        read_rows(str(tmp_path / "broken"), "train")

    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="no split 'dev'; it has train"):
        read_rows(str(tmp_path / "saved"), "dev")

    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"without \.jsonl, \.json or \.parquet files"):
        read_rows(str(tmp_path / "empty"), "train")


@pytest.mark.parametrize(
    ("path", "split", "hub"),
    [
        ("ultrafeedback", "train", ("openbmb/UltraFeedback", "train")),
        ("ultrafeedback_binarized", "train", ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs")),
        ("ultrafeedback_binarized", "test", ("HuggingFaceH4/ultrafeedback_binarized", "test_prefs")),
        ("ultrafeedback_binarized", "train[:-10]", ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs[:-10]")),
        ("ultrafeedback_binarized", "test_prefs", ("HuggingFaceH4/ultrafeedback_binarized", "test_prefs")),
        ("someone/pairs", "validation", ("someone/pairs", "validation")),
    ],
)
def test_hub_names_and_short_names_reach_the_hub(monkeypatch, path, split, hub):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert labels(path, split) == [f"{hub[0]}[0]", f"{hub[0]}[1]"]
    assert asked == [hub]


@pytest.mark.parametrize(
    ("reachable", "missing"),
    [
        (True, "no such file or folder here, and the hub did not give it"),
        (False, "not on this machine, not in the cache of the hub, and the hub is switched off or cannot be reached"),
    ],
)
def test_an_unreachable_hub_is_one_line(monkeypatch, reachable, missing):
    monkeypatch.setattr(reading, "prepare_hub", lambda: reachable)

    def load_dataset(name, split):
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError) as error:
        read_rows("someone/pairs", "train")
    assert str(error.value) == f"someone/pairs: {missing} (Couldn't reach 'someone/pairs' on the Hub)"


def test_a_name_that_the_hub_does_not_give_is_hinted_to_the_file_of_that_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reading, "prepare_hub", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: (_ for _ in ()).throw(FileNotFoundError("not there")))
    write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(InputError, match=r"^pairs: .* \(not there\); did you mean pairs\.jsonl\?$"):
        read_rows("pairs", "train")


def test_a_bad_parquet_file_is_said_once(tmp_path, caplog):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and nothing that would be right after it PAR1")
    with pytest.raises(InputError, match="rows.parquet: could not be read"):
        list(read_rows(str(tmp_path / "rows.parquet"), "train"))
    assert not caplog.records


def test_a_home_folder_that_cannot_be_written_to_is_explained(tmp_path):
    """Libraries read the variable when they are imported."""
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "rows.parquet")
    (tmp_path / "file").touch()
    code = f"from dvpo_ray.data.reading import read_rows; list(read_rows({str(tmp_path / 'rows.parquet')!r}, 'train'))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_H", "HF_D", "XDG"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment | {"HOME": str(tmp_path / "file")}, capture_output=True, text=True)
    line = done.stderr.strip().splitlines()[-1]
    assert f"rows.parquet: the cache {tmp_path}/file/.cache/huggingface cannot be written to (Not a directory); set HF_HOME to a folder" in line
