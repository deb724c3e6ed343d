"""Tree attention: how it is computed, and everything that changes a transformers model from outside.

A forward pass enters all of it in one place, `tree.tree_attention`, and leaves the model as it was:

    tree          the context manager around the forward pass: it makes the attention mask in the form that the model's
                  attention implementation takes, and restricts the last layer
    masks         the mask of trees, dense and as a FlexAttention `BlockMask`: pure tensors
    blockwise     the mask for long rows on a CPU, under which SDPA computes only the blocks that are not masked
    sdpa_override a Tensor subclass: a mask that replaces `scaled_dot_product_attention` where it is passed to it; used
                  by `blockwise` and `last_layer`
    last_layer    forward hooks on the last decoder layer, which compute attention queries and the MLP only for the
                  tokens that are read

`Cafe` enters `last_layer.restrict_last_layer` by itself for the prefill of an image, of which only the cache is read.

Outside this package, two things reach into a model: `lvlm.vision_cache` wraps the forward pass of a frozen vision tower
for the duration of a step, and `training.compile` replaces the forward pass of each layer by its compiled form.
"""
