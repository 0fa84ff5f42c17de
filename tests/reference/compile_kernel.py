"""Compile the GPU kernel for a compute capability, without a GPU; print the size of the code.

python tests/reference/compile_kernel.py 90 4 bf16
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from agcl.attribution.kernels import gpu

capability, num_kept, kept_in = sys.argv[1:]
tile = {"num_kept": int(num_kept)} | {
    f"tile_{name}": size
    for name, size in zip(
        ("rows", "columns", "tokens"),
        (gpu._ROWS, gpu._COLUMNS, gpu._TOKENS),
        strict=True,
    )
}
kinds = {"values": f"*{kept_in}", "weight": "*fp32", "x": "*fp32", "g": "*fp32"}
signature = {
    name: "constexpr" if name in tile else kinds.get(name, "i32") for name in gpu._insert.arg_names
}
compiled = triton.compile(
    ASTSource(fn=gpu._insert, signature=signature, constexprs=tile),
    target=GPUTarget("cuda", int(capability), 32),
    options={"num_warps": gpu._WARPS},
)
print(len(compiled.asm["cubin"]))
