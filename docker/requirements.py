"""Prints what some extras of pyproject.toml need, so that an image's layer of dependencies changes
only with them: python requirements.py EXTRA..."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
wanted = [*project["dependencies"]]
for extra in sys.argv[1:]:
    wanted += project["optional-dependencies"][extra]
print("\n".join(sorted(set(wanted))))
