"""The CPU library picks an instruction set only if the machine has every feature that the compiler may use for it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from agrepa_fast.kernels import _native

if _native.LIBRARY is None or shutil.which("c++") is None:
    pytest.skip("needs the CPU library and its compiler, for x86-64", allow_module_level=True)

WORDS = ("leaf 1 ECX", "leaf 7 EBX", "leaf 0x80000001 ECX", "XCR0")  # the arguments of agrepa_isa_of
# The compiler's macro for a feature -> its word and bit, as in Intel's manual, volume 2, CPUID.
FEATURES = {
    "SSE3": (0, 0),
    "SSSE3": (0, 9),
    "FMA": (0, 12),
    "GCC_HAVE_SYNC_COMPARE_AND_SWAP_16": (0, 13),
    "SSE4_1": (0, 19),
    "SSE4_2": (0, 20),
    "CRC32": (0, 20),
    "MOVBE": (0, 22),
    "POPCNT": (0, 23),
    "XSAVE": (0, 26),
    "AVX": (0, 28),
    "F16C": (0, 29),
    "BMI": (1, 3),
    "AVX2": (1, 5),
    "BMI2": (1, 8),
    "AVX512F": (1, 16),
    "AVX512DQ": (1, 17),
    "AVX512CD": (1, 28),
    "AVX512BW": (1, 30),
    "AVX512VL": (1, 31),
    "LAHF_SAHF": (2, 0),
    "LZCNT": (2, 5),
}
# Clang's names for vector lengths of AVX-512, and facts that are no instructions
NO_FEATURES = re.compile(r"EVEX\d+|FP_FAST_\w+|BIGGEST_ALIGNMENT|k8|x86_64.*")
LEVELS = [(1, "x86-64-v3"), (2, "x86-64-v4")]


def macros(*flags: str) -> set[str]:
    command = ["c++", *flags, "-dM", "-E", "-x", "c++", "/dev/null"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"#define __(\w+?)_* 1$", printed, re.M))


def isa_without(word: int, bit: int) -> int:
    """The instruction set picked on a machine that has every feature but one."""
    words = [0xFFFFFFFF] * len(WORDS)
    words[word] ^= 1 << bit
    return _native.LIBRARY.agrepa_isa_of(*words)


def test_setup_compiles_for_these_levels():
    text = (Path(__file__).parents[2] / "setup.py").read_text()
    assert re.findall(r"-march=([\w-]+)", text) == [level for _, level in LEVELS]


@pytest.mark.parametrize(("isa", "level"), LEVELS)
def test_every_feature_of_a_level_is_required(isa, level):
    used = {name for name in macros(f"-march={level}") - macros() if not NO_FEATURES.fullmatch(name)}
    assert used >= {"AVX2", "BMI", "LZCNT", "MOVBE"}
    assert used <= FEATURES.keys(), "features that the compiler uses and this test does not know"
    for name in used:
        assert isa_without(*FEATURES[name]) < isa, f"{level} would run without {name}"


@pytest.mark.parametrize(("bit", "best"), [(1, 0), (2, 0), (5, 1), (6, 1), (7, 1)])
def test_registers_that_the_system_does_not_save_are_not_used(bit, best):
    assert isa_without(3, bit) == best


def test_a_machine_with_every_feature_runs_the_widest():
    assert isa_without(3, 31) == len(_native.ISAS) - 1
    assert _native.LIBRARY.agrepa_isa_of(0, 0, 0, 0) == 0


def test_this_machine_is_judged_as_the_compiler_does(tmp_path):
    """By the levels' names, which g++ 12 and later know."""
    source, program = tmp_path / "levels.cpp", tmp_path / "levels"
    tests = "".join(f'if (__builtin_cpu_supports("{level}")) isa = {isa};' for isa, level in LEVELS)
    source.write_text(f"int main() {{ int isa = 0; __builtin_cpu_init(); {tests} return isa; }}")
    built = subprocess.run(["c++", source, "-o", program], capture_output=True, text=True, check=False)
    if "x86-64-v" in built.stderr:
        pytest.skip("this compiler does not know the levels by name")
    assert built.returncode == 0, built.stderr
    assert subprocess.run([program], check=False).returncode == _native.LIBRARY.agrepa_isa()
