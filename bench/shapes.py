"""The models whose MLP shapes the benches use: name -> (hidden_size H, intermediate_size N)."""

MODELS = {
    "Llama-3.2-1B": (2048, 8192),
    "Llama-3.1-8B": (4096, 14336),
    "Qwen2.5-7B": (3584, 18944),
    "Llama-3.1-70B": (8192, 28672),
    "Qwen2.5-72B": (8192, 29568),
}
