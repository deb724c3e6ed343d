"""The trimmed last layer: the same where it is read, and nothing computed elsewhere.

Compared in float64: how far apart two orders of the same sums are in float32 depends on the CPU.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as hf
from branch_samples import branch
from families import FAMILIES, TEXT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from cafe.attention.last_layer import restrict_last_layer, tokenwise_modules
from cafe.attention.registration import use_tree_attention
from cafe.attention.tree import tree_attention
from cafe.packing import PackingConfig, pack
from cafe.training.optimizer import enable_gradient_checkpointing

OTHER_LAYERS = {"gemma4"}  # something follows the MLP of its layers
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
IDS = torch.randint(10, 40, (2, 7), generator=torch.Generator().manual_seed(0))
COORDS = torch.tensor([[0, 4], [1, 0], [0, 4], [1, 6]])  # one of them twice


def make(family):
    try:
        return FAMILIES[family]().lvlm.double().train()
    except ImportError as error:
        pytest.skip(str(error))


def gradients(lvlm, weight, *read_index):
    """Return the hidden states at `COORDS`, the gradient of their weighted sum, and all hidden states."""
    lvlm.zero_grad()
    with restrict_last_layer(lvlm, *read_index):
        hidden = lvlm.base_model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state
    read = hidden[COORDS[:, 0], COORDS[:, 1]]
    (read * weight).sum().backward()
    return read, torch.cat([p.grad.flatten() for p in lvlm.parameters() if p.grad is not None]), hidden


def all_coords():
    return torch.cartesian_prod(torch.arange(2), torch.arange(7))


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_equal_those_of_the_whole_layer(family):
    lvlm = make(family)
    assert bool(tokenwise_modules(lvlm)) == (family not in OTHER_LAYERS)
    weight = torch.randn(len(COORDS), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    restricted = gradients(lvlm, weight, COORDS[:2], COORDS[2:])[:2]
    for actual, expected in zip(restricted, gradients(lvlm, weight, all_coords())[:2], strict=True):
        torch.testing.assert_close(actual, expected, **TIGHT)


def ernie_moe() -> PreTrainedModel:
    """Make a model with experts for text and others for images, which take the modality of every token."""
    text = {
        **TEXT, "vocab_size": 64, "mlp_layer_types": ["sparse", "sparse"], "moe_intermediate_size": [16, 16],
        "moe_num_experts": 2, "moe_k": 1, "moe_num_shared_experts": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "num_heads": 2, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64}
    config = hf.AutoConfig.for_model("ernie4_5_vl_moe", text_config=text, vision_config=vision)
    return hf.AutoModelForImageTextToText.from_config(config)


def gpt_oss() -> PreTrainedModel:
    """Make a model whose experts also return their router's scores."""
    return hf.GptOssForCausalLM(hf.GptOssConfig(**TEXT, vocab_size=64, num_local_experts=2, num_experts_per_tok=1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("make", "num_modules"), [(ernie_moe, 1), (gpt_oss, 2)])
def test_mixtures_of_experts_equal_the_whole_layer(make, num_modules, dtype, tolerance):
    torch.manual_seed(0)
    lvlm = make().to(dtype).train()
    use_tree_attention(lvlm)  # of which one looks up no implementation but "eager", and stays as it is
    if dtype == torch.float64:
        lvlm.set_experts_implementation("eager")  # PyTorch's grouped matrix products do not take float64
    assert len(tokenwise_modules(lvlm)) == num_modules
    weight = torch.randn(len(COORDS), 1, dtype=dtype, generator=torch.Generator().manual_seed(1))
    restricted, whole = (gradients(lvlm, weight, read_index)[:2] for read_index in (COORDS, all_coords()))
    plain = lvlm.base_model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state
    read = plain[COORDS[:, 0], COORDS[:, 1]]
    assert (restricted[0] - read).norm() <= tolerance * read.norm()
    assert (restricted[1] - whole[1]).norm() <= tolerance * whole[1].norm()


class NumQueries(TorchDispatchMode):
    """Record the number of queries of each call of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.counts.append(args[0].shape[2])
        return func(*args, **(kwargs or {}))


def test_last_layer_attention_computes_queries_only_where_it_is_read():
    lvlm = make("llava_onevision")
    dialogue, embedding = branch([*range(10, 30)], num_supervised=3), branch([*range(10, 25), *range(30, 36)])
    packed = pack([[embedding]], [[dialogue]], PackingConfig(max_row_tokens=40))
    coords = torch.cat([packed.embedding_index, packed.logits_index])
    columns = packed.tree.subtree_end.shape[1]
    results = []
    for num_more in (0, columns):  # if most tokens are read, attention is computed for all
        more = torch.cartesian_prod(torch.arange(1), torch.arange(num_more))
        lvlm.zero_grad()
        indices = packed.embedding_index, packed.logits_index, more
        with NumQueries() as queries, tree_attention(lvlm, packed.tree, *indices) as inputs:
            hidden = lvlm.base_model(**packed.inputs, **inputs, use_cache=False).last_hidden_state
        read = hidden[coords[:, 0], coords[:, 1]]
        read.square().sum().backward()
        grads = torch.cat([p.grad.flatten() for p in lvlm.parameters() if p.grad is not None])
        results.append((read, grads))
        assert queries.counts[-1] == (columns if num_more else len(coords))
        assert queries.counts[-2] == columns
    for restricted, whole in zip(*results, strict=True):
        torch.testing.assert_close(restricted, whole, **TIGHT)


def test_flops_are_those_of_the_tokens_read_and_hooks_are_removed():
    lvlm = make("llava_onevision")
    ids = torch.arange(10, 24).view(2, 7)
    weights = sum(parameter.numel() for module in tokenwise_modules(lvlm) for parameter in module.parameters())

    def flops(*read_index):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), restrict_last_layer(lvlm, *read_index):
            lvlm.base_model(input_ids=ids)
        return counter.get_total_flops()

    whole = flops(all_coords())
    assert whole - flops(COORDS) == 2 * weights * (14 - 3)
    assert whole - flops(COORDS[:0]) == 2 * weights * 14
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lvlm.base_model(input_ids=ids)
    assert counter.get_total_flops() == whole


def test_another_thread_computes_the_whole_layer_meanwhile():
    lvlm = make("llava_onevision").eval()
    whole = lvlm.base_model(input_ids=IDS).last_hidden_state
    with ThreadPoolExecutor(1) as other, restrict_last_layer(lvlm, COORDS):
        meanwhile = other.submit(lambda: lvlm.base_model(input_ids=IDS).last_hidden_state).result()
        restricted = lvlm.base_model(input_ids=IDS).last_hidden_state
    assert torch.equal(meanwhile, whole) and not torch.equal(restricted, whole)


@pytest.mark.filterwarnings("error::FutureWarning")  # of a deprecated name
def test_gradient_checkpointing_computes_the_whole_last_layer():
    lvlm = make("llava_onevision")
    weight = torch.ones(len(COORDS), 1, dtype=torch.float64)
    plain = gradients(lvlm, weight, all_coords())
    enable_gradient_checkpointing(lvlm)
    for actual, expected in zip(gradients(lvlm, weight, COORDS), plain, strict=True):
        torch.testing.assert_close(actual, expected, **TIGHT)
