"""Forward passes over packs by a tiny random model of a real family."""

import pytest
import torch

from cafe.content import Content
from cafe.errors import CheckpointError
from cafe.lvlm.forward import UNBOUNDED_ROW, forward_packed, set_kernel
from cafe.model import Cafe
from cafe.packing import PackingConfig, pack
from cafe.scenes.draw import paint
from cafe.scenes.world import draw_scene


def test_flex_attention_gives_the_embeddings_of_sdpa(random_base):
    """All in one row, padded to a few lengths; without the compiler, which is not what is tested."""
    image = paint(draw_scene(0, "test", 0))
    embeddings = []
    for attention in ("sdpa", "flex_attention"):
        model = Cafe.load(random_base, dtype=torch.float64, attention=attention)
        assert model.lvlm.config.vision_config._attn_implementation == "sdpa"
        content = Content.of([image, "a red circle"])
        branches = [model.encode_embedding(content), model.encode_prompt(content)]
        packed = pack([branches, [model.encode_embedding(Content.of("a blue star"))]], [[], []], model.packing)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            embeddings.append(forward_packed(model.lvlm, packed)[0])
    assert packed.inputs["input_ids"].shape == (1, 512)
    torch.testing.assert_close(embeddings[0], embeddings[1], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("attention", "device", "dtype", "kernel", "row", "multiple"),
    [
        ("sdpa", "cpu", torch.float32, "blocks", UNBOUNDED_ROW, 1),
        ("sdpa", "cuda", torch.float32, "mask", None, 1),
        ("sdpa", "cuda", torch.bfloat16, "paths", UNBOUNDED_ROW, 1),
        ("sdpa", "cuda", torch.float16, "paths", UNBOUNDED_ROW, 1),
        ("flex_attention", "cuda", torch.bfloat16, "flex", UNBOUNDED_ROW, 512),
        ("eager", "cuda", torch.bfloat16, "mask", None, 128),
    ],
)
def test_rows_are_laid_out_and_padded_for_the_kernel_that_reads_them(
    random_base, monkeypatch, attention, device, dtype, kernel, row, multiple
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    lvlm = Cafe.load(random_base, device="cpu", attention=attention).lvlm
    packing = set_kernel(PackingConfig(pad_token_id=7), lvlm, torch.device(device), dtype)
    # A row of a dense mask is short, so that attention, which computes what is hidden, stays a small part.
    expected_row = row or 2 * lvlm.config.get_text_config().hidden_size
    assert (packing.kernel, packing.max_row_tokens, packing.pad_to_multiple_of) == (kernel, expected_row, multiple)
    assert packing.pad_token_id == 7  # all else is as it was


def test_a_token_without_an_embedding_is_named_before_the_model_fails(random_base):
    model = Cafe.load(random_base)
    num_embeddings = model.lvlm.get_input_embeddings().num_embeddings
    model.chat_processor.tokenizer.add_tokens([f"<extra{number}>" for number in range(num_embeddings)])
    for call in (
        lambda: model.embed(["a <extra9999999> word", f"<extra{num_embeddings - 1}>"]),
        lambda: model.generate(None, f"<extra{num_embeddings - 1}>", 2),
        lambda: model.score("a", f"<extra{num_embeddings - 1}>"),
    ):
        with pytest.raises(CheckpointError, match=f"makes token .*, and the model has {num_embeddings} embeddings"):
            call()
    assert model.embed(["a red circle"]).shape[0] == 1
