"""The sm_90 instructions of the CUDA-on-CPU harness: against numpy, against CuTe, and with planted faults."""

import ctypes
import re

import numpy as np
import pytest
from harness_tools import ROOT, SEEDS, harness_build, needs_harness, needs_nvcc, run_nvcc, run_script
from outer_norm_on_cpu import encode

HERE = r"csrc/harness/tests/sm90_kernels\.cu:\d+"
WRAPPERS = r"csrc/cuda/contract_sm90/ptx_sm90\.cuh:\d+"
TESTS = ROOT / "csrc/harness/tests"
SOURCES = ["harness/tests/sm90_kernels.cu", "cuda/contract_sm90/tensor_map.cpp"]


@pytest.fixture(params=SEEDS)
def seed(request, monkeypatch):
    monkeypatch.setenv("CUDA_ON_CPU_SEED", str(request.param))
    return request.param


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def aligned(values, alignment=64):
    """A copy whose data is aligned."""
    raw = np.zeros(values.nbytes + alignment, np.uint8)
    offset = -raw.ctypes.data % alignment
    result = raw[offset : offset + values.nbytes].view(values.dtype).reshape(values.shape)
    result[...] = values
    return result


def load(path):
    library = ctypes.CDLL(str(path))
    library.cuda_on_cpu_last_error.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def run_kernel():
    """Runs a kernel of sm90_kernels.cu by name on a tensor [N, T, channels]; returns None or the harness' error."""
    library = load(harness_build.build(SOURCES))

    def run(name, tensor, out, corner=(0, 0, 0)):
        tensor = aligned(tensor)
        sizes = np.array([*tensor.shape, *corner], np.int32)
        status = library.run_sm90_kernel(name.encode(), pointer(tensor), pointer(sizes), pointer(out))
        assert status in (0, 1), f"status {status}"
        return library.cuda_on_cpu_last_error().decode() if status else None

    return run


ONES = encode(np.ones((1, 64, 64)), "bfloat16")


@needs_harness
def test_memory_barriers(run_kernel, seed):
    out = np.zeros((2, 8), np.float32)
    assert run_kernel("ping_pong", ONES, out) is None
    np.testing.assert_array_equal(out, np.stack([np.arange(1, 9) ** 2] * 2))


@needs_harness
@pytest.mark.parametrize("corner", [(0, 0, 0), (64, 0, 1), (128, 64, 2), (8, 60, 1), (256, 0, 0), (0, 200, 0)])
def test_copies_are_swizzled_and_zero_filled(run_kernel, seed, corner):
    tensor = np.random.default_rng(0).integers(1, 2**16, (3, 100, 136), dtype=np.uint16)
    out = np.full((64, 64), 7, np.uint16)
    assert run_kernel("copy_one_box", tensor, out, corner) is None
    padded = np.zeros((3, 400, 400), np.uint16)
    padded[:, :100, :136] = tensor
    x, y, z = corner
    box = padded[z, y : y + 64, x : x + 64].reshape(64, 8, 8)  # rows of eight pieces of 16 bytes
    row, piece = np.meshgrid(np.arange(64), np.arange(8), indexing="ij")
    np.testing.assert_array_equal(out.reshape(64, 8, 8)[row, piece ^ row % 8], box)


@needs_harness
def test_election_and_branches(run_kernel, seed):
    out = np.zeros(32, np.int32)
    assert run_kernel("elections", ONES, out) is None
    assert sorted(out) == [2] * 31 + [3]
    assert run_kernel("branches", ONES, out) is None
    np.testing.assert_array_equal(out, np.where(np.arange(32) == 5, 3, 4))


@needs_harness
def test_product(run_kernel, seed):
    out = np.zeros(128, np.float32)
    assert run_kernel("product<kNone>", ONES, out) is None
    np.testing.assert_array_equal(out, np.full(128, 64))


@needs_harness
@pytest.mark.parametrize(
    "rank, sizes, strides, box, swizzle, valid",
    [
        (3, [72, 70, 3], [144, 10080], [64, 64, 1], 3, True),
        (2, [72, 70], [144], [64, 256], 3, True),
        (2, [72, 70], [144], [32, 8], 2, True),
        (2, [72, 70], [144], [8, 8], 0, True),
        (2, [72, 70], [144], [72, 8], 0, True),
        (2, [72, 70], [144], [64, 257], 3, False),  # larger than any box
        (2, [72, 70], [144], [128, 64], 3, False),  # wider than the swizzle
        (2, [72, 70], [144], [64, 64], 2, False),
        (2, [72, 70], [144], [4, 64], 0, False),  # 8 bytes
        (2, [76, 70], [152], [64, 64], 3, False),  # rows not at multiples of 16 bytes
        (2, [72, 70], [128], [64, 64], 3, False),  # rows overlap
        (3, [72, 70, 3], [144, 144], [64, 64, 1], 3, False),  # samples overlap
        (2, [0, 70], [144], [64, 64], 3, False),
        (2, [72, 70], [1 << 40], [64, 64], 3, False),
        (6, [8] * 6, [16] * 5, [8] * 6, 0, False),
    ],
)
def test_tensor_maps_follow_the_rules(rank, sizes, strides, box, swizzle, valid):
    library = load(harness_build.build(SOURCES))
    data = aligned(np.zeros(64, np.uint8))
    arrays = [np.array(sizes, np.uint64), np.array(strides, np.uint64), np.array(box, np.uint32)]
    for offset in (0, 8):
        status = library.encode_sm90_map(
            ctypes.c_void_p(data.ctypes.data + offset), rank, *map(pointer, arrays), swizzle
        )
        assert (status == 0) == (valid and offset == 0)


