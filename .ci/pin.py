"""Write constraints.txt from the running environment, and requirements-test.txt from pyproject.toml."""

import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path

OURS = {"blyan-node", "pip", "setuptools", "wheel"}


def main() -> None:
    """Pin every installed distribution but ourselves and the installers."""
    pins = {re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower(): found.version for found in distributions()}
    # "2.13.0+cpu" names a build, not a version: the pin must also fit the CUDA build.
    lines = [f"{name}=={version.partition('+')[0]}" for name, version in sorted(pins.items()) if name not in OURS]
    head = "# The exact versions this project is tested with. Made by `make constraints`; edit pyproject.toml.\n"
    Path("constraints.txt").write_text(head + "\n".join(lines) + "\n")

    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    head = "# The `test` extra of pyproject.toml, for those who install by file. Made by `make constraints`.\n"
    Path("requirements-test.txt").write_text(head + "-c constraints.txt\n" + "\n".join(extras["test"]) + "\n")


if __name__ == "__main__":
    main()
