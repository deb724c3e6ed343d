"""What a step is planned to read, against the lengths of its branches."""

from pathlib import Path

import pytest

from cafe.lvlm.architectures import load_config, meta_model
from cafe.packing import PackWork
from cafe.planning.workload import TypicalSample, estimate_workload, image_cost_from_config
from cafe.training.recipe_io import read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_planned_pairs_are_those_of_each_token_with_its_ancestors(attention):
    """Written out for one pair per micro-batch; FlashAttention reads each branch by itself."""
    recipe = read_recipe(RECIPES / "cafe-0.5b.yaml", ["batch_size=4", "micro_batch.tokens=1"])
    lvlm, data = meta_model(load_config(recipe.model.base)), TypicalSample()
    lvlm.config.get_text_config()._attn_implementation = attention
    shares = attention == "sdpa"
    image = image_cost_from_config(lvlm, data).tokens
    shown = data.prompt + image  # the prefix of query and dialogue; all three begin with the prompt
    query, target = shown + data.prompt_overhead_tokens, data.prompt + data.caption + data.prompt_overhead_tokens
    dialogue = query + data.caption

    def causal(length: int) -> int:
        return length * (length + 1) // 2

    text = PackWork(
        tokens=query + target + dialogue - shares * (shown + data.prompt),
        seen=causal(query) + causal(target) + causal(dialogue) - shares * (causal(shown) + causal(data.prompt)),
        read=2 + data.caption,
        # The caption is predicted by the tokens before each of its own.
        read_seen=query + target + sum(range(query, dialogue)),
    )
    embedded = PackWork(
        tokens=query + target - shares * data.prompt,
        seen=causal(query) + causal(target) - shares * causal(data.prompt),
        read=2,
        read_seen=query + target,
    )
    load = estimate_workload(recipe, lvlm, data, 1)
    assert load.micro_batches == 4 and load.text == text * 4 and load.reread_text == embedded * 3
