// decode_attention: a task per tile of rows and KV head. The specification is kernels/decode_attention.py.
#include "decode.h"

#include <algorithm>
#include <vector>

#include "native.h"
#include "parallel.h"

namespace nb = nanobind;

namespace isomorph {
namespace {

using Array1i = nb::ndarray<const int64_t, nb::ndim<1>, nb::device::cpu, nb::c_contig>;

constexpr int64_t kQueriesPerTask = 32;

#define ISOMORPH_FN(isa) isa::decode_fn(storage)
DecodeFn decode_fn(Storage storage) { return ISOMORPH_OF_ISA(ISOMORPH_FN); }
#undef ISOMORPH_FN

// A cache [S, K, L, D], and the entries that each row attends to.
struct Cache {
    const Array &k, &v;
    const int64_t *slot, *len;

    Entries keys(int64_t row, int64_t head) const { return {heads_of(k), slot[row], head, k.stride(2), len[row]}; }
    Entries values(int64_t row, int64_t head) const { return {heads_of(v), slot[row], head, v.stride(2), len[row]}; }
    bool has_same_entries(int64_t row, int64_t other) const {
        return slot[row] == slot[other] && len[row] == len[other];
    }
};

struct Tile {
    int64_t first, num_rows;
};

// Tiles of at most rows_per_task adjacent rows with the same prompt.
std::vector<Tile> tiles_of(const Cache& prompt, int64_t num_rows, int64_t rows_per_task) {
    std::vector<Tile> tiles;
    for (int64_t row = 0; row < num_rows; ++row) {
        const bool joins =
            !tiles.empty() && tiles.back().num_rows < rows_per_task && prompt.has_same_entries(row, row - 1);
        if (joins) ++tiles.back().num_rows;
        else tiles.push_back({row, 1});
    }
    return tiles;
}

void decode_attention(Array q, Array k_prompt, Array v_prompt, Array1i prompt_slot, Array1i prompt_len, Array k_own,
                      Array v_own, Array1i own_slot, Array1i own_len, double scale, Array out) {
    const DecodeFn decode = decode_fn(storage_of(q, "decode_attention"));
    const Cache prompt = {k_prompt, v_prompt, prompt_slot.data(), prompt_len.data()};
    const Cache own = {k_own, v_own, own_slot.data(), own_len.data()};
    const int64_t num_rows = q.shape(0), num_kv_heads = k_prompt.shape(1), repeats = q.shape(1) / num_kv_heads;
    const int64_t rows_per_task = std::max<int64_t>(1, kQueriesPerTask / repeats);
    nb::gil_scoped_release release;
    const std::vector<Tile> tiles = tiles_of(prompt, num_rows, rows_per_task);
    int64_t longest[2] = {0, 0};
    for (int64_t row = 0; row < num_rows; ++row) {
        longest[0] = std::max(longest[0], prompt.len[row]), longest[1] = std::max(longest[1], own.len[row]);
    }
    const Scratch scratch(decode_scratch_bytes(rows_per_task * repeats, q.shape(2), longest[0], longest[1]));
    const Scratch own_entries(2 * rows_per_task * static_cast<int64_t>(sizeof(Entries)));
    for_each_task<1>(static_cast<int64_t>(tiles.size()) * num_kv_heads, [&](int64_t i, int64_t worker) noexcept {
        const Tile tile = tiles[i / num_kv_heads];
        const int64_t head = i % num_kv_heads;
        Entries* own_k = static_cast<Entries*>(own_entries.piece(worker));
        Entries* own_v = own_k + rows_per_task;
        for (int64_t g = 0; g < tile.num_rows; ++g) {
            own_k[g] = own.keys(tile.first + g, head), own_v[g] = own.values(tile.first + g, head);
        }
        DecodeTask task;
        task.num_rows = tile.num_rows, task.repeats = repeats, task.dim = q.shape(2), task.scale = scale;
        task.q = heads_of(q), task.out = heads_of(out);
        task.first_row = tile.first, task.first_head = head * repeats;
        task.prompt_k = prompt.keys(tile.first, head), task.prompt_v = prompt.values(tile.first, head);
        task.own_k = own_k, task.own_v = own_v;
        task.scratch = scratch.piece(worker);
        decode(task);
    });
}

}  // namespace

void bind_decode(nb::module_& module) {
    module.def("decode_attention", &decode_attention, nb::arg("q").noconvert(), nb::arg("k_prompt").noconvert(),
               nb::arg("v_prompt").noconvert(), nb::arg("prompt_slot").noconvert(), nb::arg("prompt_len").noconvert(),
               nb::arg("k_own").noconvert(), nb::arg("v_own").noconvert(), nb::arg("own_slot").noconvert(),
               nb::arg("own_len").noconvert(), nb::arg("scale"), nb::arg("out").noconvert());
}

}  // namespace isomorph
