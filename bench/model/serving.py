"""How large a circuit of 0.1% is as a LoRA adapter, by arithmetic: the table of docs/serving.md.

python bench/model/serving.py
"""

from cna_kernels.model.checkpoint.lora import padded_ranks
from cna_kernels.select import k_from_fraction

# layers, hidden size, neurons of a layer
MODELS = {
    "Llama-3.2-1B": (16, 2048, 8192),
    "Llama-3.2-3B": (28, 3072, 8192),
    "Llama-3.1-8B": (32, 4096, 14336),
    "Llama-3.1-70B": (80, 8192, 28672),
    "Qwen2.5-1.5B": (28, 1536, 8960),
    "Qwen2.5-7B": (28, 3584, 18944),
    "Qwen2.5-72B": (80, 8192, 29568),
}
LATE = 0.9  # share of the circuit's neurons in the last quarter of the layers; the paper finds 90 and 95%
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM's --max-lora-rank takes
BYTES = 2  # bf16


def main():
    print("| model | neurons | adapter | largest rank | `--max-lora-rank` | adapter with a uniform rank |")
    print("|---|---|---|---|---|---|")
    for name, (n_layers, n_hidden, n_neurons) in MODELS.items():
        k = k_from_fraction(0.001, n_layers, n_neurons)
        rank = -(-int(LATE * k) // -(-n_layers // 4))
        of_vllm = next((size for size in RANKS if size >= rank), None)
        late = -(-n_layers // 4)
        early = -(-(k - int(LATE * k)) // (n_layers - late))  # neurons of each other layer
        padded = sum(padded_ranks(dict(enumerate([rank] * late + [early] * (n_layers - late)))).values())
        own, uniform = (ranks * (n_hidden + n_neurons) * BYTES / 1e6 for ranks in (padded, rank * n_layers))
        print(f"| {name} | {k:,} | {own:,.0f} MB | {rank} | {of_vllm or 'split'} | {uniform:,.0f} MB |")


if __name__ == "__main__":
    main()
