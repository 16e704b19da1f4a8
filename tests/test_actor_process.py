"""An actor works in the folder that the driver was started from, wherever its process began."""

from __future__ import annotations

import os
import subprocess
import sys

from cli_runs import ROOT

SCRIPT = """
import os, sys
from dvpo_ray.runtime.process import Actor
from dvpo_ray.errors import ResourceError
try:
    Actor(3, "run")
    print(os.getcwd())
except ResourceError as error:
    sys.exit(str(error))
"""


def start_actor(began_in, working_folder, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "DVPO_WORKING_FOLDER": str(working_folder), **variables}
    return subprocess.run([sys.executable, "-c", SCRIPT], cwd=began_in, env=environment, capture_output=True, text=True, check=False)


def test_relative_paths_are_the_drivers(tmp_path):
    began_in, working_folder = tmp_path / "cluster", tmp_path / "project"
    began_in.mkdir()
    working_folder.mkdir()
    done = start_actor(began_in, working_folder)
    assert done.returncode == 0, done.stderr
    assert (working_folder / "run" / "logs" / "actor-3.log").read_text().splitlines() == [str(working_folder)]


def test_a_folder_that_the_node_does_not_have_is_named(tmp_path):
    done = start_actor(tmp_path, tmp_path / "absent")
    assert done.returncode == 1 and str(tmp_path / "absent") in done.stderr and "all nodes share" in done.stderr


def test_another_copy_of_the_package_than_the_drivers_is_refused(tmp_path):
    copy = tmp_path / "clone" / "dvpo_ray"
    copy.mkdir(parents=True)
    done = start_actor(tmp_path, tmp_path, DVPO_PACKAGE_FOLDER=str(copy))
    assert done.returncode == 1 and f"but this command runs {copy}; to run the first, put PYTHONPATH={ROOT} before the command" in done.stderr
    assert f"to run the second, start the cluster with PYTHONPATH={copy.parent} (" in done.stderr
    in_its_folder = start_actor(tmp_path, ROOT, DVPO_PACKAGE_FOLDER=str(copy))
    assert in_its_folder.returncode == 1 and "to run the second, start the command in another folder (" in in_its_folder.stderr
    elsewhere = start_actor(tmp_path, tmp_path, DVPO_PACKAGE_FOLDER=str(tmp_path / "only" / "on" / "another" / "node"))
    assert elsewhere.returncode == 0, elsewhere.stderr