# ---- faults that the harness must report ----

REPORTS = {
    "product<kFewerBytes>": rf"deadlock: \d+ threads in mbarrier.try_wait at {WRAPPERS}",
    "product<kMoreBytes>": rf"deadlock: \d+ threads in mbarrier.try_wait at {WRAPPERS}",
    "product<kNoFence>": rf"wgmma on registers that no wgmma.fence has ordered .* at {WRAPPERS}",
    "product<kTouchedAccumulator>": rf"an accumulator was written while a wgmma .* at {WRAPPERS}",
    "product<kRefill>": rf"an operand in shared memory changed while a wgmma in flight read it at {WRAPPERS}",
    "product<kDifferentDescriptors>": rf"descriptors or scale-d differ between the threads .* at {WRAPPERS}",
    "product<kReservedBits>": rf"reserved bits of a matrix descriptor are set at {WRAPPERS}",
    "product<kExitInFlight>": r"a thread exited without waiting for its wgmma instructions",
    "barrier_not_initialised": rf"the mbarrier is used before mbarrier.init at {WRAPPERS}",
    "too_many_arrivals": rf"more arrivals at the mbarrier than one phase expects at {HERE}",
    "misaligned_barrier": rf"PTX: misaligned mbarrier: mbarrier.init.* at {WRAPPERS}",
    "barrier_overwritten": rf"the mbarrier is used before mbarrier.init at {WRAPPERS}",
    "fence_forgotten": rf"initialised without a fence.mbarrier_init .* at {WRAPPERS}",
    "box_misaligned": rf"the shared address is not 128-byte aligned at {WRAPPERS}",
    "box_past_shared_memory": rf"shared-memory address out of range at {WRAPPERS}",
    "block_ends_before_its_copy": rf"the block ended before a copy into its shared memory, issued at {WRAPPERS}",
    "no_tensor_map": rf"not a tensor map at {WRAPPERS}",
    "wrong_register_count": rf"the register count must be a multiple of 8 .* at {HERE}",
    "half_a_warpgroup": rf"wgmma needs four whole warps at {WRAPPERS}",
}
WRONG_RESULTS = ["product<kNoCopyWait>", "product<kWrongParity>", "product<kNoProductWait>", "wait_without_a_loop"]


@needs_harness
@pytest.mark.parametrize("kernel", REPORTS)
def test_faults_are_reported(run_kernel, seed, kernel):
    error = run_kernel(kernel, ONES, np.zeros(128, np.float32))
    assert error and re.search(REPORTS[kernel], error), error


@needs_harness
@pytest.mark.parametrize("kernel", WRONG_RESULTS)
def test_faults_make_wrong_results(run_kernel, kernel, monkeypatch):
    """Or are reported; but a copy may come early enough, and a wait may happen not to give up."""
    caught = 0
    for seed in range(20):
        monkeypatch.setenv("CUDA_ON_CPU_SEED", str(seed))
        out = np.zeros(128, np.float32)
        caught += run_kernel(kernel, ONES, out) is not None or not np.array_equal(out, np.full(128, 64))
    assert caught >= 18


@needs_harness
def test_all_kernels_are_tested():
    names = re.findall(r"^  CASE\(([\w<>]+),", (TESTS / "sm90_kernels.cu").read_text(), re.M)
    correct = {"ping_pong", "copy_one_box", "elections", "branches", "product<kNone>"}
    assert set(names) == {*REPORTS, *WRONG_RESULTS, *correct}


# ---- against CuTe ----

needs_cutlass = pytest.mark.skipif(
    harness_build.cutlass_include_folder() is None, reason="CUTLASS is missing: pip install --no-deps nvidia-cutlass"
)
CUTE_SOURCE = TESTS / "sm90_cute.cu"
# (element, columns, A's swizzle and major, B's, order of the atoms)
PRODUCTS = re.findall(r"^  PRODUCT\((\w+), (\d+), (\w+), (\w+), (\w+), (\w+), (\w+)\)", CUTE_SOURCE.read_text(), re.M)


@pytest.fixture(scope="module")
def cute():
    sources = ["harness/tests/sm90_cute.cu", "cuda/contract_sm90/tensor_map.cpp"]
    return load(harness_build.build(sources, cutlass=True))


