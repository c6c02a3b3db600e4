// bit_hash: memory-bound. The specification is kernels/bit_hash.py. Sums modulo 2**64 do not depend on their order.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "native.h"
#include "parallel.h"

namespace nb = nanobind;

namespace isomorph {
namespace {

constexpr int64_t kWords = 16, kBlockBytes = kWords * 8;
constexpr int64_t kAlone = 4096;  // blocks: up to this many, one thread is faster than several
constexpr int64_t kPiece = 512;   // blocks per task

uint64_t block_sum(const uint8_t* bytes) {
    uint64_t word[kWords], sum = 0;
    std::memcpy(word, bytes, kBlockBytes);  // the address may be unaligned
    for (const uint64_t w : word) sum += w;
    return sum;
}

uint64_t weight(int64_t block) { return 2 * static_cast<uint64_t>(block) + 1; }

void bit_hash(Array1<const uint8_t> value, Array1<int64_t> out) {
    const nb::gil_scoped_release release;
    const uint8_t* bytes = value.data();
    const int64_t num_bytes = static_cast<int64_t>(value.shape(0)), num_blocks = num_bytes / kBlockBytes;
    const int64_t piece = num_blocks > kAlone ? kPiece : kAlone, num_pieces = (num_blocks + piece - 1) / piece;
    std::vector<uint64_t> sums(num_pieces);
    for_each_task(num_pieces, [&](int64_t i, int64_t) noexcept {
        uint64_t sum = 0;
        for (int64_t block = i * piece; block < std::min((i + 1) * piece, num_blocks); ++block) {
            sum += weight(block) * block_sum(bytes + block * kBlockBytes);
        }
        sums[i] = sum;
    });
    uint64_t total = std::accumulate(sums.begin(), sums.end(), uint64_t{0});
    if (const int64_t rest = num_bytes % kBlockBytes) {
        uint8_t last[kBlockBytes] = {};
        std::memcpy(last, bytes + num_blocks * kBlockBytes, rest);
        total += weight(num_blocks) * block_sum(last);
    }
    std::memcpy(out.data(), &total, sizeof(total));
}

}  // namespace

void bind_bit_hash(nb::module_& module) {
    module.def("bit_hash", &bit_hash, nb::arg("value").noconvert(), nb::arg("out").noconvert());
}

}  // namespace isomorph
