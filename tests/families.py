"""A tiny checkpoint of every family, for tests of all commands; what hooks and scaled weights give on it."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from attach_cases import hooked, make, with_scaled_columns
from tiny import TEXT_VOCABULARY, write_text_files

SIZES = dict(vocab_size=TEXT_VOCABULARY, max_position_embeddings=512, hidden_size=64, intermediate_size=96)
# name -> which engine runs it
FAMILIES = {
    "llama": "own", "qwen2": "own", "qwen3": "own", "mistral": "own", "gguf": "own", "gemma3": "transformers",
    "phi3": "transformers", "qwen3-moe": "transformers", "qwen3-moe-mixed": "transformers", "mixtral": "transformers",
    "int8": "transformers",
}  # fmt: skip


def write_family(name, directory):
    """Write a checkpoint, ready for every command. Return its path and a transformers model with the same weights."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if name == "gguf":
        pytest.importorskip("gguf")
        from gguf_files import add_bytes, as_transformers_reads, write_gguf

        path = write_gguf(directory / "model.gguf", make("llama", **SIZES | {"vocab_size": 257}), tokenizer=add_bytes)
        return path, as_transformers_reads(path)
    if name == "int8":
        pytest.importorskip("bitsandbytes")
        make("llama", **SIZES).save_pretrained(directory / "whole")
        # with outliers, which LLM.int8 multiplies apart for the whole batch, an answer would depend on the others
        how = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory / "whole", quantization_config=how, device_map={"": "cpu"}, dtype=torch.float16
        )
        directory = directory / "int8"
    else:
        model = make(name, seed=5 if name == "gemma3" else 3, **SIZES)
    model.save_pretrained(directory)
    write_text_files(directory)
    return directory, model


@contextmanager
def watched(model, seen):
    """Call ``seen(layer, act [S, N])`` with the input of every layer's down_proj in the passes inside, by hooks; of
    experts act is 0 where a token is not sent to one."""
    handles = []
    for number, layer in enumerate(model.get_decoder().layers):
        mlp = layer.mlp if hasattr(layer, "mlp") else layer.feed_forward
        if hasattr(mlp, "experts"):

            def experts(module, args, number=number):
                x, chosen = args[0].flatten(0, -2), args[1]
                act = x.new_zeros(len(x), *module.down_proj.shape[::2])  # [S, E, N]
                for token, of_token in enumerate(chosen.tolist()):
                    for expert in of_token:
                        gate, up = F.linear(x[token], module.gate_up_proj[expert]).chunk(2)
                        act[token, expert] = module.act_fn(gate) * up
                seen(number, act.flatten(1))

            handles.append(mlp.experts.register_forward_pre_hook(experts))
        else:

            def dense(_, args, number=number):
                seen(number, args[0].flatten(0, -2))

            handles.append(mlp.down_proj.register_forward_pre_hook(dense))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def contrast_by_hooks(model, positive, negative):
    """The contrast ``[L, N]`` fp64 of prompts, each a list of token ids, one prompt at a time."""
    sums = {}
    for sign, prompts in ((1, positive), (-1, negative)):
        for ids in prompts:

            def seen(layer, act, sign=sign, n=len(prompts)):  # noqa: B008
                sums[layer] = sums.get(layer, 0) + sign * act[-1].double() / n

            with watched(model, seen), torch.inference_mode():
                model(torch.tensor([ids]))
    widest = max(len(total) for total in sums.values())
    return torch.stack([F.pad(sums[layer], (0, widest - len(sums[layer]))) for layer in sorted(sums)])


def greedy(model, ids, stop_ids, n):
    """The ids of a greedy answer, without a cache."""
    answer = []
    for _ in range(n):
        with torch.inference_mode():
            token = int(model(torch.tensor([[*ids, *answer]])).logits[0, -1].argmax())
        if token in stop_ids:
            break
        answer.append(token)
    return answer


def steered_by(name, model, circuit, multiplier, run):
    """What ``run`` gives on a copy of the model whose down_proj columns are multiplied. The columns of an int8 weight
    have no scales of their own: there hooks multiply the neurons."""
    steer = hooked if name == "int8" else with_scaled_columns
    return steer(model, circuit, multiplier, run)
