"""Pickle a model that has already been used, and use it in another process."""

import copy

from transformers import PreTrainedModel

from cafe.lvlm.architectures import meta_model

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


def register_recorded_outputs(lvlm: PreTrainedModel) -> None:
    """Let transformers know which hidden states the classes of an unpickled model can record.

    Their constructors register that, and pickle calls none: vision towers would return no hidden states.
    """
    meta_model(copy.deepcopy(lvlm.config))
