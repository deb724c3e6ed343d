"""Images that evaluation files name are looked for in the folder of evaluation files alone."""

import pytest

from cafe.errors import RecordError
from cafe.evaluation.io import find_image
from cafe.evaluation.suites.mmeb.datasets import find_in_folders


@pytest.mark.parametrize("outside", ["../secret.png", "images/../../secret.png", "absolute"])
def test_no_evaluation_file_names_an_image_outside_of_its_folder(tmp_path, outside):
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for path in (tmp_path / "secret.png", data / "images" / "a.png"):
        path.touch()
    name = str(tmp_path / "secret.png") if outside == "absolute" else outside
    source = data / ("a.parquet" if outside == "absolute" else "a.json")
    with pytest.raises(RecordError, match=r"secret\.png, which .*names, is in none of"):
        find_image(name, data, source)
    assert find_in_folders(data, ("", "images"), name) is None
    for name in ("a.png", "../images/a.png", str(data / "images" / "a.png")):
        assert (data / find_image(name, data, source)).samefile(data / "images" / "a.png")
        assert find_in_folders(data, ("images",), name).samefile(data / "images" / "a.png")


def test_a_folder_of_images_may_be_a_link(tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "a.png").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "images").symlink_to(tmp_path / "coco")
    assert str(find_image("a.png", tmp_path / "data", tmp_path / "a.json")) == "images/a.png"
