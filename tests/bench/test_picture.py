"""The picture of the README is drawn from the headline table of RESULTS.md."""

import pytest
from PIL import Image

from bench.picture import PICTURE, RESULTS, SOURCE, Point, draw, headline

TABLE = """
# Numbers

| something | else |
| --- | --- |
| 1 | 2 |

## Here

| method | seeds | trained: kept | learned | other: kept | learned |
| --- | --- | --- | --- | --- | --- |
| `joint` | 5 | 0.985 ±0.011 | 0.986 | 0.314 | 0.314 |
| equal weights | 3 | 0.908 ±0.029 | 0.997 | 0.267 ±0.020 | 0.315 |
"""


def test_every_method_of_the_table_is_found_on_every_set():
    found = headline(TABLE)
    assert found.title == "Here"
    assert found.sets == {
        "trained": [
            Point("joint", 0.986, 0.985, 0.011),
            Point("equal weights", 0.997, 0.908, 0.029),
        ],
        "other": [Point("joint", 0.314, 0.314, None), Point("equal weights", 0.315, 0.267, 0.02)],
    }
    assert len(draw(found).axes) == 2


def test_the_picture_was_drawn_from_the_table_as_it_stands():
    found = headline(RESULTS.read_text(encoding="utf-8"))
    methods = {point.method for points in found.sets.values() for point in points}
    assert {"joint", "agcl", "sequential"} <= methods
    with Image.open(PICTURE) as picture:
        assert picture.text[SOURCE] == repr(found), "run PYTHONPATH=tests python -m bench.picture"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (": kept", "", "no table with a column '<set>: kept'"),
        ("| learned |\n", "| after |\n", "no column 'learned' after 'other: kept'"),
        ("| method |", "| name |", "no column 'method'"),
        ("0.908 ±0.029", "", "no score in '' or '0.997' of equal weights"),
    ],
)
def test_a_table_without_the_columns_is_refused(old, new, said):
    with pytest.raises(ValueError, match=said.replace("|", r"\|")):
        headline(TABLE.replace(old, new))
