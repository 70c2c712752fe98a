"""What the Gluon kernels here share: names that differ between Triton 3.6 and 3.9, and a few device functions."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

# TODO: drop the branches for 3.6 once we require triton>=3.9
if hasattr(gl, "thread_barrier"):  # 3.6

    @gluon.jit
    def group_barrier():
        """All threads of this partition."""
        gl.thread_barrier()

else:

    @gluon.jit
    def group_barrier():
        gl.barrier()


if hasattr(gl.shared_memory_descriptor, "reinterpret"):  # 3.9

    @gluon.jit
    def as_box(buffer, desc):
        """The same shared memory in the shape of another descriptor's box."""
        return buffer.reinterpret(desc.dtype, desc.block_type.shape, desc.layout)

else:

    @gluon.jit
    def as_box(buffer, desc):
        return buffer._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)


@gluon.jit
def gdc_wait():
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def gdc_launch_dependents():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def silu_mul(gate, up, dtype: gl.constexpr):
    """As in cna_kernels.triton.tiles: fp32, rounded once."""
    below = 1.0 + gl.exp2(gate * -1.4426950408889634)
    silu = gl.inline_asm_elementwise(
        "div.approx.f32 $0, $1, $2;", "=f,f,f", [gate, below], dtype=gl.float32, is_pure=True, pack=1
    )
    return (silu * up).to(dtype)


@gluon.jit
def grouped_tile(tile, tiles_t, tiles_n, GROUP_T: gl.constexpr):
    """(i, j) of output tile number ``tile``, as in cna_kernels.triton.down_proj."""
    first = tile // (GROUP_T * tiles_n) * GROUP_T
    rows = gl.minimum(tiles_t - first, GROUP_T)
    within = tile % (GROUP_T * tiles_n)
    return first + within % rows, within // rows


def descriptor(x, block):
    """x in boxes of ``block``, swizzled as wgmma reads them."""
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float16 if x.element_size() == 2 else gl.float32)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)
