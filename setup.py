"""Names the packages, and the two folders of files that vitcomposer/shipped.py finds. All else: pyproject.toml."""

from setuptools import find_packages, setup

# Folders of the checkout by the place in the package that they have in a wheel, with the files that are read.
FILES = {
    "vitcomposer.yamls": ("yamls", ["*.yaml"]),
    "vitcomposer.results": ("benchmarks/results", ["gpu_*.json", "input_*full.json"]),
}

setup(
    packages=[*find_packages(include=["vitcomposer*", "recipes*"]), *FILES],
    package_dir={package: folder for package, (folder, _) in FILES.items()},
    package_data={package: names for package, (_, names) in FILES.items()},
)
