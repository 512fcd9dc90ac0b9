"""Compiles every Triton kernel for two architectures, without a device, and prints what came of it as JSON.

A process of its own runs it: once triton has been imported for its interpreter, it compiles no more.
"""

from __future__ import annotations

import json
import re
import subprocess
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


def cases() -> dict[str, tuple[Any, int, dict[str, Any]]]:
    """By name the kernel, its warps and its compile-time arguments."""
    found: dict[str, tuple[Any, int, dict[str, Any]]] = {}
    for dtype, aligned, mode in ((tl.float32, True, ON_HOST), (tl.bfloat16, True, ON_DEVICE), (tl.float16, False, ON_HOST)):
        types = {"P": dtype, "G": dtype, "M": dtype, "ALIGNED": aligned}
        text = f"{dtype} {'aligned' if aligned else 'anywhere'}"
        for width in (1, 8, 4096, 16384) if aligned else (8,):
            tile, warps = max(width, kernels._TILE), 16 if width > 2 * kernels._TILE else 8
            options = {**types, **mode, "WIDTH": width, "TILE": tile}
            found[f"blocks of {width} {text}"] = kernels._step_blocks, warps, options
        found[f"descend {text}"] = kernels._descend, 8, {**types, **mode, "TILE": kernels._TILE}
        found[f"sums {text}"] = kernels._square_sums, 8, {"G": dtype, "ALIGNED": aligned, "TILE": kernels._TILE}
    found["averages"] = kernels._averages, 8, {"TILE": kernels._TILE, "ROWS": kernels._ROWS}
    return found


def resources(binary: Any) -> str:
    """What the assembler says of registers and spills."""
    

def main() -> None:
    """Prints, for each case and architecture, vector accesses and spilled bytes."""
    report = {}
    for name, (kernel, warps, options) in cases().items():
        for architecture in (80, 90):
            assembly = compiled(kernel, architecture, warps, **options).asm["ptx"]
            vectors = len(re.findall(r"(?:ld|st)\.global(?:\.\w+)*\.v4", assembly))
            report[f"{name} sm_{architecture}"] = {"vectors": vectors}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