@needs_harness
@needs_cutlass
@pytest.mark.parametrize("config", PRODUCTS, ids="-".join)
def test_wgmma_agrees_with_cute(cute, config):
    """Operands by CuTe's layouts and descriptors, accumulators by its partitioning: all as the harness has them."""
    element, columns, a_atom, a_major, b_atom, b_major, order = config
    dtype = {"bfloat16_t": "bfloat16", "half_t": "float16"}[element]
    name = f"{element}_{columns}_{a_major}_{a_atom}_{b_major}_{b_atom}_{order}"
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 10, (64, 64)), rng.integers(-9, 10, (int(columns), 64))
    out, misplaced = np.full((64, int(columns)), np.nan, np.float32), np.full(2, -1, np.int32)
    halves = [encode(x.astype(np.float64), dtype) for x in (a, b)]
    status = cute.run_cute_product(name.encode(), *map(pointer, (*halves, out, misplaced)))
    assert status == 0, cute.cuda_on_cpu_last_error().decode()
    np.testing.assert_array_equal(out, a @ b.T)
    np.testing.assert_array_equal(misplaced, 0)


@needs_harness
@needs_cutlass
@pytest.mark.parametrize("is_half", [0, 1])
def test_our_descriptors_are_those_of_cute(cute, is_half):
    differences = np.zeros(3, np.int32)
    assert cute.compare_descriptors(is_half, pointer(differences)) == 0, cute.cuda_on_cpu_last_error().decode()
    np.testing.assert_array_equal(differences, 0)


@needs_harness
@needs_cutlass
@pytest.mark.parametrize("tile", [(0, 0, 0), (1, 2, 2), (1, 0, 1), (0, 2, 1)])
@pytest.mark.parametrize("is_half", [0, 1])
def test_our_tensor_maps_are_those_of_cute(cute, is_half, tile, seed):
    """CuTe makes the same map for the tensor, and its copies lay the tile where its layout of shared memory says."""
    n, t, c, rows, row = 3, 150, 200, 160, 208
    values = np.random.default_rng(1).standard_normal((n, rows, row))
    data = aligned(encode(values, "float16" if is_half else "bfloat16").view(np.uint16))
    out, differs = np.full((128, 64), 7, np.uint16), np.full(1, -1, np.int32)
    sizes = np.array([c, t, n, row, rows * row, *tile], np.int32)
    status = cute.run_cute_tensor_copy(is_half, *map(pointer, (data, sizes, differs, out)))
    assert status == 0, cute.cuda_on_cpu_last_error().decode()
    assert differs[0] == 0
    padded = np.zeros((n, 192, 256), np.uint16)
    padded[:, :t, :c] = data[:, :t, :c]
    columns, positions, sample = tile
    expected = padded[sample, positions * 64 : positions * 64 + 64, columns * 128 : columns * 128 + 128].T
    np.testing.assert_array_equal(out, expected)


@needs_cutlass
@pytest.mark.parametrize("element", ["bf16", "f16"])
def test_our_wgmma_is_that_of_cute(element):
    """The text of the instruction and its operands' order."""

    def statement(source, start):
        body = source[source.index("asm volatile(", source.index(start)) :]
        text = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', body[: body.index("memory" if "memory" in body else ");")]))
        text = text[: text.index("+f")] if "+f" in text else text
        return "".join(text.replace("\\n", "").split())

    name = {"bf16": "BF16BF16", "f16": "F16F16"}[element]
    header = (harness_build.cutlass_include_folder() / "cute/arch/mma_sm90_gmma.hpp").read_text()
    theirs = statement(header, f"struct MMA_64x128x16_F32{name}_SS")
    source = (ROOT / "csrc/cuda/contract_sm90/ptx_sm90.cuh").read_text()
    branch = source[source.index("void wgmma(") :]
    ours = statement(branch if element == "bf16" else branch[branch.index("} else {") :], "asm")
    for operand in ("%67", "%68", "%69", "%70"):  # scales of A and B, and their majors: MN is 1
        theirs = theirs.replace(operand, "1")
    assert ours == theirs and f"f32.{element}.{element}" in ours


# ---- sanitizers, nvcc ----


@needs_harness
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_accept_correct_kernels(sanitizer, tmp_path):
    library = harness_build.build(SOURCES, sanitizer=sanitizer)
    script = tmp_path / "run_all.py"
    script.write_text("""
import ctypes, sys
import numpy as np
library = ctypes.CDLL(sys.argv[1])
library.cuda_on_cpu_last_error.restype = ctypes.c_char_p
tensor = np.zeros((1, 64, 64), np.uint16)
for name in sys.argv[2:]:
    sizes, out = np.array([1, 64, 64, 0, 0, 0], np.int32), np.zeros(4096, np.uint16)
    status = library.run_sm90_kernel(name.encode(), *[ctypes.c_void_p(b.ctypes.data) for b in (tensor, sizes, out)])
    assert status == 0, (name, library.cuda_on_cpu_last_error())
""")
    done = run_script(script, library, "ping_pong", "copy_one_box", "elections", sanitizer=sanitizer)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_nvcc
def test_nvcc_accepts_the_kernels(tmp_path):
    architecture = "-gencode=arch=compute_90a,code=sm_90a"
    run_nvcc("-O1", architecture, "-c", TESTS / "sm90_kernels.cu", "-o", tmp_path / "sm90_kernels.o")
