"""PEFT on adapters that `cna export` writes, on the small real model. `test_lora.py` of the checkpoints has more."""

import pytest
import torch
from rows import record
from vllm_cases import Work

PLACES = (0, 1, 3)


@pytest.mark.parametrize("m", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("form", ["default", "--uniform-rank"])
def test_logits(work, tmp_path, form, m):
    from peft import AutoPeftModelForCausalLM

    from cna_kernels import Circuit
    from cna_kernels.model import load
    from cna_kernels.model.cli import main

    file = str(work / "circuits" / "c0.json")
    words = ["export", str(work / "model"), "-c", file, f"-m={m}", "--to", "lora", "-o", str(tmp_path / "adapter")]
    assert not main([*words, *([] if form == "default" else [form])])
    model, circuit, prompts = load(work / "model", dtype="float32"), Circuit.load(file), Work(work).prompts
    adapted = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"), dtype=torch.float32)
    worst, away, equal, n = 0.0, 0.0, 0, 0
    for place in PLACES:
        ids = torch.tensor([prompts[place]])
        with torch.inference_mode():
            plain, got = model(ids), adapted(ids).logits
            with model.steered(circuit, m):
                wanted = model(ids)
        worst = max(worst, (got - wanted).abs().max().item())
        away = max(away, (plain - wanted).abs().max().item())
        equal, n = equal + (got.argmax(-1) == wanted.argmax(-1)).sum().item(), n + ids.shape[1]
    assert worst < 2e-3 < 0.01 * away and equal == n, (worst, away, equal, n)
    megabytes = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size / 1e6
    record(
        "PEFT",
        {"case": f"LoRA, {form.removeprefix('--').replace('-', ' ')} form, m = {m:g}", "tokens": equal,
         "of_tokens": n, "max_logit_difference": worst, "also": f"{megabytes:.2f} MB; unsteered {away:.1f} away"},
    )  # fmt: skip
