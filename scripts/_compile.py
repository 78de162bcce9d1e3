"""Compiles the kernels ahead of time for a GPU that is not there, and reads the machine code.

Must run in a process without TRITON_INTERPRET: interpreter and compiler exclude each other.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = re.compile(r"(?:IMMA|HMMA|QMMA|OMMA|IGMMA|HGMMA|QGMMA|UTC[A-Z]*MMA)[\w.]*")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
SPILL = re.compile(r"\b(?:LDL|STL)\b")
LABEL = re.compile(r"^\s*(\.L_x_\w+|\.L_\w+):")


@dataclass(frozen=True)
class Compiled:
    """What one compilation gave.

    spills: register spills in all, of which loop_spills in loops with tensor products; what is parked outside them
    costs nothing that counts. shared: bytes per block. slots: issue slots per softmax element of the main loop; mma:
    its tensor instructions. serialized: ptxas waits after every single wgmma.
    """

    registers: int
    spills: int
    loop_spills: int
    shared: int
    slots: float
    mma: tuple[str, ...]
    serialized: bool


def compile_kernel(kernel, pointers: dict[str, str], constants: dict, capability: int, warps: int, stages: int):
    """Compile a jit function; `pointers` maps argument names to types such as `*i8`, `constants` to values.

    Every other argument is a 32-bit integer, except strides: 64-bit and, like pointers, divisible by 16.
    """
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = pointers[name]
            if pointers[name].startswith("*"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif name.startswith("stride"):
            signature[name] = "i64"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def disassemble(compiled) -> tuple[str, int]:
    """Machine code as text and registers per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
    registers = re.search(r"REG:(\d+)", usage)
    return code, int(registers.group(1)) if registers else -1


def matrix_loops(code: str) -> list[list[str]]:
    """The innermost loops with tensor products, each as its mnemonics in order, in the order of the code.

    The first is the main loop; those behind it (left-over blocks, the pooled tail) run a few times only.
    """
    labels, lines = {}, []
    for line in code.splitlines():
        label = LABEL.match(line)
        if label:
            labels[label.group(1)] = len(lines)
        found = INSTRUCTION.search(line)
        if found:
            lines.append((found.group(2), found.group(3)))
    loops = []
    for end, (mnemonic, operands) in enumerate(lines):
        target = re.search(r"(\.L_x_\w+|\.L_\w+)", operands)
        begin = labels.get(target.group(1), end + 1) if target and mnemonic.startswith("BRA") else end + 1
        body = [name for name, _ in lines[begin : end + 1]]
        if any(MATRIX.match(name) for name in body) and not any(begin <= first for first, _ in loops):
            loops.append((begin, body))
    return [body for _, body in loops]


def inspect(compiled, warps: int, elements: int) -> Compiled:
    """Read one compiled kernel; `elements`: softmax elements of one pass of its main loop."""
    code, registers = disassemble(compiled)
    loops = matrix_loops(code)
    products = [name for name in loops[0] if MATRIX.match(name)]
    # One wait per product: healthy loops wait once for several.
    waits = sum(name.startswith("WARPGROUP.DEPBAR") for name in loops[0])
    return Compiled(
        registers,
        len(SPILL.findall(code)),
        sum(bool(SPILL.match(name)) for loop in loops for name in loop),
        compiled.metadata.shared,
        len(loops[0]) * warps * 32 / elements,
        tuple(sorted(set(products))),
        waits >= len(products),
    )
