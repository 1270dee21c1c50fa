"""Lists the packages of the distribution; all else stands in pyproject.toml.

The config files are packaged as `vr_jax.configs`, so that `vr-jax train --config=configs/demo.py` works where only the
wheel is installed. pyproject.toml cannot both search for packages and map a folder to one.
"""

from pathlib import Path

from setuptools import find_packages, setup

CONFIGS = Path(__file__).parent / "configs"
config_packages = {
    ".".join(["vr_jax", "configs", *path.relative_to(CONFIGS).parts]): f"configs/{path.relative_to(CONFIGS).as_posix()}"
    for path in [CONFIGS, *sorted(CONFIGS.glob("**/*/"))]
    if path.name != "__pycache__"
}

setup(
    packages=[*find_packages(include=["vr_jax", "vr_jax.*"]), *config_packages],
    package_dir=config_packages,
)
