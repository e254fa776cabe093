"""Metadata, dependencies, the `agrepa` command and the CPU library of csrc/cpu. Needs neither torch nor nvcc; without
a C++ compiler everything but that library is installed, and the operations run their references on CPUs."""

import platform
from itertools import chain
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

EXTRAS = {
    "vocos": ["vocos>=0.1"],
    "hf": ["datasets>=5,<6"],  # agrepa prepare hf
    "vq": ["vector-quantize-pytorch>=1.32"],  # agrepa tokens fit
    "s3": ["s3tokenizer>=0.3"],  # data.speech_tokens=s3:…
    "phones": ["pocketsphinx>=5.1,<6"],  # data.speech_tokens=phones
    "cosyvoice": ["diffusers>=0.29,<1", "einops"],  # model.backbone=cosyvoice1 and 2, beside CosyVoice itself
    "f5": ["f5-tts>=1.1,<2"],  # data.text=pinyin:… and package:f5, model.backbone=f5
    "beats": ["speechbrain>=1.1"],  # teachers beats:FILE
    "speaker": ["onnxruntime>=1.20"],  # data.speaker=campplus:…
    "dnsmos": ["onnxruntime>=1.20"],  # metrics.mos=package:dnsmos
    "wandb": ["wandb>=0.20"],  # train.wandb=PROJECT
}
X86 = platform.machine() in ("x86_64", "AMD64")
# One object per operation and instruction set. csrc/cpu/isa.cpp picks the machine's at run time, and tests all features
# of a level named here.
ISAS = {"generic": []}
if X86:
    ISAS |= {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}


class BuildCpuLibrary(build_ext):
    """A plain shared library with a C ABI. OpenMP is not linked: the symbols are those of torch's own runtime, because
    two runtimes in one process keep two thread pools, which fight for the cores."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, extension: Extension) -> None:
        try:
            self._build(extension)
        except CompileError as error:  # a warning, since the extension is optional
            raise CompileError(
                f"{error}\nThe CPU library is left out: install a C++17 compiler with OpenMP (apt-get install g++), "
                "then install again. Until then operations run their PyTorch references on CPUs; agrepa doctor says so."
            ) from error

    def _build(self, extension: Extension) -> None:
        sources = [source for source in extension.sources if not source.endswith("isa.cpp")]
        # Without errno and traps to keep, loops with a square root or a select vectorise; results do not change.
        flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
        objects = self.compiler.compile(["csrc/cpu/isa.cpp"], output_dir=self.build_temp, extra_preargs=flags)
        for isa, extra in ISAS.items():
            objects += self.compiler.compile(
                sources,
                output_dir=f"{self.build_temp}/{isa}",
                macros=[("AGREPA_ISA", isa)],
                extra_preargs=[*flags, "-fopenmp", *extra],
            )
        self.compiler.link_shared_object(objects, self.get_ext_fullpath(extension.name), target_lang="c++")


setup(
    name="agrepa_fast",
    version="0.2.0",
    description="Training of audio flow-matching transformers with representation alignment on the causal layers",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # kernels/ stands beside the package in the checkout and has one import name, agrepa_fast.kernels.
    packages=[*find_packages(include=["agrepa_fast", "agrepa_fast.*"]), "agrepa_fast.kernels"],
    package_dir={"agrepa_fast.kernels": "kernels"},
    package_data={
        "agrepa_fast": [
            "presets/*.yaml",
            "presets/*.json",
            "corpora/*.txt",
            *(f"reporting/*/*.{suffix}" for suffix in ("html", "css", "js")),
        ]
    },
    ext_modules=[
        Extension(
            "agrepa_fast.kernels._cpu",
            sorted(map(str, Path("csrc/cpu").glob("*.cpp"))),
            depends=sorted(map(str, Path("csrc/cpu").glob("*.h"))),
            optional=True,  # no compiler: a warning, and the references run
        )
    ],
    cmdclass={"build_ext": BuildCpuLibrary},
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6,<3.10; sys_platform == 'linux'",
        "torchaudio>=2.11",
        "deepspeed>=0.19.8,<0.20",
        "webdataset>=1.0.2,<2",
        "braceexpand",
        "fsspec[http]",
        "transformers>=5,<6",
        "pydantic>=2.7,<3",
        "packaging",
        "tenacity>=8.2",
        "safetensors",
        "pyyaml",
        "numpy",
        "jiwer>=4,<5",
        "jinja2>=3.1,<4",
        "pyloudnorm>=0.2,<0.3",
        "scipy>=1.15",  # kmeans2(rng=)
        "soundfile>=0.13",
        "av>=14",
        "matplotlib>=3.6",
        "tensorboard",
        "tqdm",
        "rich",
    ],
    extras_require={
        **EXTRAS,
        # f5-tts comes without its requirements, a training stack: see tests/peers.txt
        "test": [
            *("pytest>=8", "pytest-xdist>=3.6", "ruff>=0.12", "selenium>=4.11,<5"),
            *chain.from_iterable(packages for name, packages in EXTRAS.items() if name not in ("cosyvoice", "f5")),
        ],
    },
    entry_points={"console_scripts": ["agrepa = agrepa_fast.cli:main"]},
)
