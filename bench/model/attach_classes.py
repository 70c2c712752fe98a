"""Which of transformers' causal language models ``attach`` takes, and whether it steers them as their definition says.

    python bench/model/attach_classes.py

Every class is made tiny, with random weights. A class counts where a steered pass gives what a copy of the model gives
whose columns of ``down_proj`` are scaled: within 1e-5 of the largest logit, and 100 times less than what steering
changes. Exit code 1 if a class that was taken does not.
"""

import copy
import random
import signal
import sys
import warnings

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cna_kernels import Circuit, InputError, attach

SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, lru_width=32,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    first_k_dense_replace=1, num_dense_layers=1, moe_layer_start_index=1,  # a layer with experts is among the two
)  # fmt: skip
# A config class refuses what does not fit together, each in its own way: the first of these that runs is taken.
ATTEMPTS = (
    dict(head_dim=8, num_key_value_heads=2, layer_types=None),
    dict(head_dim=8, num_key_value_heads=2, layer_types=["linear_attention", "full_attention"]),
    dict(head_dim=8, num_key_value_heads=2, layer_types=["full_attention"] * 2),
    dict(
        head_dim=8, num_key_value_heads=4, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, q_lora_rank=8,
        kv_lora_rank=8,
    ),
    dict(head_dim=8, num_key_value_heads=4),
    dict(),
)  # fmt: skip


def tiny(model_type: str, kind: type) -> torch.nn.Module | str:
    """A small model of a class that runs, or why there is none."""
    reason = ""
    for attempt in ATTEMPTS:
        signal.alarm(60)
        try:
            config_kind = type(CONFIG_MAPPING[model_type]().get_text_config())
            known = {name: value for name, value in (SMALL | attempt).items() if hasattr(config_kind(), name)}
            torch.manual_seed(0)
            model = kind(config_kind(**known)).eval()
            if sum(weight.numel() for weight in model.parameters()) < 50_000_000:
                logits(model)
                return model
            reason = "too large"
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            signal.alarm(0)
    return reason


@torch.no_grad()
def logits(model):
    return model(torch.arange(3, 17).reshape(2, 7)).logits


def with_scaled_columns(model, circuit, multiplier):
    """The logits of a copy of the model in which the circuit's columns of ``down_proj`` are multiplied."""
    edited = copy.deepcopy(model)
    for layer, members in circuit.by_layer().items():
        block = edited.get_decoder().layers[layer]
        weight = next(w for name, w in block.named_parameters() if name.endswith(("down_proj", "down_proj.weight")))
        for index in members:
            columns = weight[index // weight.shape[2]] if weight.dim() == 3 else weight
            columns.data[:, index % columns.shape[1]] *= multiplier
    return logits(edited)


def outcome_of(model) -> tuple[str, str]:
    """What became of a model, and more about it."""
    plain, rng = logits(model), random.Random(0)
    try:
        engine = attach(model)
    except InputError as error:
        return "refused", str(error)
    places = [(layer, index) for layer in range(engine.n_layers) for index in range(engine.widths[layer])]
    neurons = tuple((*place, 1.0) for place in rng.sample(places, len(places) // 4))
    circuit = Circuit(neurons, engine.n_layers, engine.n_neurons)
    with engine.steer([circuit], [-2.0], 0):
        got = logits(model)
    fused = not engine.not_fused()
    engine.detach()
    expected = with_scaled_columns(model, circuit, -2.0)
    error, effect = (got - expected).abs().max(), (expected - plain).abs().max()
    if error > 1e-5 * plain.abs().max() or effect < 100 * error:
        return "WRONG", f"off by {error:.1e}, steering changes {effect:.1e}"
    return ("fused" if fused else "exact, in PyTorch"), ""


def main() -> int:
    def late(*_):
        raise TimeoutError("60 s")

    signal.signal(signal.SIGALRM, late)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found: dict[str, dict[str, str]] = {}
    for model_type, name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        if not isinstance(kind := getattr(transformers, name, None), type):
            continue
        model = tiny(model_type, kind)
        outcome, more = ("not made", model) if isinstance(model, str) else outcome_of(model)
        found.setdefault(outcome, {})[name] = more
    for outcome, names in sorted(found.items()):
        print(f"{outcome}: {len(names)}")
        for name, more in names.items():
            print(f"    {name:40} {more[:150]}")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    return 1 if "WRONG" in found else 0


if __name__ == "__main__":
    sys.exit(main())
