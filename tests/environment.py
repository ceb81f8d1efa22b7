"""An environment of its own, to install a package into as its user would.

It sees the packages that run this test (torch is not installed again), and nothing is fetched.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path


class Environment:
    """A virtual environment in ``folder`` that inherits the packages of the running interpreter."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        windows = os.name == "nt"
        self.python = folder / ("Scripts/python.exe" if windows else "bin/python")
        self.packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        # addsitedir rather than plain lines: it also follows the .pth files there, as of editable installs
        inherited = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
        lines = [f"import site; site.addsitedir({p!r})\n" for p in inherited]
        (self.packages / "inherited.pth").write_text("".join(lines))

    def run(self, *arguments: str | Path, cwd: Path) -> str:
        """What ``python ARGUMENTS`` prints; its errors fail the test."""
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
        done = subprocess.run(
            [self.python, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self, *arguments: str | Path) -> None:
        """``pip install ARGUMENTS``, without what they depend on."""
        flags = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--no-build-isolation"]
        self.run("-m", "pip", "install", *flags, *arguments, cwd=self.packages)
