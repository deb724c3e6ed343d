"""Compile a layer of every family that shares prefixes, and print how many graphs four packs of different trees take.

Prints a JSON object a line: the family, the kernel, the number of graphs, and the relative distance of the gradients
from those without compilation.
"""

import json

import torch
from families import FAMILIES
from torch._dynamo.utils import counters
from tree_samples import SHARING, checked_kernel, gradient_of, make_pack

import cafe.attention.paths
import cafe.attention.tree

TEXTS = [["what is it?", "why?"], ["is it?", "who?", "what is it called?"], ["where?", "a longer one?"], ["one"]]

cafe.attention.tree.MIN_BLOCKWISE_TOKENS = 1
cafe.attention.paths.causal_attention = checked_kernel
torch.set_num_threads(1)

for family in SHARING:
    try:
        model = FAMILIES[family]()
    except ImportError:
        continue  # this version of transformers lacks it
    model.lvlm.double().train()
    layer = model.lvlm.get_decoder().layers[0]
    plain = layer.forward
    for kernel in ("blocks", "paths", "mask"):
        packs = [make_pack(model, kernel, *texts) for texts in TEXTS]
        assert len({packed.tree.subtree_end.shape[1] for packed in packs}) > 1
        layer.forward = plain
        expected = [gradient_of(model, packed) for packed in packs]
        torch.compiler.reset()
        counters.clear()
        # The backward pass is traced too in one of them, which takes most of the time.
        backend = "aot_eager" if family == "llava_onevision" else "eager"
        layer.forward = torch.compile(plain, dynamic=True, fullgraph=True, backend=backend)
        distance = 0.0
        for packed, results in zip(packs, expected, strict=True):
            for actual, other in zip(gradient_of(model, packed), results, strict=True):
                distance = max(distance, float((actual - other).norm() / other.norm()))
        graphs = counters["stats"]["unique_graphs"]
        print(json.dumps({"family": family, "kernel": kernel, "graphs": graphs, "distance": distance}), flush=True)
