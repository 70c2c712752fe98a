"""`make wheel`: builds the wheels of cna-kernels and cna-kernels-demo, prints their sizes, checks what they hold."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "model" / "demo" / "checkpoints"
LARGEST = {"cna_kernels": 1_500_000, "cna_kernels_demo": 12_000_000}  # bytes
LEFT_BEHIND = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*.so", "*.dylib")
LIBRARY = "cna_kernels/cpu/libcna.dylib" if sys.platform == "darwin" else "cna_kernels/cpu/libcna.so"


def main(out):
    found = []
    for source in (ROOT, DEMO):
        wheel = build(source, out)
        size = wheel.stat().st_size
        print(f"{wheel}: {size:,} bytes, {size / 1e6:.2f} MB")
        found += [f"{wheel.name}: {fault}" for fault in faults(wheel)]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


def build(source, out, *flags, **options):
    """Build the wheel from a copy of ``source`` without the leftovers of earlier builds."""
    with tempfile.TemporaryDirectory() as place:
        copy = shutil.copytree(source, Path(place, "source"), ignore=LEFT_BEHIND)
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", *flags]
        subprocess.run([*command, "--wheel-dir", place, copy], check=True, **options)
        (wheel,) = Path(place).glob("*.whl")
        Path(out).mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, out))


def faults(wheel):
    """The faults of a wheel: files that it misses, files that it should not hold, and too large a size."""
    name = wheel.name.partition("-")[0]
    with zipfile.ZipFile(wheel) as file:
        there = {entry for entry in file.namelist() if ".dist-info/" not in entry}
    expected = set(demo_files() if name == "cna_kernels_demo" else engine_files())
    found = [f"misses {entry}" for entry in sorted(expected - there)]
    found += [f"holds {entry}, which is none of its files" for entry in sorted(there - expected)]
    size = wheel.stat().st_size
    return [*found, f"has {size:,} bytes, more than {LARGEST[name]:,}"] if size > LARGEST[name] else found


def _sources(folder: Path):
    """The files of a folder that belong to the package: modules and data."""
    for pattern in ("*.py", "data/*.txt", "data/behaviours/*.json"):
        yield from folder.rglob(pattern)


def engine_files():
    yield from (LIBRARY, "cna_kernels/cpu/cna.h", "cna_kernels/py.typed")
    for folder, package in (("cna_kernels", "cna_kernels"), ("model", "cna_kernels/model")):
        for path in _sources(ROOT / folder):
            if not path.is_relative_to(DEMO):
                yield f"{package}/{path.relative_to(ROOT / folder).as_posix()}"


def demo_files():
    yield "cna_kernels_demo/__init__.py"
    for name in ("base", "instruct"):
        yield from (f"cna_kernels_demo/{name}/{path.name}" for path in (DEMO / name).iterdir())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
