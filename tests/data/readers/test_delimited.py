"""CSV and TSV files: lists in cells, quotes, and rows that do not fit the header."""

import csv

import pytest

from cafe.data.readers.base import open_rows
from cafe.errors import CafeError


def rows_of(path, text):
    path.write_text(text)
    rows = open_rows(str(path), 1)
    return [rows[index] for index in range(sum(rows.chunks))]


def test_a_json_list_in_a_cell_is_a_list_and_a_text_with_a_bracket_is_not(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([["raw"], ['["a", "b"]'], ["[a cat"], ["[" * 100_000], ["[]"]])
    rows = open_rows(str(tmp_path / "a.csv"), 1)
    assert [rows[index]["raw"] for index in range(4)] == [["a", "b"], "[a cat", "[" * 100_000, []]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
@pytest.mark.parametrize("cells", [["0.png", "A red square", " with a corner"], ["0.png"]])
def test_a_row_of_another_length_than_the_header_is_a_bad_record(tmp_path, kind, cells):
    delimiter = {"csv": ",", "tsv": "\t"}[kind]
    rows = [["query_image", "positive"], cells, ["1.png", "A green square"]]
    (tmp_path / f"a.{kind}").write_text("\n".join(map(delimiter.join, rows)))
    rows = open_rows(str(tmp_path / f"a.{kind}"), 1)
    assert rows.chunks == [2] and rows[1] == {"query_image": "1.png", "positive": "A green square"}
    with pytest.raises(CafeError, match=rf"the row has {len(cells)} cells and the header 2"):
        rows[0]


def test_tab_separated_files_take_quotes_literally(tmp_path):
    texts = ['"a sign that reads stop', "a green square", "the 12 pizza", 'a 5" screen', "plain", '"all quoted"']
    lines = ["positive\tquery_image", *(f"{text}\t{number}.png" for number, text in enumerate(texts))]
    rows = rows_of(tmp_path / "a.tsv", "\n".join(lines))
    assert rows == [{"positive": text, "query_image": f"{number}.png"} for number, text in enumerate(texts)]


def test_an_open_quote_of_a_csv_file_is_named_instead_of_swallowing_what_follows(tmp_path):
    (tmp_path / "a.csv").write_text('positive,image\n"a sign that reads stop,0.png\na square,1.png\n')
    with pytest.raises(CafeError, match=r'a\.csv has a quote that is never closed, after "a sign that reads'):
        open_rows(str(tmp_path / "a.csv"), 1)
    assert rows_of(tmp_path / "a.csv", 'a,b\n"say ""stop""",1\n') == [{"a": 'say "stop"', "b": "1"}]


def test_a_column_that_is_named_twice_is_an_error(tmp_path):
    (tmp_path / "a.csv").write_text("caption,image,caption,,\na,b,c,,\n")
    with pytest.raises(CafeError, match=r"a\.csv names the column 'caption' more than once"):
        open_rows(str(tmp_path / "a.csv"), 1)
