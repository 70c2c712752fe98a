"""Bugs in GGUF files, behaviours and their matrix."""

from canary import Canary

GGUF, TOKENS = "tests/model/checkpoint/test_gguf_model.py", "tests/model/text/test_gguf_tokenizer.py"
MEASURES, MATRIX = "tests/model/evaluation/test_measures.py", "tests/model/evaluation/test_matrix.py"
REPRODUCE = "tests/model/evaluation/test_reproduce.py"

CANARIES: list[Canary] = [
    Canary(
        "rows of keys in the order of queries",
        "model/checkpoint/gguf_model.py",
        '{"q_proj": n_heads, "k_proj": n_kv_heads}',
        '{"q_proj": n_heads, "k_proj": n_heads}',
        GGUF,
        "test_every_family_has_the_logits_of_its_other_layout and llama",
    ),
    Canary(
        "biases stay in pairs",
        "model/checkpoint/gguf_file.py",
        "return values if self.order is None else values[list(self.order)]",
        "return values if self.order is None or values.dim() == 1 else values[list(self.order)]",
        GGUF,
        "test_every_family_has_the_logits_of_its_other_layout and bias",
    ),
    Canary(
        "frequencies multiplied",
        "model/rope.py",
        "1.0 / (torch.tensor(rope.short_factor, dtype=torch.float32, device=\"cpu\") * rope.theta**exponent)",
        "torch.tensor(rope.short_factor, dtype=torch.float32, device=\"cpu\") / rope.theta**exponent",
        GGUF,
        "test_every_family_has_the_logits_of_its_other_layout and llama3",
    ),
    Canary(
        "marks of rows as they lie in the file",
        "model/checkpoint/gguf_file.py",
        "yield content, self._values(content) if values is None else values",
        "yield content, self._values(content)",
        GGUF,
        "test_logits_of_each_block_type and Q8_0",
    ),
    Canary(
        "digits in runs",
        "model/text/gguf_tokenizer.py",
        '(r"\\p{N}", _GPT2)',
        "(_GPT2,)",
        TOKENS,
        "test_ids_are_those_of_the_tokenizer_that_was_written and smollm",
    ),
    Canary(
        "only the EOS ends an answer",
        "model/text/gguf_tokenizer.py",
        "if kinds[number] == _CONTROL",
        "if kinds[number] == _UNUSED",
        TOKENS,
        "test_stop_ids",
    ),
    Canary(
        "phrases within words",
        "model/evaluation/measures.py",
        r'rf"(?<!\w){wanted}(?!\w)"',
        "wanted",
        MEASURES,
        "test_of_texts",
    ),
    Canary(
        "any JSON value",
        "model/evaluation/measures.py",
        "if isinstance(value, (dict, list)) and value:",
        "if value is not None:",
        MEASURES,
        "test_json",
    ),
    Canary(
        "one-sided test",
        "model/evaluation/metrics.py",
        "min(1.0, 2 * tail / 2**n)",
        "min(1.0, tail / 2**n)",
        MATRIX,
        "test_mcnemar_is_the_binomial_test",
    ),
    Canary(
        "controls at another multiplier",
        "model/evaluation/matrix.py",
        "variants.append(Variant(control, multipliers[0]))",
        "variants.append(Variant(control, multipliers[-1]))",
        MATRIX,
        "test_controls_get_the_first_multiplier",
    ),
    Canary(
        "base and instruct on different texts",
        "model/evaluation/reproduce.py",
        'wanted.append(("model", model, False))',
        'wanted.append(("model", model, True))',
        REPRODUCE,
        "test_a_base_model_without_a_template_is_compared_on_plain_text",
    ),
    Canary(
        "a row tested against itself",
        "model/evaluation/reproduce.py",
        'mcnemar(hits["unsteered", 1.0], hits',
        'mcnemar(hits[method, row["multiplier"]], hits',
        REPRODUCE,
        "test_figures_are_those_of_each_prompt",
    ),
    Canary(
        "the paper's values beside a model of another shape",
        "model/evaluation/published.py",
        "if (found.n_layers, found.n_neurons) != (n_layers, n_neurons):",
        "if found.n_layers > n_layers + 100:",
        "tests/model/evaluation/test_published.py",
        "test_another_shape_is_another_model",
    ),
    Canary(
        "both halves",
        "cna_kernels/circuit.py",
        'neuron[2] > 0 if sign == "positive" else neuron[2] < 0',
        "neuron[2] != 0",
        "tests/ops/test_circuit.py",
        "test_halves_by_sign",
    ),
]  # fmt: skip
