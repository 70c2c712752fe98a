"""Bugs in what serves circuits elsewhere: the vLLM plug-in, exports."""

from canary import Canary

WORKER, REQUESTS, SLOTS = (f"tests/vllm_plugin/test_{name}.py" for name in ("worker", "asked", "slots"))
LORA, STEERED = "tests/model/checkpoint/test_lora.py", "tests/model/checkpoint/test_steered_gguf.py"

CANARIES = [
    Canary(
        "a salt without the content",
        "cna_kernels/vllm/requests.py",
        'f"cna {self.setting.digest}{phase} {salt!r}"',
        'f"cna {self.names}{phase} {salt!r}"',
        REQUESTS,
        "test_the_salt_is_of_the_content",
    ),
    Canary(
        "a phase that goes by no prompt's length",
        "cna_kernels/vllm/requests.py",
        'f" {self.phase} {n_prompt}"',
        'f" {self.phase}"',
        REQUESTS,
        "test_the_salt_is_of_the_content",
    ),
    Canary(
        "the last token of a prompt is an answer's",
        "cna_kernels/vllm/worker.py",
        "min(max(step.n_prompt - step.first, 0), step.n_tokens)",
        "min(max(step.n_prompt - 1 - step.first, 0), step.n_tokens)",
        WORKER,
        "test_a_phase_ends_or_begins_with_the_prompt",
    ),
    Canary(
        "a layer's number is a constant of its graph",
        "cna_kernels/vllm/act.py",
        "vllm_swiglu(x, self.number)",
        "vllm_swiglu(x, torch.tensor(self.layer))",
        WORKER,
        "test_equal_layers_are_one_graph",
    ),
    Canary(
        "sums that swiglu leaves out",
        "cna_kernels/vllm/act.py",
        '_Current.state.run("swiglu", (gate, up), layer)',
        "ops.swiglu(gate, up)",
        WORKER,
        "test_the_last_prompt_token_counts_once",
    ),
    Canary(
        "rows of the last step stay steered behind this one's",
        "cna_kernels/vllm/worker.py",
        "        self.state.row_circuit[n_rows : self._written].fill_(-1)  # padding rows are unsteered\n",
        "",
        WORKER,
        "test_every_row_has_its_own_circuit",
    ),
    Canary(
        "a prompt that runs again counts again",
        "cna_kernels/vllm/worker.py",
        " and step.request_id not in self._counted:",
        ":",
        WORKER,
        "test_the_last_prompt_token_counts_once",
    ),
    Canary(
        "a setting in use makes room",
        "cna_kernels/vllm/slots.py",
        "next((each for each in self._numbers if each not in in_use), None)",
        "next(iter(self._numbers), None)",
        SLOTS,
        "test_the_oldest_goes_and_those_in_use_stay",
    ),
    Canary(
        "the neurons of another rank",
        "cna_kernels/vllm/setting.py",
        "(self.index[inside] - low).tolist()",
        "self.index[inside].tolist()",
        SLOTS,
        "test_a_worker_has_its_shard",
    ),
    Canary(
        "an alpha that llama.cpp does not read",
        "model/checkpoint/lora.py",
        "a[range(len(pairs)), neurons] = rank / largest",
        "a[range(len(pairs)), neurons] = 1",
        LORA,
        "test_every_engine_reads_it_right",
    ),
    Canary(
        "any rank for a layer",
        "model/checkpoint/lora.py",
        "    while rank % 2 == 0 and rank // 2 >= needed:",
        "    while rank // 2 >= needed:",
        LORA,
        "test_ranks_are_the_largest_over_a_power_of_two",
    ),
    Canary(
        "minima of blocks not scaled",
        "model/checkpoint/steered_gguf.py",
        '"Q4_K": (0, 2)',
        '"Q4_K": (0,)',
        STEERED,
        "test_our_model_on_the_file_is_the_steered_model",
    ),
    Canary(
        "the row beside",
        "model/checkpoint/steered_gguf.py",
        "return entry.start + neuron * size,",
        "return entry.start + (neuron + 1) % n_neurons * size,",
        STEERED,
        "test_only_the_rows_of_the_circuit_change",
    ),
]
