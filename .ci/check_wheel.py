"""What a source distribution and the wheel made from it must hold.

python .ci/check_wheel.py isomorph.tar.gz isomorph.whl
"""

import email
import re
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

PACKAGES = ("kernels", "engine", "curriculum")
ROOT = Path(__file__).parents[1]


def check_sdist(path: Path, version: str) -> int:
    """The number of files in it."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "kernels/csrc/isa.cpp", "PKG-INFO"}
    assert path.name == f"isomorph-{version}.tar.gz", path.name
    assert needed <= names, needed - names
    built = [name for name in names if re.search(r"\.(so|o|pyc|whl)$|^(build|runs|dist|\.venv)", name)]
    assert not built, built
    return len(names)


def check_wheel(path: Path, version: str, compiled: bool = True) -> int:
    """The number of files in it. ``compiled``: whether the C++ module must be there."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        facts = email.message_from_bytes(archive.read(metadata))
    for package in PACKAGES:
        ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / package).rglob("*") if p.suffix in {".py", ".toml"}}
        missing = {f"isomorph/{name}" for name in (*ours, f"{package}/py.typed")} - set(names)
        assert not missing, missing
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"isomorph"}, "only isomorph/ is installed"
    assert not [name for name in names if "csrc" in name or name.endswith(".pyc")]
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    modules = [name for name in names if name.endswith(".so")]
    assert [name.partition(".")[0] for name in modules] == ["isomorph/kernels/_native"] * compiled, modules
    assert facts["Version"] == version and facts["License-Expression"] == "Apache-2.0"
    assert facts["Requires-Python"] == ">=3.11"
    return len(names)


if __name__ == "__main__":
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    sdist, wheel = map(Path, sys.argv[1:])
    print(f"{sdist.name}: {check_sdist(sdist, version)} files; {wheel.name}: {check_wheel(wheel, version)} files")
