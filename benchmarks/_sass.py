"""Read the costs of a compiled Triton kernel: spills, barriers and load widths from its SASS, and the argument of each
load from the PTX instructions of the same source line."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def _tool(name: str, *args: str) -> str:
    return subprocess.run([str(TOOLS / name), *args], capture_output=True, text=True, check=True).stdout


def _ptx_loads(ptx: str, arguments: list[str]) -> dict[tuple[str, int], set[str]]:
    """Return (file, line) -> arguments that the global loads of that source line read, found by following each address
    back to the kernel's parameters."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', ptx, re.M))
    sources: dict[str, set[str]] = {}  # register -> registers and parameters that it is computed from
    loads, place = [], None
    for statement in re.split(r"[;\n]", ptx):
        if location := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", statement):
            place = (Path(files[location[1]]).name, int(location[2]))
            continue
        instruction = re.match(r"\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(\{[^}]*\}|\[[^\]]*\]|[^,]+),(.*)", statement)
        if not instruction:
            continue
        operation, result, operands = instruction.groups()
        if operation.startswith(("ld.global", "cp.async")):
            loads.append((place, re.search(r"\[\s*(%\w+)", operands)[1]))
        elif not operation.startswith(("ld.shared", "st.")):
            found = set(re.findall(r"%r\w*|\w+_param_\d+", operands))
            for register in re.findall(r"%r\w*", result):
                sources.setdefault(register, set()).update(found)
    by_line: dict[tuple[str, int], set[str]] = {}
    for place, address in loads:
        reached, pending = set(), [address]
        while pending:
            name = pending.pop()
            if name not in reached:
                reached.add(name)
                pending.extend(sources.get(name, ()))
        parameters = (re.search(r"_param_(\d+)$", name) for name in reached)
        indices = [int(match[1]) for match in parameters if match]
        by_line.setdefault(place, set()).update(arguments[i] for i in indices if i < len(arguments))
    return by_line


def _bits_of(suffix: str) -> int:
    """Return the width of a SASS load, given its modifiers, such as .E.128 or .E.U16."""
    sizes = [int(size) for size in re.findall(r"\.(?:[US])?(8|16|64|128|256)\b", suffix)]
    return sizes[0] if sizes else 32


def _sass_loads(sass: str) -> list[tuple[tuple[str, int] | None, int]]:
    """Return source line and width (bits) of every global load."""
    loads, place = [], None
    for line in sass.splitlines():
        if location := re.search(r'//## File "([^"]+)", line (\d+)', line):
            place = (Path(location[1]).name, int(location[2]))
        elif load := re.search(r"\bLDG(?:STS)?((?:\.\w+)*)\b", line):
            loads.append((place, _bits_of(load[1])))
    return loads


SHARED = {80: 164, 90: 228, 100: 228}  # KiB per multiprocessor
REGISTERS, WARPS, PROGRAMS = 65536, 64, 32  # per multiprocessor, on all of them


def programs_per_sm(arch: int, registers: int, warps: int, shared: int) -> int:
    """Return how many programs one multiprocessor holds at a time. Registers are given out in 256 per warp and to four
    warps at a time; each program takes another KiB of shared memory."""
    per_warp = -(-32 * registers // 256) * 256
    by_registers = REGISTERS // per_warp // 4 * 4 // warps
    return min(by_registers, WARPS // warps, PROGRAMS, SHARED[arch] * 1024 // (shared + 1024))


def costs(kernel: CompiledKernel, sizes: dict[str, int], large: int) -> dict:
    """Return registers, shared bytes, programs per multiprocessor, barriers, spills and load widths of a kernel.

    `sizes` maps its tensor arguments to their elements. Loads from tensors of at least `large` elements are the main
    path."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = _tool("cuobjdump", "--dump-resource-usage", file.name), _tool("nvdisasm", "-g", "-c", file.name)
    arguments = [name for name, kind in kernel.src.signature.items() if kind != "constexpr"]
    read_by = _ptx_loads(kernel.asm["ptx"], arguments)
    main, others = [], {}
    for place, bits in _sass_loads(sass):
        tensors = {
            name for name in read_by.get(place, sizes) if name in sizes
        }  # if PTX has no such line: the main path
        if any(sizes[name] >= large for name in tensors):
            main.append(bits)
        else:
            for name in tensors:
                others[name] = min(bits, others.get(name, bits))
    registers, shared = int(re.search(r"REG:(\d+)", usage)[1]), kernel.metadata.shared
    return {
        "registers": registers,
        "shared": shared,
        "programs_per_sm": programs_per_sm(kernel.metadata.target.arch, registers, kernel.metadata.num_warps, shared),
        "barriers": len(re.findall(r"\bBAR\.SYNC", sass)),
        "spills": len(re.findall(r"\b(?:STL|LDL)(?:\.\w+)*\b", sass)),
        "main_load_bits": min(main, default=None),
        "other_load_bits": others,
    }
