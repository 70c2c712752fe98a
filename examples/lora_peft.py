"""A circuit as a LoRA adapter: exported, loaded by PEFT, and compared with the steered model.

    python examples/lora_peft.py [MODEL]

MODEL is a directory in Hugging Face layout; default the bundled model, for which the prompts here are made.
Engines that serve many LoRA adapters in one batch serve such an adapter, too: docs/serving.md.
"""

import sys
import tempfile

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cna_kernels.model import demo_checkpoint, load
from cna_kernels.model.checkpoint.export import neuron_multipliers
from cna_kernels.model.checkpoint.lora import to_lora
from cna_kernels.model.demo import world

directory = sys.argv[1] if len(sys.argv) > 1 else demo_checkpoint("instruct")
ours = load(directory, device="cpu", dtype="float32")
circuit = ours.discover(world.discovery_positive(), world.discovery_negative(), score="magnitude")
ids = torch.tensor([[1, 20, 30, 40, 50]])

for multiplier in (0.0, 0.5, 2.0):
    with tempfile.TemporaryDirectory() as out:
        multipliers = neuron_multipliers([circuit], [multiplier])
        to_lora(ours.checkpoint, ours.config, multipliers, f"{out}/adapter", base_model=str(directory))
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        adapted = PeftModel.from_pretrained(theirs, f"{out}/adapter").eval()
        with torch.inference_mode(), ours.steered(circuit, multiplier):
            steered, lora = ours(ids), adapted(ids).logits
            plain = adapted.unload()(ids).logits
    difference, effect = (lora - steered).abs().max().item(), (plain - steered).abs().max().item()
    print(f"m = {multiplier:g}: largest difference of the logits {difference:.1e}, effect of steering {effect:.1e}")
