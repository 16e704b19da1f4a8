"""The SVG charts of the report, and the texts of its tokens."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo_ray.monitoring.charts import HEIGHT, WIDTH, Series, line_chart, nice_ticks, number, path_chart, range_chart, stacked_chart
from dvpo_ray.monitoring.report_texts import align_tokens

numbers = st.floats(-1e9, 1e9, allow_nan=False, allow_subnormal=False)
maybe_numbers = st.one_of(st.none(), numbers)


def shapes(svg: str, name: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter(name))


def tips(svg: str) -> list[str]:
    return [title.text for title in shapes(svg, "title")]


def path_points(svg: str) -> list[tuple[float, float]]:
    """The points of every line of a chart."""
    paths = [path.get("d") for path in shapes(svg, "path") if path.get("class").startswith("line")]
    return [tuple(map(float, pair.split())) for path in paths for pair in re.split("[ML]", path) if pair]


# -------------------------------------------------------------------------------------------------------- charts


def test_line_chart_places_points_in_proportion():
    svg = line_chart([1, 2, 3], [Series("loss", [0.0, 5.0, 10.0])], name="Loss")
    (x0, y0), (x1, y1), (x2, y2) = path_points(svg)
    assert x1 - x0 == pytest.approx(x2 - x1) and x2 > x1
    assert y0 - y1 == pytest.approx(y1 - y2) and y2 < y1  # SVG's y points down


def test_a_gap_breaks_the_line_and_a_lone_point_is_a_dot():
    svg = line_chart([1, 2, 3, 4, 5, 6], [Series("loss", [1.0, 2.0, None, 3.0, None, None])])
    assert len([p for p in shapes(svg, "path") if "line" in p.get("class")]) == 1
    assert len(shapes(svg, "circle")) == 1


def test_every_step_has_a_tooltip_with_its_values():
    svg = line_chart([1, 2], [Series("mean", [0.5, None]), Series("max", [1.0, 1250.0])], spread=[0.1, 0.2])
    assert tips(svg) == ["step 1\nmean 0.5\nmax 1\n± 1 standard deviation 0.1", "step 2\nmax 1,250\n± 1 standard deviation 0.2"]


def test_the_spread_lies_around_the_first_line():
    svg = line_chart([1, 2], [Series("mean", [1.0, 3.0]), Series("max", [4.0, 4.0])], spread=[1.0, 0.5], from_zero=True)
    (band,) = (path for path in shapes(svg, "path") if path.get("class").startswith("band"))
    heights = [float(pair.split()[1]) for pair in re.split("[MLz]", band.get("d")) if pair]
    (_, mean_1), (_, mean_2) = path_points(svg)[:2]
    high_1, high_2, low_2, low_1 = heights
    assert low_1 - mean_1 == pytest.approx(mean_1 - high_1, abs=0.2) and low_2 - mean_2 == pytest.approx(mean_2 - high_2, abs=0.2)
    assert low_1 - high_1 == pytest.approx(2 * (low_2 - high_2), abs=0.4)


def test_marks_have_their_interval():
    svg = line_chart([1, 2], [Series("gold", [0.5, 0.6])], marks=[(0.0, (0.3, 0.2, 0.4))])
    assert "step 0\nheld out 0.3, 95 % interval 0.2 to 0.4" in tips(svg)


def test_marks_alone_are_a_chart():
    assert len(shapes(line_chart([], [], marks=[(0.0, (0.3, 0.2, 0.4))], name="Gold"), "circle")) == 1


def test_a_limit_is_drawn_where_it_is_in_sight():
    assert 'class="limit"' in line_chart([1, 2], [Series("clip", [0.1, 0.35])], limit=0.3)
    assert 'class="limit"' not in line_chart([1, 2], [Series("clip", [0.1, 0.12])], limit=0.3)


def test_a_chart_says_in_words_what_it_shows():
    svg = line_chart([1, 2, 3], [Series("mean", [None, 0.25, 12.5])], name="Value")
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == "Value: mean from 0.25 at step 2 to 12.5 at step 3."


def test_stacked_bars_add_up():
    svg = stacked_chart([1, 2], [Series("generate", [4.0, None]), Series("update", [2.0, 3.0], "c2")], name="Time")
    generate, update = (p.get("d") for p in shapes(svg, "path"))
    generate_low, generate_high = map(float, re.match(r"M\S+ (\S+?)V(\S+?)h", generate).groups())
    (low, high), _ = [tuple(map(float, pair)) for pair in re.findall(r"M\S+ (\S+?)V(\S+?)h", update)]
    assert low == generate_high
    assert generate_low - generate_high == pytest.approx(2 * (low - high), abs=0.3)
    assert tips(svg) == ["step 1\ngenerate 4\nupdate 2", "step 2\nupdate 3"]


def test_path_chart_goes_through_the_plane_in_the_order_of_steps():
    svg = path_chart([0.0, 10.0, None, 5.0], [0.1, 0.5, 0.6, 0.3], [1, 2, 3, 4], name="Gold against KL", x_label="KL", y_label="gold")
    x = [point[0] for point in path_points(svg)]
    assert len(x) == 3 and x[0] < x[2] < x[1]
    assert tips(svg)[0] == "step 1\nKL 0\ngold 0.1"


def test_ranges_share_one_scale():
    svg = range_chart({"before": (0.1, 0.0, 0.2), "after": (0.5, 0.4, 0.6)}, name="Gold score", x_label="gold score")
    before, after = (float(circle.get("cx")) for circle in shapes(svg, "circle"))
    assert before < after and tips(svg) == ["before 0.1, 95 % interval 0 to 0.2", "after 0.5, 95 % interval 0.4 to 0.6"]


@settings(max_examples=60, deadline=None)
@given(st.lists(maybe_numbers, min_size=1, max_size=30), st.booleans())
def test_lines_stay_inside_the_picture(ys, from_zero):
    svg = line_chart(range(1, len(ys) + 1), [Series("y", ys)], from_zero=from_zero)
    for x, y in path_points(svg):
        assert 0 <= x <= WIDTH and 0 <= y <= HEIGHT
    assert not re.search(r"nan|inf", svg)


@settings(max_examples=200, deadline=None)
@given(numbers, numbers, st.integers(2, 8), st.booleans())
def test_ticks_are_round_even_and_enclose_the_range(a, b, count, whole):
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high, count=count, whole=whole)
    assert 2 <= len(ticks) <= 2 * count + 3
    tolerance = 1e-6 * (ticks[1] - ticks[0]) + 1e-9 * max(abs(low), abs(high))
    assert ticks[0] <= low + tolerance and ticks[-1] >= high - tolerance
    gaps = [y - x for x, y in zip(ticks, ticks[1:], strict=False)]
    assert max(gaps) - min(gaps) <= 1e-6 * max(map(abs, ticks))
    if whole:
        assert all(tick == round(tick) for tick in ticks)


def test_ticks_of_tiny_numbers_differ():
    assert nice_ticks(0.0, 3e-14, count=3) == [0.0, 1e-14, 2e-14, 3e-14]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (-0.0256, "−0.0256"),
        (12.345, "12.3"),
        (1920, "1,920"),
        (123456.7, "123,457"),
        (99.96, "100"),
        (1e-6, "1.0e−6"),
        (2.5e8, "2.5e8"),
        (1.0, "1"),
    ],
)
def test_numbers_for_people(value, text):
    assert number(value) == text


# -------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    ("tokens", "response", "pieces"),
    [
        (["Hello", " there", "!", "<|im_end|>"], "Hello there!", ["Hello", " there", "!", "<|im_end|>"]),  # byte-level BPE
        (["Once", "up", "on", "a", "time", ".", "</s>"], "Once upon a time.", ["Once", " up", "on", " a", " time", ".", "</s>"]),  # SentencePiece
        (["Hi", " \ufffd", "\ufffd", "\ufffd", " all"], "Hi 😀 all", ["Hi", " 😀", "", "", " all"]),  # bytes of one character
        (["Hi", "\ufffd", "\ufffd"], "Hi😀", ["Hi", "😀", ""]),
        (["\ufffd", "\ufffd"], "é", ["é", ""]),
        (["a", "\n", "\n", "b"], "a\n\nb", ["a", "\n", "\n", "b"]),
        (["", "a"], "a", ["", "a"]),
        (["It", " is", " ,"], "It is,", ["It", " is", ","]),  # decoding tidied a space away
        (["x"], "", ["x"]),
        ([], "", []),
    ],
)
def test_tokens_stand_for_their_part_of_the_text(tokens, response, pieces):
    assert align_tokens(tokens, response) == pieces


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab .,\n", min_size=1, max_size=4), max_size=12), st.booleans())
def test_pieces_of_text_tokens_join_to_the_response(tokens, spaces_lost):
    response = "".join(tokens)
    given_tokens = [token.lstrip(" ") for token in tokens] if spaces_lost else tokens
    pieces = align_tokens(given_tokens, response)
    assert len(pieces) == len(tokens)
    assert "".join(pieces).replace(" ", "") == response.replace(" ", "")
    if not spaces_lost:
        assert pieces == tokens
