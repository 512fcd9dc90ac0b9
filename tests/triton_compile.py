"""Compiles the Triton kernels to machine code, without a device, and prints what came of it as JSON.

A process of its own runs it: once triton has been imported for its interpreter, it compiles no more.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from tempfile import NamedTemporaryFile
from typing import Any

import triton.language as tl
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.knobs import nvidia

from adam_mini_plugins.kernels import triton as kernels

POINTERS = {"programs": "*i32", "jobs": "*i64", "tensors": "*i64", "sums": "*fp32"}
ON_HOST = {"LR_ON_DEVICE": False, "CAPTURABLE": False, "STOCHASTIC": False}
ON_DEVICE = {"LR_ON_DEVICE": True, "CAPTURABLE": True, "STOCHASTIC": True}


def compiled(kernel: Any, architecture: int, warps: int, **constants: Any) -> Any:
    """The kernel with its pointers aligned and its other arguments float32, as a launch has them."""
    pointers = POINTERS | ({"lr": "*fp32"} if constants.get("LR_ON_DEVICE") else {})
    kinds = {name: "constexpr" if name in constants else pointers.get(name, "fp32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in POINTERS}
    source = ASTSource(kernel, kinds, {name: constants[name] for name in kinds if name in constants}, aligned)
    return compile_kernel(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})


def cases() -> dict[str, tuple[Any, int, int, dict[str, Any]]]:
    """By name the kernel, the architecture, the number of warps and the compile-time arguments."""
    found: dict[str, tuple[Any, int, int, dict[str, Any]]] = {}
    for dtype, architecture, aligned, mode in (
        (tl.float32, 90, True, ON_HOST),
        (tl.bfloat16, 80, True, ON_DEVICE),
        (tl.float16, 80, False, ON_HOST),
    ):
        types = {"P": dtype, "G": dtype, "M": dtype, "ALIGNED": aligned}
        text = f"{dtype} {'aligned' if aligned else 'anywhere'} sm_{architecture}"
        for width in (1, 8, 4096, 16384) if aligned else (8,):
            tile, warps = max(width, kernels._TILE), 16 if width > 2 * kernels._TILE else 8
            options = {**types, **mode, "WIDTH": width, "TILE": tile}
            found[f"blocks of {width} {text}"] = kernels._step_blocks, architecture, warps, options
        found[f"descend {text}"] = kernels._descend, architecture, 8, {**types, **mode, "TILE": kernels._TILE}
        options = {"G": dtype, "ALIGNED": aligned, "TILE": kernels._TILE}
        found[f"sums {text}"] = kernels._square_sums, architecture, 8, options
    found["averages sm_90"] = kernels._averages, 90, 8, {"TILE": kernels._TILE, "ROWS": kernels._ROWS}
    return found


def resources(binary: bytes) -> dict[str, int]:
    """Registers a thread and bytes of stack, to which a kernel spills what has no register."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}


def main() -> None:
    """Prints, for each case, vector accesses, registers and stack."""
    report = {}
    for name, (kernel, architecture, warps, options) in cases().items():
        code = compiled(kernel, architecture, warps, **options).asm
        vectors = len(re.findall(r"(?:ld|st)\.global(?:\.\w+)*\.v4", code["ptx"]))
        report[name] = {"vectors": vectors, **resources(code["cubin"])}
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
