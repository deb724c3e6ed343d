"""`cafe_tree` in the language models of all families: every kernel, gradient checkpointing, compilation, generation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_samples import READ_ONE_BY_ONE, WIDE, make
from tree_samples import SHARING, checked_kernel, gradient_of, make_pack

import cafe.attention.paths
import cafe.attention.tree
from cafe.attention.registration import CAFE_TREE
from cafe.content import Content
from cafe.lvlm.forward import forward_packed
from cafe.packing import pack
from cafe.training.optimizer import enable_gradient_checkpointing


@pytest.fixture(autouse=True)
def short_rows_are_read_by_blocks(monkeypatch):
    monkeypatch.setattr(cafe.attention.tree, "MIN_BLOCKWISE_TOKENS", 1)


def assert_close(results, expected):
    # Some families have norms in float32.
    for actual, other in zip(results, expected, strict=True):
        assert (actual - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", SHARING)
def test_every_kernel_gives_the_gradient_of_the_dense_mask(family, checkpointing, monkeypatch):
    model = make(family)
    model.lvlm.double().train()
    assert model.lvlm.config.get_text_config()._attn_implementation == CAFE_TREE
    if checkpointing:
        enable_gradient_checkpointing(model.lvlm)
    expected = gradient_of(model, make_pack(model, "mask", "what is it?", "why?"))
    monkeypatch.setattr(cafe.attention.paths, "causal_attention", checked_kernel)
    for kernel in ("blocks", "paths"):
        packed = make_pack(model, kernel, "what is it?", "why?")
        assert packed.tree.kernel == kernel
        assert_close(gradient_of(model, packed), expected)


def test_compiled_layers_are_one_graph_for_packs_of_different_trees():
    """In a process of its own: what checks the shapes of arguments in tests would break the graphs."""
    script = Path(__file__).parents[1] / "compiled_layers.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert {result["kernel"] for result in results} == {"blocks", "paths", "mask"}
    assert len({result["family"] for result in results}) >= 8
    for result in results:
        assert result["graphs"] == 1, result
        assert result["distance"] <= 1e-5, result  # some families have norms in float32
