"""Comparison of runs at equal KL."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dvpo_ray.experiments.advantage_modes import Curve, markdown, plot, summarise


def curve(mode, seed, kl, gold):
    return Curve(mode, seed, np.array(kl, float), np.array(gold, float))


def test_gold_is_read_where_a_run_first_reaches_a_kl():
    run = curve("gae", 0, [0, 4, 10, 6, 12], [0.5, 0.7, 0.9, 0.1, 1.0])
    assert run.gold_at(0) == 0.5
    assert run.gold_at(2) == pytest.approx(0.6)
    assert run.gold_at(7) == pytest.approx(0.8)  # the first crossing, not the later one
    assert math.isnan(run.gold_at(13))


def test_table_over_seeds(tmp_path):
    curves = [curve("gae", 0, [0, 8], [0.5, 0.9]), curve("gae", 1, [0, 8], [0.5, 0.7]), curve("td", 0, [0, 2], [0.5, 0.6])]
    rows = list(summarise(curves, [8]))
    assert [row["mode"] for row in rows] == ["gae", "td"]
    assert rows[0]["gold at 8 nats"] == {"mean": pytest.approx(0.8), "std": pytest.approx(0.2 / math.sqrt(2))}
    text = markdown(rows)
    assert "| `gae` | 0.800 ± 0.141 |" in text and "| `td` | – |" in text
    plot(curves, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
