"""How many rows of logits the learner computes at a time; the planner needs it, too."""

from isomorph.kernels.linear_chunks import whole_rows

CPU_CHUNK_BYTES = 64 * 2**20  # of float32 logits; a larger chunk leaves the caches and only costs memory
CUDA_CHUNK_ROWS = 8192  # with fewer rows the weight gradient's reads and writes take longer than its GEMM


def logits_chunk_rows(num_vocab: int, *, is_gpu: bool) -> int:
    """Number of rows [V] in one chunk of logits."""
    return CUDA_CHUNK_ROWS if is_gpu else whole_rows(CPU_CHUNK_BYTES // (4 * num_vocab))
