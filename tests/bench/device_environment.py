"""Makes the environment of `make test-device-versions`: the GPU machine's versions, on a machine without a GPU.

PyPI has torch 2.11 for Linux as a CUDA build only, with 2 GB of CUDA's libraries. Without a GPU torch calls only the
CUDA runtime among them, which says that there is no GPU. So torch and triton are installed without their requirements,
and each library that torch links with and misses is replaced by an empty library of that name. With a GPU torch would
crash.
"""

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints-device.txt"
ALONE = ("torch", "triton", "nvidia-cuda-runtime")
OLD_NUMPY = "2.3"  # the last version that Triton 3.6's interpreter runs with


def main(where):
    venv.create(where, clear=True, with_pip=True)
    python = where / "bin" / "python"
    paths = {"base": str(where), "platbase": str(where)}
    packages = Path(sysconfig.get_path("purelib", "venv", paths))
    install(python, "--no-deps", "--only-binary", ":all:", *ALONE)
    forget_cuda_packages(packages)
    install(python, "-e", f"{ROOT}[test]")  # and the rest of what torch requires
    # By default Python binds all functions of a library when it loads the library; the empty libraries have none.
    (packages / "bind_lazily.pth").write_text(f"import sys; sys.setdlopenflags({os.RTLD_LAZY})\n")
    stand_in_for_cuda(python, packages)
    pip_install(python, "--target", where / f"numpy-{OLD_NUMPY}", f"numpy=={OLD_NUMPY}.*")


def install(python, *what):
    pip_install(python, "-c", CONSTRAINTS, *what)


def pip_install(python, *what):
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what], check=True)


def forget_cuda_packages(packages):
    """Take CUDA out of what torch says it requires, or pip fetches it with the next package that requires torch."""
    (metadata,) = packages.glob("torch-*.dist-info/METADATA")
    text = metadata.read_text()
    metadata.write_text(re.sub(r"^Requires-Dist: (nvidia|cuda)-.*\n", "", text, flags=re.MULTILINE))


def stand_in_for_cuda(python, packages):
    """Make an empty library for each library that `import torch` misses."""
    (libraries,) = packages.glob("nvidia/cu*/lib")  # the runtime's folder, where torch looks for most libraries
    while True:
        tried = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True)
        if tried.returncode == 0:
            return
        missing = re.search(r"ImportError: (lib[\w.]+): cannot open shared object file", tried.stderr)
        if missing is None or (libraries / missing[1]).exists():
            sys.exit(f"torch cannot be imported:\n{tried.stderr}")
        name = missing[1]
        flags = ["-shared", f"-Wl,-soname,{name}", "-x", "c", os.devnull, "-o", libraries / name]
        subprocess.run([os.environ.get("CC", "cc"), *flags], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
