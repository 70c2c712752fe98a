"""docs/architecture.md against the repository: every file has its line, imports go one way, files stay short."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from cna_kernels import Circuit
from cna_kernels.model.discovery.run_directory import RunDirectory
from cna_kernels.model.prompts.corpus import Corpus, Names

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
NOT_LISTED = re.compile(r"/\.|__init__\.py$|/data/|/checkpoints/|^bench/results/|py\.typed$")
LONGEST = 400  # lines of a file of the package


def tracked():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for path in done.stdout.split() if (ROOT / path).exists()]


def listed():
    """The files that the page names, with their folders: "### model/text/" and the first cells of the table below."""
    for section in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        folder, _, table = section.partition("\n")
        for cell in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE):
            yield from (folder.strip() + name for name in re.findall(r"`([^`]+)`", cell))


def test_every_file_has_its_line():
    folders = ("cna_kernels/", "csrc/", "model/", "bench/")
    here = sorted(path for path in tracked() if path.startswith(folders) and not NOT_LISTED.search(path))
    assert sorted(listed()) == here


def module_of(path):
    name = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    return "cna_kernels." + name if path.startswith("model") else name


def imports_of(path, modules):
    """The modules of the package that a file imports, anywhere in the file, except imports for type checkers alone."""
    own, tree = module_of(path), ast.parse((ROOT / path).read_text())
    guarded = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    skipped = {id(inner) for node in guarded for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = own if path.endswith("__init__.py") else own.rpartition(".")[0]
            for _ in range(node.level - 1):
                base = base.rpartition(".")[0]
            base = ".".join(filter(None, [base if node.level else "", node.module]))
            for alias in node.names:
                name = f"{base}.{alias.name}"
                if name in modules or base in modules:
                    yield name if name in modules else base


def graph():
    paths = [path for path in tracked() if path.startswith(("cna_kernels/", "model/")) and path.endswith(".py")]
    modules = {module_of(path) for path in paths}
    return {module_of(path): {*imports_of(path, modules)} - {module_of(path)} for path in paths}


def test_imports_go_one_way():
    imports = graph()
    assert len(imports) > 80 and "cna_kernels.errors" in imports["cna_kernels.model.checkpoint.load"]
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")
    for name, used in imports.items():
        if not name.startswith("cna_kernels.model"):
            assert not [other for other in used if other.startswith("cna_kernels.model")], name


HEAVY = {"torch", "triton", "numpy", "safetensors", "tokenizers", "transformers", "jinja2", "matplotlib"}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import cna_kernels", HEAVY | {"rich"}),
        ("from cna_kernels.model.cli import main; main(['show', sys.argv[1]])", HEAVY),
        ("from cna_kernels.model.cli import main; assert main(['status', sys.argv[2]]) == 0", HEAVY),
        ("from cna_kernels.model.cli.parser import build_parser; build_parser().format_help()", HEAVY | {"rich"}),
    ],
    ids=["import cna_kernels", "cna show", "cna status", "cna --help"],
)
def test_what_needs_no_tensors_is_light(code, absent, tmp_path):
    Circuit(((0, 3, 1.0),), 2, 8).save(tmp_path / "circuit.json")
    code = f"import sys\n{code}\nprint('loaded:', *{{name.partition('.')[0] for name in sys.modules}})"
    with open(tmp_path / "prompts", "w+b") as file:
        RunDirectory.start(tmp_path, {"model": {"name": "m"}}, Corpus(file, [], Names()))
    command = [sys.executable, "-c", code, str(tmp_path / "circuit.json"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {*done.stdout.rpartition("loaded:")[2].split()}
    assert "cna_kernels" in loaded and not absent & loaded


# Where the tests of a folder lie, if not in tests/ under the folder's name.
TEST_FOLDERS = {"cna_kernels": ("ops", "attach"), "cna_kernels/triton": ("kernels",), "cna_kernels/cpu": ("csrc",)}
TEST_FOLDERS |= {"cna_kernels/engine": ("attach",), "cna_kernels/vllm": ("vllm_plugin",)}
# Files without a test file of their own name, by the test file that tests them together.
TESTED_TOGETHER = {
    "ops/test_ops.py": "cna_kernels/: backends errors extras library op_checks reference scale serve",
    "attach/test_engine.py": "cna_kernels/engine/: attach decoder dense experts find finding identity mlps patch",
    "ops/test_steering.py": "cna_kernels/: entries",
    "vllm_plugin/test_asked.py": "cna_kernels/vllm/: options requests",
    "vllm_plugin/test_served_model.py": "cna_kernels/vllm/: identity",
    "vllm_plugin/test_slots.py": "cna_kernels/vllm/: setting",
    "vllm_plugin/test_worker.py": "cna_kernels/vllm/: act client",
    "engines/test_vllm.py": "cna_kernels/vllm/: endpoint plugin",
    "attach/test_passes.py": "cna_kernels/engine/: running",
    "attach/test_batching.py": "cna_kernels/engine/: managers",
    "ops/test_circuit.py": "cna_kernels/: circuit_file",
    "ops/test_circuit_sets.py": "cna_kernels/: circuit_frame",
    "kernels/test_triton_plan.py": "cna_kernels/: plans; cna_kernels/triton/: cost plan",
    "kernels/test_triton.py": (
        "cna_kernels/triton/: down_decode down_proj gate_up_decode launch ops steer sums sums_fp64 swiglu tiles"
    ),
    "csrc/test_cpu.py": "cna_kernels/cpu/: library ops plan",
    "csrc/test_blocks.py": "cna_kernels/: blocks; cna_kernels/cpu/: typed",
    "csrc/test_csrc.py": "cna_kernels/cpu/: __main__",
    "model/checkpoint/test_load.py": "model/checkpoint/: safetensors_file",
    "model/checkpoint/test_gguf_model.py": "model/checkpoint/: formats",
    "model/evaluation/test_matrix.py": "model/evaluation/: matrix_report; model/cli/: matrix",
    "model/evaluation/test_reproduce.py": "model/evaluation/: reproduce_report; model/cli/: reproduce reproduce_flags",
    "model/checkpoint/test_export.py": "model/cli/: export",
    "model/text/test_chat_template.py": "model/text/: template_child",
    "model/discovery/test_discover.py": "model/discovery/: circuits settings",
    "model/test_generate.py": "model/: kv_cache prefill",
    "model/test_transformer.py": "model/: steering",
    "model/test_engines.py": "model/hf/: hf_config hf_identity hf_load",
    "model/cli/test_every_model.py": "model/hf/: hf_estimate",
    "model/hf/test_hf_transformer.py": "model/hf/: hf_passes",
    "model/discovery/test_job.py": "model/discovery/: sense units; model/cli/: attribution",
    "model/discovery/test_packing.py": "model/discovery/: packed",
    "model/discovery/test_run_directory.py": "model/discovery/: part_header parts",
    "packaging/test_wheel.py": "model/: packages",
    "model/evaluation/test_evaluate.py": (
        "model/evaluation/: alternatives answers baselines choosing facts finder interventions likelihood "
        "pictures report rows store suite"
    ),
    "model/prompts/test_prompt_files.py": "model/prompts/: files formats",
    "model/test_parity.py": "model/text/: tokenizer_files tokenizer_classes",
    "model/cli/test_cli.py": (
        "model/: __main__; model/cli/: arguments attribution_flags console doctor parser run show status"
    ),
    "model/hub/test_share.py": "model/hub/: card contents; model/cli/: hub",
    "model/cli/test_evaluation_command.py": "model/cli/: evaluation evaluation_flags",
    "model/checkpoint/test_quantize.py": (
        "model/checkpoint/: gguf_source; model/text/: gguf_fields; model/cli/: quantize"
    ),
    "model/demo/test_bundled.py": "model/demo/: bundled_report checkpoint world",
    "model/demo/test_story.py": "model/cli/: demo; model/demo/: report",
}
UNTESTED = {"model/demo/train.py": "`make train-demo` runs it; test_bundled.py tests what it has made"}


def test_every_file_has_its_tests():
    tests = {path.removeprefix("tests/") for path in tracked() if path.startswith("tests/")}
    assert {*TESTED_TOGETHER} <= tests
    together = {
        folder + name + ".py"
        for groups in TESTED_TOGETHER.values()
        for folder, _, names in (group.strip().partition(": ") for group in groups.split(";"))
        for name in names.split()
    }
    without = []
    for path in tracked():
        folder, _, name = path.rpartition("/")
        if path.startswith(("cna_kernels/", "model/")) and name.endswith(".py") and name != "__init__.py":
            places = TEST_FOLDERS.get(folder, (folder,))
            if not any(f"{place}/test_{name}" in tests for place in places):
                without.append(path)
    assert {*without} - together - {*UNTESTED} == set(), "without a test file"
    assert (together | {*UNTESTED}) - {*without} == set(), "have one, or are gone: take them off the lists"


def test_files_stay_short():
    paths = [path for path in tracked() if path.startswith(("cna_kernels/", "model/")) and path.endswith(".py")]
    lines = {path: len((ROOT / path).read_text().splitlines()) for path in paths}
    assert {path: n for path, n in lines.items() if n > LONGEST} == {}
