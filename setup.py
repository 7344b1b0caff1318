"""The README as package indexes show it: links and pictures lead to the repository. All else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent


def long_description() -> str:
    """The README, with relative links made absolute."""
    project = (HERE / "pyproject.toml").read_text(encoding="utf-8")
    (repository,) = re.findall(r'^Repository = "(.*)"$', project, re.MULTILINE)

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link[1] else "blob"  # of a picture and of a page
        return f"{link[1]}[{link[2]}]({repository}/{kind}/main/{link[3]})"

    readme = (HERE / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)", absolute, readme)


setup(long_description=long_description(), long_description_content_type="text/markdown")
