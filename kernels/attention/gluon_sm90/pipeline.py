"""The loading half of the Gluon kernel: which key block comes next, and the shared-memory rings that one warp fills.

A ring has STAGES places, each with a barrier that says `full` and one that says `empty`. A place of the first ring
holds 128 keys, one of the second 128 values; behind the kept blocks the same places carry pools: 128 keys, and 128
16-bit values, for which 8-bit ones leave room in two places.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ...core.settled import settle

# Keys of a block, keys of a step.
BLOCK = gl.constexpr(64)
PAIR = gl.constexpr(128)
K_FULL, K_EMPTY, V_FULL, V_EMPTY = (gl.constexpr(i) for i in range(4))


@gluon.jit
def bar(bars, WHICH: gl.constexpr, index):
    """One barrier."""
    return bars[WHICH].index(index)


@gluon.jit
def next_place(place, STAGES: gl.constexpr):
    """The place in a ring behind `place`, (stage, phase)."""
    stage = place[0] + 1
    wrapped = stage == STAGES
    return gl.where(wrapped, 0, stage), gl.where(wrapped, place[1] ^ 1, place[1])


@gluon.jit
def block_at(plan, i, LISTED: gl.constexpr, FULL: gl.constexpr = False):
    """Key block at place i of this row's list; behind the list its last block again. FULL: it is a full block."""
    blocks, full, count, full_grid, ragged_grid, k_blocks_grid, k_blocks = plan
    if not FULL:
        i = gl.minimum(i, count - 1)
    if LISTED:
        block = gl.load(blocks + i).to(gl.int32)
    else:
        block = i + gl.where(i >= full_grid, ragged_grid, 0)
        if not FULL:
            ragged = gl.where((i == full) & (ragged_grid > 0), k_blocks_grid - 1, k_blocks - 1)
            block = gl.where(i >= full, ragged, block)
    return block


@gluon.jit
def both_blocks(ring, stage, DTYPE: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """The two blocks `[ROWS, COLUMNS]` of a place."""
    halves = ring.index(stage)._reinterpret(DTYPE, [2, ROWS, COLUMNS], LAYOUT)
    return halves.index(0), halves.index(1)


@gluon.jit
def first_block(ring, stage, DTYPE: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """The start of a place as one block `[ROWS, COLUMNS]`."""
    return ring.index(stage)._reinterpret(DTYPE, [ROWS, COLUMNS], LAYOUT)


@gluon.jit
def _load_pair(source, first, second, ring, stage, full):
    """Two blocks of `source` `[blocks * rows, columns]` to one place."""
    ROWS: gl.constexpr = source.block_type.shape[0]
    COLUMNS: gl.constexpr = source.block_type.shape[1]
    TYPE: gl.constexpr = source.dtype
    LAYOUT: gl.constexpr = source.layout
    mbarrier.expect(full, 2 * source.block_type.nbytes)
    half0, half1 = both_blocks(ring, stage, TYPE, ROWS, COLUMNS, LAYOUT)
    tma.async_copy_global_to_shared(source, [first * ROWS, 0], full, half0)
    tma.async_copy_global_to_shared(source, [second * ROWS, 0], full, half1)


@gluon.jit
def _load_pools(source, block, ring, stage, full):
    """64 rows of pooled V to one place."""
    COLUMNS: gl.constexpr = source.block_type.shape[1]
    TYPE: gl.constexpr = source.dtype
    LAYOUT: gl.constexpr = source.layout
    mbarrier.expect(full, source.block_type.nbytes)
    place = first_block(ring, stage, TYPE, BLOCK, COLUMNS, LAYOUT)
    tma.async_copy_global_to_shared(source, [block * BLOCK, 0], full, place)


@gluon.jit
def produce(
    K, V, pooled_k, pooled_v, plan, buffers, bars, steps, pool_steps, block_base, pool_base,
    pools, LISTED: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: keys one step ahead of values, so one step of keys more than there are; likewise the pools."""
    keys, values = buffers[1], buffers[2]
    first = block_at(plan, 0, LISTED) + block_base
    second = block_at(plan, 1, LISTED) + block_base
    _load_pair(K, first, second, keys, 0, bar(bars, K_FULL, 0))
    v_place = (gl.to_tensor(0), gl.to_tensor(0))
    k_place = next_place(v_place, STAGES)
    for i in range(0, steps):
        next_first = block_at(plan, 2 * i + 2, LISTED) + block_base
        next_second = block_at(plan, 2 * i + 3, LISTED) + block_base
        mbarrier.wait(bar(bars, K_EMPTY, k_place[0]), k_place[1] ^ 1)
        _load_pair(K, next_first, next_second, keys, k_place[0], bar(bars, K_FULL, k_place[0]))
        mbarrier.wait(bar(bars, V_EMPTY, v_place[0]), v_place[1] ^ 1)
        _load_pair(V, first, second, values, v_place[0], bar(bars, V_FULL, v_place[0]))
        v_place = next_place(v_place, STAGES)
        k_place = next_place(k_place, STAGES)
        first = next_first
        second = next_second
    if TAIL:
        last = pool_base + (pools - 1) // BLOCK
        # The last of the keys comes once more than it is needed; the values stop in time.
        for i in range(0, gl.where(pool_steps > 0, pool_steps + 1, 0)):
            mbarrier.wait(bar(bars, K_EMPTY, k_place[0]), k_place[1] ^ 1)
            first = gl.minimum(pool_base + 2 * i, last)
            second = gl.minimum(pool_base + 2 * i + 1, last)
            _load_pair(pooled_k, first, second, keys, k_place[0], bar(bars, K_FULL, k_place[0]))
            k_place = next_place(k_place, STAGES)
            if i > 0:
                first = pool_base + 2 * i - 2
                second = gl.minimum(first + 1, last)
                mbarrier.wait(bar(bars, V_EMPTY, v_place[0]), v_place[1] ^ 1)
                if V.dtype.primitive_bitwidth == 8:
                    _load_pools(pooled_v, first, values, v_place[0], bar(bars, V_FULL, v_place[0]))
                    v_place = next_place(v_place, STAGES)
                    mbarrier.wait(bar(bars, V_EMPTY, v_place[0]), v_place[1] ^ 1)
                    _load_pools(pooled_v, second, values, v_place[0], bar(bars, V_FULL, v_place[0]))
                else:
                    _load_pair(pooled_v, first, second, values, v_place[0], bar(bars, V_FULL, v_place[0]))
                v_place = next_place(v_place, STAGES)


settle(globals())
