"""The last layer behind attention: the same where it is read, and nothing computed elsewhere.

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
from cafe.attention.tree import attention_mask
from cafe.packing import PackingConfig, pack
from cafe.training.optimizer import enable_gradient_checkpointing

OTHER_LAYERS = {"gemma4"}  # something follows the feed-forward part of its layers
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
IDS = torch.randint(10, 40, (2, 7), generator=torch.Generator().manual_seed(0))
PLACES = torch.tensor([[0, 4], [1, 0], [0, 4], [1, 6]])  # one of them twice


def make(family):
    try:
        return FAMILIES[family]().lvlm.double().train()
    except ImportError as error:
        pytest.skip(str(error))


def gradients(lvlm, weight, *context):
    """The hidden states at `PLACES`, and the gradient of their weighted sum."""
    lvlm.zero_grad()
    with restrict_last_layer(lvlm, *context):
        hidden = lvlm.base_model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state
    read = hidden[PLACES[:, 0], PLACES[:, 1]]
    (read * weight).sum().backward()
    return read, torch.cat([part.grad.flatten() for part in lvlm.parameters() if part.grad is not None]), hidden


def everywhere():
    return torch.cartesian_prod(torch.arange(2), torch.arange(7))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_and_its_gradient_are_those_of_the_whole_layer(family):
    lvlm = make(family)
    assert bool(tokenwise_modules(lvlm)) == (family not in OTHER_LAYERS)
    weight = torch.randn(len(PLACES), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for one, plain in zip(
        gradients(lvlm, weight, PLACES[:2], PLACES[2:])[:2], gradients(lvlm, weight, everywhere())[:2], strict=True
    ):
        torch.testing.assert_close(one, plain, **TIGHT)


def ernie_moe() -> PreTrainedModel:
    """Experts for words and others for images, which are given the kinds of all tokens."""
    text = {
        **TEXT, "vocab_size": 64, "mlp_layer_types": ["sparse", "sparse"], "moe_intermediate_size": [16, 16],
        "moe_num_experts": 2, "moe_k": 1, "moe_num_shared_experts": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "num_heads": 2, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64}
    config = hf.AutoConfig.for_model("ernie4_5_vl_moe", text_config=text, vision_config=vision)
    return hf.AutoModelForImageTextToText.from_config(config)


def gpt_oss() -> PreTrainedModel:
    """Experts who return their router's scores beside what they make."""
    return hf.GptOssForCausalLM(hf.GptOssConfig(**TEXT, vocab_size=64, num_local_experts=2, num_experts_per_tok=1))


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("make", "parts"), [(ernie_moe, 1), (gpt_oss, 2)])
def test_experts_are_read_as_the_whole_layer_is(make, parts, dtype, close):
    torch.manual_seed(0)
    lvlm = make().to(dtype).train()
    if dtype == torch.float64:
        lvlm.set_experts_implementation("eager")  # PyTorch's grouped products know no float64
    assert len(tokenwise_modules(lvlm)) == parts
    weight = torch.randn(len(PLACES), 1, dtype=dtype, generator=torch.Generator().manual_seed(1))
    some, whole = (gradients(lvlm, weight, context)[:2] for context in (PLACES, everywhere()))
    plain = lvlm.base_model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state
    read = plain[PLACES[:, 0], PLACES[:, 1]]
    assert (some[0] - read).norm() <= close * read.norm()
    assert (some[1] - whole[1]).norm() <= close * whole[1].norm()


class Queries(TorchDispatchMode):
    """How many tokens ask in each call of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.asking: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.asking.append(args[0].shape[2])
        return func(*args, **(kwargs or {}))


def test_in_the_last_layer_only_what_is_read_asks_others():
    lvlm = make("llava_onevision")
    said = [branch([*range(10, 30)], spoken=3), branch([*range(10, 25), *range(30, 36)])]
    packed = pack([said[1:]], [said[:1]], PackingConfig(max_row_tokens=40))
    made = []
    for unread in (0, 40):  # with as many more tokens read, all ask
        more = torch.cartesian_prod(torch.arange(1), torch.arange(min(unread, packed.subtree_end.shape[1])))
        lvlm.zero_grad()
        with Queries() as queries, restrict_last_layer(lvlm, packed.embedding_index, packed.logits_index, more):
            mask = attention_mask(packed.subtree_end, lvlm.config.get_text_config())
            hidden = lvlm.base_model(**packed.inputs, attention_mask=mask, use_cache=False).last_hidden_state
        places = torch.cat([packed.embedding_index, packed.logits_index])
        read = hidden[places[:, 0], places[:, 1]]
        read.square().sum().backward()
        made.append((read, torch.cat([part.grad.flatten() for part in lvlm.parameters() if part.grad is not None])))
        assert queries.asking[-1] == (len(places) if not unread else packed.subtree_end.shape[1])
        assert queries.asking[-2] == packed.subtree_end.shape[1]
    for some, every in zip(*made, strict=True):
        torch.testing.assert_close(some, every, **TIGHT)


def test_only_read_tokens_are_computed_and_the_layer_is_whole_afterwards():
    lvlm = make("llava_onevision")
    ids = torch.arange(10, 24).view(2, 7)
    weights = sum(parameter.numel() for part in tokenwise_modules(lvlm) for parameter in part.parameters())

    def flops(*places):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), restrict_last_layer(lvlm, *places):
            lvlm.base_model(input_ids=ids)
        return counter.get_total_flops()

    whole = flops(everywhere())
    assert whole - flops(PLACES) == 2 * weights * (14 - 3)
    assert whole - flops(PLACES[:0]) == 2 * weights * 14
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lvlm.base_model(input_ids=ids)
    assert counter.get_total_flops() == whole


def test_another_thread_reads_the_whole_layer_meanwhile():
    lvlm = make("llava_onevision").eval()
    whole = lvlm.base_model(input_ids=IDS).last_hidden_state
    with ThreadPoolExecutor(1) as other, restrict_last_layer(lvlm, PLACES):
        meanwhile = other.submit(lambda: lvlm.base_model(input_ids=IDS).last_hidden_state).result()
        some = lvlm.base_model(input_ids=IDS).last_hidden_state
    assert torch.equal(meanwhile, whole) and not torch.equal(some, whole)


@pytest.mark.filterwarnings("error::FutureWarning")  # of a name that is going
def test_layers_that_are_made_again_for_the_backward_pass_are_computed_whole():
    lvlm = make("llava_onevision")
    weight = torch.ones(len(PLACES), 1, dtype=torch.float64)
    plain = gradients(lvlm, weight, everywhere())
    enable_gradient_checkpointing(lvlm)
    for one, other in zip(gradients(lvlm, weight, PLACES), plain, strict=True):
        torch.testing.assert_close(one, other, **TIGHT)
