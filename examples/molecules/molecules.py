"""Molecules as text (SMILES): a corpus from the data that RDKit ships, a regular expression of their syntax, and a check by RDKit.

    python molecules.py corpus FOLDER      write smiles.txt, one molecule a line
    python molecules.py pattern            print the regular expression, for `sedd-graph sample RUN --matching`
    python molecules.py check ZARR         count the sampled molecules that RDKit can read

SMILES is not a regular language: brackets nest without bound, and digits that close rings come in pairs. Up to a depth and a number
of digits it is one. Look-aheads say that each digit comes in pairs; the body says how atoms, bonds and branches follow each other.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

ATOM = r"(?:[CNSP]|O|\[N\+\]|\[O-\])"
END = r"(?:F|Cl|Br|I)"
"""Halogens have one bond: nothing follows them in a chain."""
BOND = "[=#]?"
SOURCE = Path("NCI") / "first_5K.smi"


def language(*, depth: int = 2, rings: int = 3) -> str:
    """Return a regular expression for rows of molecules, each ended by a line break.

    Args:
        depth: How deep branches may nest.
        rings: How many digits may close rings, from 1 on.
    """
    atom = f"{ATOM}[1-{rings}]{{0,2}}"

    def chain(branches: str) -> str:
        return f"{atom}{branches}(?:{BOND}{atom}{branches})*{END}?"

    branches = ""
    for _ in range(depth):
        branches = rf"(?:\({BOND}(?:{chain(branches)}|{END})\))*"
    pairs = "".join(rf"(?=(?:(?:[^{d}\n]*{d}[^{d}\n]*{d})*[^{d}\n]*\n)*$)" for d in range(1, rings + 1))
    loops = "|".join(f"{d}{d}" for d in range(1, rings + 1))
    # =O has no bond left, O and S have no triple bond, and no atom is a ring by itself
    never = rf"(?![\s\S]*(?:=O[^)\n]|#[OFS]|=#|{loops}))"
    return f"{pairs}{never}(?:{END}?{chain(branches)}\\n)+"


def write_corpus(folder: Path) -> int:
    """Write the molecules of RDKit's file that are in the language to ``folder/smiles.txt``; return their number."""
    from rdkit import RDConfig  # type: ignore[import-untyped]  # compiled, with incomplete stubs

    from sedd_graph.diffusion.conditions.automaton import compile_pattern

    lines = (Path(RDConfig.RDDataDir) / SOURCE).read_text(encoding="ascii").splitlines()
    # the file writes hydrogens of carbon out, which SMILES implies
    names = dict.fromkeys(line.split()[0].replace("[CH]", "C").replace("[C]", "C") for line in lines if line.strip())
    known = compile_pattern(language())
    kept = [name for name in names if known.matches(f"{name}\n".encode())]
    with (folder / "smiles.txt").open("x", encoding="ascii") as file:  # never overwrites
        file.write("\n".join([*kept, ""]))
    return len(kept)


def molecules(row: str, *, whole: bool) -> list[str]:
    """Return the molecules of a sampled row; if it is not ``whole``, without those that its ends cut."""
    lines = row.split("\n")
    return [line for line in (lines[:-1] if whole else lines[1:-1]) if line]


def valid(name: str) -> bool:
    """Return True if RDKit reads a molecule, which checks syntax, valences and aromatic rings."""
    from rdkit import Chem, RDLogger  # type: ignore[import-untyped]  # compiled, with incomplete stubs

    RDLogger.DisableLog("rdApp.*")
    return Chem.MolFromSmiles(name) is not None


def check(path: Path) -> dict[str, Any]:
    """Return the number of molecules in a zarr group of samples, of those that RDKit reads, and of different ones."""
    import zarr

    group: Any = zarr.open_group(path, mode="r")
    constrained = (group.attrs.get("conditions") or {}).get("matching") is not None
    rows = [str(text) for text in np.asarray(group["text"][:])]
    found = [name for row in rows for name in molecules(row, whole=constrained)]
    good = [name for name in found if valid(name)]
    known = re.compile(language().replace("$)", r"\Z)"))
    syntax = sum(known.fullmatch(f"{name}\n") is not None for name in found)
    return {
        "molecules": len(found),
        "syntax": syntax,
        "valid": len(good),
        "different": len(set(good)),
        "examples": good[:5],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("corpus", "pattern", "check"))
    parser.add_argument("path", type=Path, nargs="?", help="folder of the corpus, or zarr group of samples")
    arguments = parser.parse_args()
    if arguments.what == "pattern":
        print(language())
    elif arguments.path is None:
        sys.exit(f"molecules.py {arguments.what}: name the {'folder' if arguments.what == 'corpus' else 'zarr group'}")
    elif arguments.what == "corpus":
        arguments.path.mkdir(parents=True, exist_ok=True)
        print(f"{write_corpus(arguments.path):,} molecules in {arguments.path / 'smiles.txt'}")
    else:
        found = check(arguments.path)
        for name in ("syntax", "valid"):
            print(f"{name:<8}{found[name]} of {found['molecules']} ({found[name] / max(1, found['molecules']):.1%})")
        print(f"different molecules among the valid ones: {found['different']}")
        print("\n".join(found["examples"]))


if __name__ == "__main__":
    main()
