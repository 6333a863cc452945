"""Why a test that passes with DynamicCache need not pass with HardKVCache: by patterns of its name and its error."""

UNEXPLAINED = "not explained yet"
REASONS = {
    "Unsupported input type <class 'hardkv": "`torch.export` takes a DynamicCache as an argument because transformers "
    "registers it as a container of tensors; a HardKVCache's tiers change their shapes and are not registered",
    "shape for layer_attention in iter_attentions": "the test reads attention weights of later forwards; a HardKVCache "
    "gives those of the first forward only, and Mllama's cross-attention to pictures gives its own",
    "type\\(layer\\), expected_layer_class": "the test asserts the class of the cache's layers",
}
# What in a family's code meets a refusal; hardkv's own words say what it did.
REFUSALS = {
    "minimax_m3_vl": "its sparse-attention layers compute with the one mask that the model makes for all layers",
    "paligemma": "a prompt attends in both directions, and its text model makes a mask from the mask that it gets",
    "whisper": "its own generate() splits the keys and values of the returned cache into sequences",
}
# Only where tokens are evicted.
EVICTED = {
    "not similar enough|Tensor-likes are not close": "the test asserts equality of two runs, one of which evicts at "
    "other steps or not at all",
}
