"""What pyproject.toml cannot say: find the packages, and add the root's configs/ to them as ldm/configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ldm", "ldm.*"]), "ldm.configs"],
    package_dir={"ldm.configs": "configs"},
    package_data={
        "ldm": ["py.typed", "assets/**/*", "evaluation/report.html"],
        "ldm.configs": ["*.yaml", "**/*.yaml", "**/*.txt"],
    },
    include_package_data=False,
)
