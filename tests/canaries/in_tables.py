"""Bugs in steering tables, rows, sums and ops."""

from canary import Canary

COLLECTING, PROMPT, ROWS = "tests/attach/test_collecting.py", "tests/attach/test_prompt.py", "tests/attach/test_rows.py"
STEERING = "tests/ops/test_steering.py"

CANARIES: list[Canary] = [
    Canary(
        "last token by the mask's values",
        "cna_kernels/engine/collecting.py",
        "last = torch.where(shown, place, -1).amax(1).expand(shape[0])",
        "last = (attention_mask[:, -shape[1] :].to(device) * place).argmax(1)",
        COLLECTING,
        "test_the_last_token and segments",
    ),
    Canary(
        "mask's last columns",
        "cna_kernels/engine/collecting.py",
        "device=mask.device) + first",
        "device=mask.device) + mask.shape[-1] - n_tokens",
        COLLECTING,
        "test_the_last_token and longer",
    ),
    Canary(
        "empty row counts another's token",
        "cna_kernels/engine/collecting.py",
        "self.found = last >= 0",
        "last = last.clamp(min=0)",
        COLLECTING,
        "test_a_row_without_a_token_may_have_no_weight",
    ),
    Canary(
        "prompt ends with the first chunk",
        "cna_kernels/engine/prompt.py",
        "self.end = end\n",
        "self.end = end = seen + n_tokens\n",
        PROMPT,
        "test_phases_are_those_of_positions and chunks",
    ),
    Canary(
        "first chunk collected",
        "cna_kernels/engine/prompt.py",
        "int(seen_by(past)) + n_tokens < self.end",
        "False",
        PROMPT,
        "test_collect_counts_the_last_token_of_the_prompt and chunks",
    ),
    Canary(
        "negative positions",
        "cna_kernels/engine/rows.py",
        "if (bound < 0).any():",
        "if (bound < -(2**62)).any():",
        ROWS,
        "test_refused",
    ),
    Canary(
        "bools are numbers",
        "cna_kernels/engine/rows.py",
        "WHOLE = (torch.int64,",
        "WHOLE = (torch.bool, torch.int64,",
        ROWS,
        "test_refused",
    ),
    Canary(
        "layers of the first circuits alone",
        "cna_kernels/steering.py",
        "return Scale(offsets, *self._arena[self._devices[layer]])",
        "return Scale(offsets, *self._arena[self._devices[layer]]) if offsets.any() else None",
        STEERING,
        "test_a_table_of_given_circuits_changes_too",
    ),
    Canary(
        "number given again",
        "cna_kernels/steering.py",
        "yield from (n for n in self._freed if n not in named)",
        "yield from self._freed",
        STEERING,
        "test_a_number_is_not_given_again_while_rows_name_it",
    ),
    Canary(
        "copies share a number",
        "cna_kernels/steering.py",
        "table._used, table._freed = used, dict.fromkeys(freed)",
        "table._used = used",
        STEERING,
        "test_copies_are_equal_and_independent",
    ),
    Canary(
        "lock of another process",
        "cna_kernels/steering.py",
        "        self.lock = threading.RLock()\n        if self._writing",
        "        if self._writing",
        STEERING,
        "test_a_child_does_not_wait",
    ),
    Canary(
        "half a change in a child",
        "cna_kernels/steering.py",
        "if self._writing and all(",
        "if not self._writing and all(",
        STEERING,
        "test_a_child_sees_a_change_whole",
    ),
]
