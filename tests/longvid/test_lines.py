"""Charts are well-formed SVG, points stand where their values say, and gaps stay gaps."""

from xml.etree import ElementTree

import pytest

from longvid.lines import Lines, draw_lines

SPACE = "{http://www.w3.org/2000/svg}"


def drawn(**options):
    return ElementTree.fromstring(draw_lines(Lines(**{"title": "a & b", "x": "x", "y": "y", **options})))


def test_points_stand_where_their_values_say():
    root = drawn(lines={"one": [(1, 1), (2, 2), (4, 4)]}, log_x=True, log_y=True)
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in root.iter(f"{SPACE}circle")]
    middle = tuple((a + b) / 2 for a, b in zip(dots[0], dots[2], strict=True))
    assert len(dots) == 3 and dots[1] == pytest.approx(middle, abs=0.1)
    assert dots[0][0] < dots[2][0] and dots[0][1] > dots[2][1]
    words = [text.text for text in root.iter(f"{SPACE}text")]
    assert {"a & b", "x", "y", "one", "1", "2", "4"} <= set(words)


def test_gaps_stay_gaps_and_lines_may_be_dashed():
    root = drawn(lines={"one": [(0, 1.0), (1, 2.0), (2, None), (3, 1.0), (4, 2.0)], "two": [(0, 0.5), (4, 0.5)]},
                 dashed=frozenset({"two"}))  # fmt: skip
    assert len(list(root.iter(f"{SPACE}polyline"))) == 3
    assert sum(bool(line.get("stroke-dasharray")) for line in root.iter(f"{SPACE}polyline")) == 1


@pytest.mark.parametrize("options, said", [
    ({"lines": {"one": [(0, None)]}}, "has no points"),
    ({"lines": {"one": [(1, 0.0), (2, 1.0)]}, "log_y": True}, "has no place for 0"),
])  # fmt: skip
def test_what_cannot_be_drawn(options, said):
    with pytest.raises(ValueError, match=said):
        drawn(**options)
