"""Validate package.xml: what catkin_pkg (colcon, rosdep) refuses, and the element order of REP-149.

catkin_pkg reads the elements in any order; the REP's XML schema, which release tools apply, does not.
"""

import sys
from itertools import pairwise
from pathlib import Path

from catkin_pkg.package import InvalidPackage, parse_package
from lxml import etree

DEPENDENCIES = (
    "build_depend build_export_depend buildtool_depend buildtool_export_depend exec_depend depend doc_depend "
    "test_depend conflict replace"
)
# Elements of one line may be mixed; the lines follow each other.
ORDER = ["name", "version", "description", "maintainer", "license", "url", "author"]
ORDER += [DEPENDENCIES, "group_depend", "member_of_group", "export"]
PLACES = {tag: place for place, tags in enumerate(ORDER) for tag in tags.split()}


def problems(path: Path) -> list[str]:
    """What is wrong with the manifest at `path`, one line each."""
    found: list[str] = []
    warnings: list[str] = []
    try:
        package = parse_package(path, warnings=warnings)
        package.validate(warnings=warnings)
    except InvalidPackage as error:
        found.append(str(error))
    found += warnings

    root = etree.parse(path).getroot()
    if root.get("format") != "3":
        found.append(f"expected format 3, found {root.get('format')}")
    elements = list(root.iterchildren(etree.Element))
    for element in elements:
        if element.tag not in PLACES:
            found.append(f"line {element.sourceline}: REP-149 knows no element <{element.tag}>")
    known = [element for element in elements if element.tag in PLACES]
    for before, after in pairwise(known):
        if PLACES[before.tag] > PLACES[after.tag]:
            found.append(f"line {after.sourceline}: <{after.tag}> must come before <{before.tag}> (REP-149)")
    return found


def main() -> int:
    path = Path(sys.argv[1])
    found = problems(path)
    for problem in found:
        print(f"{path}: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
