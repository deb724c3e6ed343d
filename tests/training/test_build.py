"""What a recipe says reaches the data that is built from it."""

from dataclasses import replace

import pytest

from cafe.data.loader import iterate_batches
from cafe.model import Cafe
from cafe.training.build import build_dataset


@pytest.mark.parametrize(
    ("field", "limit"), [("max_image_bytes", 100), ("max_image_pixels", 1000)], ids=["bytes", "pixels"]
)
def test_the_limits_on_images_of_a_recipe_hold_in_loader_workers(recipe, field, limit):
    recipe = replace(recipe, data=replace(recipe.data, **{field: limit}))
    dataset = build_dataset(recipe, Cafe.load(recipe.model.base, recipe.prompts), 0, 1)
    [batch] = iterate_batches(dataset, 0, 1, 1)
    assert len(batch.bad_records) == recipe.batch_size
    assert all(f"(data.{field})" in reason for reason in batch.bad_records)


def test_a_source_has_limits_of_its_own(recipe):
    [source] = recipe.data.sources
    data = replace(recipe.data, sources=(replace(source, max_image_pixels=10**6),), max_image_pixels=1)
    dataset = build_dataset(replace(recipe, data=data), Cafe.load(recipe.model.base, recipe.prompts), 0, 1)
    assert not dataset[0].bad_records
