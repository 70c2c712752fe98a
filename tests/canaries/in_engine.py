"""Bugs in the engine on transformers models."""

from canary import Canary

ENGINE = "cna_kernels/engine/"
PARITY = "tests/attach/test_attach_parity.py"
PASSES = "tests/attach/test_passes.py"

CANARIES: list[Canary] = [
    Canary(
        "a class's patched forward taken for its own",
        ENGINE + "dense.py",
        "        if not self.known:\n            return self.run_own",
        "        if False:\n            return self.run_own",
        PARITY,
        "patched and before",
    ),
    Canary(
        "a wrapped forward taken for what it wraps",
        ENGINE + "forwards.py",
        "    return isinstance(function, FunctionType) and any(",
        '    function = getattr(function, "__wrapped__", function)\n'
        "    return isinstance(function, FunctionType) and any(",
        PARITY,
        "functools",
    ),
    Canary(
        "hooks on all modules not looked for",
        ENGINE + "forwards.py",
        "        _HOOKS._global_forward_hooks\n        or ",
        "        ",
        PARITY,
        "hook and modules and not compiled and not pre and not backward",
    ),
    Canary(
        "layers that change places not noticed",
        ENGINE + "running.py",
        "            if layer is not before:",
        "            if layer not in self._layers:",
        PARITY,
        "change and places",
    ),
    Canary(
        "no check while a compiler traces",
        ENGINE + "running.py",
        "            if compiling or not mlp.is_in_place():",
        "            if not compiling and not mlp.is_in_place():",
        PARITY,
        "compiled and patched",
    ),
    Canary(
        "layers run again with the rows of now",
        ENGINE + "passes.py",
        "            state = State(state.tokens.clone(), None, state.in_modules, scales)",
        "            state = State(self.rows.circuit[:1].expand(len(state.tokens)), None, state.in_modules, scales)",
        PASSES,
        "test_layers_that_run_again_belong_to_their_own_pass and other_rows",
    ),
    Canary(
        "layers run again with the table of now",
        ENGINE + "mlps.py",
        '"scale": self.scale if scales is None else scales[self.layer],',
        '"scale": self.scale,',
        PASSES,
        "test_layers_that_run_again_belong_to_their_own_pass and another_multiplier",
    ),
    Canary(
        "layers that did not run counted as 0",
        ENGINE + "finding.py",
        "            passes.check_all_ran()\n",
        "",
        PASSES,
        "test_layers_that_did_not_run_are_an_error",
    ),
    Canary(
        "rows of the last pass outside of passes",
        ENGINE + "passes.py",
        "        state, (self.state, first) = self.state, begun",
        "        state, (_, first) = self.state, begun",
        PASSES,
        "test_an_mlp_outside_its_model",
    ),
    Canary(
        "no gradient through torch.vmap",
        "cna_kernels/ops.py",
        "        taken_apart = _is_taken_apart(inputs, extras)",
        "        taken_apart = False",
        "tests/ops/test_transforms.py",
        "test_vmap_is_one_call_after_the_other and gated_mlp",
    ),
    Canary(
        "coordinates of tensors kept as they are",
        "cna_kernels/circuit.py",
        "            neurons.append((layer, index, contrast))",
        "            neurons.append(neuron)",
        "tests/ops/test_circuit.py",
        "test_neurons_are_plain_numbers",
    ),
    Canary(
        "a generate within generate taken for drafts",
        ENGINE + "prompt.py",
        'if prompt.n_tokens is not None and getattr(kwargs.get("generation_config"), "is_assistant", False):',
        "if prompt.n_tokens is not None:",
        "tests/attach/test_prompt.py",
        "test_a_generate_within_generate",
    ),
    Canary(
        "layers run again when their pass is gone",
        ENGINE + "mlps.py",
        "        self.now.check_not_run_again()\n",
        "",
        PASSES,
        "test_layers_whose_pass_is_gone",
    ),
    Canary(
        "numbers named by rows of other shapes",
        ENGINE + "rows.py",
        "                    buffer.fill_(-1)",
        "                    buffer.fill_(buffer[0, 0])",
        "tests/attach/test_rows.py",
        "test_numbers_that_no_row_names_any_more_are_free",
    ),
]
