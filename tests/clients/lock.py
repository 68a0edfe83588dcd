"""Completes package-lock.json after `npm install --package-lock-only`: `lock.py FILE`.

A registry need not have packages for every platform. npm leaves one that it does not find out of the lock, and `npm ci`
then refuses the lock. Such packages are optional and for other platforms: they are named here, and never installed.
Where packages come from is left to npm's configuration, so no address stands in the lock.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    path = Path(sys.argv[1])
    lock = json.loads(path.read_text())
    packages = lock["packages"]
    for package in list(packages.values()):
        for address in ("resolved", "funding"):
            package.pop(address, None)
        for name, version in package.get("optionalDependencies", {}).items():
            if not any(at.endswith(f"node_modules/{name}") for at in packages):
                packages[f"node_modules/{name}"] = {"version": version, "optional": True}
    path.write_text(json.dumps(lock, indent=2) + "\n")


if __name__ == "__main__":
    main()
