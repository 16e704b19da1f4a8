"""What libraries write while a stage runs in this process goes to a file of the run folder, or nowhere; the user's lines stay."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dvpo_ray.monitoring.logs import library_output


def test_libraries_write_to_the_file_and_the_stage_to_the_terminal(capfd, tmp_path):
    log = tmp_path / "logs" / "sft.log"
    with library_output() as output:
        os.write(1, b"before the folder\n")
        output.keep(log)
        os.write(2, b"native code\n")
        subprocess.run([sys.executable, "-c", "print('a subprocess')"], check=True)
        output.terminal.write("for the user\n")
    os.write(1, b"afterwards\n")
    assert capfd.readouterr() == ("for the user\nafterwards\n", "")
    assert log.read_text() == "before the folder\nnative code\na subprocess\n"


def test_a_refused_stage_keeps_nothing_and_the_console_comes_back(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyError), library_output():
        os.write(1, b"chatter\n")
        raise KeyError
    os.write(2, b"dvpo: refused\n")
    assert capfd.readouterr() == ("", "dvpo: refused\n") and not list(tmp_path.iterdir())


def test_deepspeed_is_quiet_when_it_is_imported():
    code = "from dvpo_ray.monitoring.logs import quiet_libraries as q; q(); import logging; log = logging.getLogger('DeepSpeed'); "
    code += "log.setLevel(0); log.addHandler(logging.StreamHandler()); log.warning('no GPU'); log.error('broken')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr == "broken\n"
