"""Files and folders that are whole or absent."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from dvpo_ray.files import whole_folder


@pytest.mark.parametrize(("umask", "access"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_files_of_a_result_have_the_access_that_new_files_have(tmp_path, umask, access):
    """safetensors writes by a temporary file, which only its owner may read."""
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "final") as draft:
            (draft / "sub").mkdir()
            save_file({"a": torch.zeros(1)}, draft / "sub" / "model.safetensors")
            (draft / "config.json").write_text("{}")
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "final").rglob("*") if file.is_file()]
    assert {file.name: file.stat().st_mode & 0o777 for file in files} == {"model.safetensors": access, "config.json": access}
