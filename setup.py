"""Metadata, dependencies and the `agrepa` command. Needs neither torch nor a compiler to build."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="agrepa_fast",
    version="0.1.0",
    description="Training of audio flow-matching transformers with representation alignment on the causal layers",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # kernels/ stands beside the package in the checkout and has one import name, agrepa_fast.kernels.
    packages=[*find_packages(include=["agrepa_fast", "agrepa_fast.*"]), "agrepa_fast.kernels"],
    package_dir={"agrepa_fast.kernels": "kernels"},
    package_data={"agrepa_fast": ["presets/*.yaml", "presets/*.json"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "torchaudio>=2.11",
        "deepspeed>=0.19.8,<0.20",
        "webdataset>=1.0.2,<2",
        "transformers>=5,<6",
        "omegaconf>=2.3",
        "safetensors",
        "filelock",
        "pyyaml",
        "numpy",
        "scipy",
        "soundfile>=0.13",
        "av>=14",
        "matplotlib",
        "tensorboard",
        "tqdm",
        "rich",
    ],
    extras_require={
        "vocos": ["vocos>=0.1"],
        "test": ["pytest>=8", "ruff>=0.12", "vocos>=0.1"],
    },
    entry_points={"console_scripts": ["agrepa = agrepa_fast.cli:main"]},
)
