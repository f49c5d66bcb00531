"""Print the entries of a file of requirements that another one lacks; on stderr, which versions differ on this Python.

python requirements/moved.py LOCK NEW > MOVED
"""

import re
import sys


def entries(path: str) -> dict[str, str]:
    """``{first line: whole entry}`` of a file as uv writes it: ``name==version ; marker`` and its hashes."""
    with open(path) as f:
        text = re.sub(r"(?m)^\s*#.*\n", "", f.read())
    found = re.split(r"(?m)^(?=\S)", text)
    return {e.splitlines()[0].rstrip(" \\"): e for e in found if "==" in e}


def versions(lines: dict[str, str]) -> dict[str, str]:
    """``{name: version}`` of the entries whose marker holds here."""
    from packaging.requirements import Requirement

    here = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate()]
    return {r.name: str(r.specifier).removeprefix("==") for r in here}


def main(lock: str, new: str) -> None:
    """See above."""
    old, now = entries(lock), entries(new)
    print("".join(e for line, e in now.items() if line not in old), end="")
    before, after = versions(old), versions(now)
    for name, version in after.items():
        if before.get(name) != version:
            print(f"{name} {before.get(name, '(none)')} -> {version}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
