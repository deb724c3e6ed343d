"""Pickle a model that has already been used."""

import copy

from transformers import PreTrainedModel

HOOKS_MODULE = "transformers.utils.output_capturing"
HOOKS_INSTALLED = "_output_capturing_hooks_installed"


def without_capturing_hooks(lvlm: PreTrainedModel) -> PreTrainedModel:
    """Return a copy that shares the weights but lacks the hooks by which transformers records hidden states.

    They are local functions, which cannot be pickled. The copy installs its own when it is used.
    """
    # What deepcopy finds in its memo it does not copy.
    weights = {id(tensor): tensor for tensor in (*lvlm.parameters(), *lvlm.buffers())}
    other = copy.deepcopy(lvlm, weights)
    for module in other.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", None) == HOOKS_MODULE:
                del module._forward_hooks[key]
        module.__dict__.pop(HOOKS_INSTALLED, None)
    return other
