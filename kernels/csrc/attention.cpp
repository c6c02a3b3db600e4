// packed_attention: a task per tile of tokens and KV head; in the backward, per group and query head. The specification
// is kernels/packed_attention.py.
#include "attention.h"

#include <algorithm>
#include <vector>

#include "native.h"
#include "parallel.h"

namespace nb = nanobind;

namespace isomorph {
namespace {

using Segments = nb::ndarray<const int64_t, nb::shape<-1, 4>, nb::device::cpu, nb::c_contig>;

#define ISOMORPH_FNS(isa) isa::attention_fns(storage)
AttentionFns attention_fns(Storage storage) { return ISOMORPH_OF_ISA(ISOMORPH_FNS); }
#undef ISOMORPH_FNS

Attention task_of(const Array& q, const Array& k, const Array& v, const Segments& segments, double scale,
                  const Array& out, const Array& lse) {
    static_assert(sizeof(Segment) == 4 * sizeof(int64_t));
    Attention task = {};
    task.segments = reinterpret_cast<const Segment*>(segments.data());
    task.num_heads = q.shape(1), task.repeats = q.shape(1) / k.shape(1), task.dim = q.shape(2);
    task.scale = scale;
    task.q = heads_of(q), task.k = heads_of(k), task.v = heads_of(v), task.out = heads_of(out);
    task.lse = lse.data();
    return task;
}

struct Range {
    int64_t segment, first, last;
};

void attend(Array q, Array k, Array v, Segments segments, double scale, Array out, Array lse) {
    const AttentionFns fns = attention_fns(storage_of(q, "packed_attention"));
    const Attention task = task_of(q, k, v, segments, scale, out, lse);
    const int64_t num_segments = segments.shape(0), num_kv_heads = k.shape(1);
    nb::gil_scoped_release release;
    const int64_t tokens = std::max<int64_t>(1, kQueries / task.repeats);
    std::vector<Range> tiles;
    for (int64_t s = 0; s < num_segments; ++s) {
        const Segment& segment = task.segments[s];
        for (int64_t first = segment.start; first < segment.end; first += tokens) {
            tiles.push_back({s, first, std::min(first + tokens, segment.end)});
        }
    }
    const Scratch scratch(attention_scratch_bytes(task.dim, task.repeats));
    for_each_task<1>(static_cast<int64_t>(tiles.size()) * num_kv_heads, [&](int64_t i, int64_t worker) noexcept {
        const Range& tile = tiles[i / num_kv_heads];
        fns.forward(task, tile.segment, tile.first, tile.last, i % num_kv_heads, scratch.piece(worker));
    });
}

void attend_backward(Array dout, Array q, Array k, Array v, Array out, Array lse, Segments segments, double scale,
                     Array delta, Array dq, Array dk, Array dv) {
    const AttentionFns fns = attention_fns(storage_of(q, "packed_attention"));
    Attention task = task_of(q, k, v, segments, scale, out, lse);
    task.dout = heads_of(dout);
    task.delta = delta.data(), task.dq = heads_of(dq), task.dk = heads_of(dk), task.dv = heads_of(dv);
    const int64_t num_segments = segments.shape(0);
    nb::gil_scoped_release release;
    std::vector<Range> groups;
    for (int64_t s = 0; s < num_segments; ++s) {
        if (task.segments[s].parent < 0) groups.push_back({s, s, s});
        groups.back().last = s + 1;
    }
    const int64_t num_groups = static_cast<int64_t>(groups.size());
    const Scratch scratch(attention_scratch_bytes(task.dim, task.repeats));
    for_each_task<1>(num_groups, [&](int64_t i, int64_t) noexcept {
        fns.delta(task, task.segments[groups[i].first].start, task.segments[groups[i].last - 1].end);
    });
    for_each_task<1>(num_groups * task.num_heads, [&](int64_t i, int64_t worker) noexcept {
        const Range& group = groups[i / task.num_heads];
        fns.backward(task, group.first, group.last, i % task.num_heads, scratch.piece(worker));
    });
}

}  // namespace

void bind_attention(nb::module_& module) {
    module.def("packed_attention", &attend, nb::arg("q").noconvert(), nb::arg("k").noconvert(), nb::arg("v").noconvert(),
               nb::arg("segments").noconvert(), nb::arg("scale"), nb::arg("out").noconvert(), nb::arg("lse").noconvert());
    module.def("packed_attention_backward", &attend_backward, nb::arg("dout").noconvert(), nb::arg("q").noconvert(),
               nb::arg("k").noconvert(), nb::arg("v").noconvert(), nb::arg("out").noconvert(), nb::arg("lse").noconvert(),
               nb::arg("segments").noconvert(), nb::arg("scale"), nb::arg("delta").noconvert(), nb::arg("dq").noconvert(),
               nb::arg("dk").noconvert(), nb::arg("dv").noconvert());
}

}  // namespace isomorph
