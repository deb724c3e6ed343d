"""The pixels of what was found, wherever it is."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from collection_samples import write_pdf
from samples import noise, png

from cafe.errors import RecordError
from cafe.index.manifest import Root
from cafe.index.pixels import load_image


def test_an_image_file_is_loaded_even_if_its_name_looks_like_a_record(tmp_path):
    path = str(tmp_path / "x#record=3")
    noise(0, 9, 8).save(path, "PNG")
    assert np.array_equal(load_image(path, path, None, ()), noise(0, 9, 8))
    with pytest.raises(RecordError, match="does not exist"):
        load_image("/none.png", "/none.png", None, ())


def test_an_image_of_a_record_is_loaded_by_its_numbers(tmp_path):
    path = str(tmp_path / "t.parquet")
    pq.write_table(pa.Table.from_pylist([{"photo": [png("red"), png("blue")]}, {"photo": [png("lime")]}]), path)
    roots = [Root("/other"), Root(path, is_source=True, overrides=("columns.image=photo",))]
    colors = [(f"{path}#record=0", (255, 0, 0)), (f"{path}#record=0.1", (0, 0, 255)), (f"{path}#record=1", (0, 255, 0))]
    for id, color in colors:
        assert load_image(id, path, None, roots).getpixel((0, 0)) == color
    for number in ("1.7", "7", "99999999999999999999"):
        with pytest.raises(RecordError, match=f"Record {number.partition('.')[0]} of .* has changed: index it again"):
            load_image(f"{path}#record={number}", path, None, roots)


def test_a_page_is_rendered_in_a_process_of_its_own(tmp_path):
    path = str(write_pdf(tmp_path / "a.pdf", ["one", "two"]))
    assert max(load_image(f"{path}#page=2", path, 2, ()).size) == 1600


def test_a_page_that_a_file_has_no_more_is_one_error(tmp_path):
    path = str(write_pdf(tmp_path / "a.pdf", ["one"]))
    with pytest.raises(RecordError, match=r"Page 2 of .* cannot be read"):
        load_image(f"{path}#page=2", path, 2, ())
