"""Tree attention: how it is computed, and everything that changes a transformers model from outside.

Attention is changed where transformers lets it be: `registration` registers an attention implementation, `cafe_tree`,
for the language model. A forward pass gives it the tree as an argument, which `tree.tree_attention` makes:

    registration  the attention implementation, which is SDPA where there is no tree
    tree          trees prepared for a kernel, and the context manager around a forward pass: it makes the arguments
                  that attention takes, and restricts the last layer
    chains        what the rows of trees consist of; pure lists
    masks         the mask of trees, dense and as a FlexAttention `BlockMask`: pure tensors
    paths         by variable-length FlashAttention with gathered keys, on a GPU
    blockwise     block by block, on a CPU
    flex          by FlexAttention
    last_layer    forward hooks on the last decoder layer, which compute attention queries and the MLP only for the
                  tokens that are read

`Cafe` enters `last_layer.restrict_last_layer` by itself for the prefill of an image, of which only the cache is read.

Outside this package, two things reach into a model: `lvlm.vision_cache` wraps the forward pass of a frozen vision tower
for the duration of a step, and `training.compile` replaces the forward pass of each layer by its compiled form.
"""
