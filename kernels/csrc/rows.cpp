// row_stats, row_gradient and draw_token: a task per row and block of columns; blocks of a row are merged in order.
#include "rows.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include <nanobind/stl/optional.h>

#include "native.h"
#include "parallel.h"

namespace nb = nanobind;

namespace isomorph {
namespace {

constexpr int64_t kFirstBlocks = 8;  // of a row, processed in order by one task, to have fewer phases in the gradient

using Matrix = nb::ndarray<nb::ndim<2>, nb::device::cpu>;
using Vector = nb::ndarray<nb::ndim<1>, nb::device::cpu, nb::c_contig>;
using MaybeVector = std::optional<Vector>;

template <typename A>
struct Body {
    decltype(&baseline::RowsBody<A>::z_at) z_at;
    decltype(&baseline::RowsBody<A>::stats) stats;
    decltype(&baseline::RowsBody<A>::gradient) gradient;
    decltype(&baseline::RowsBody<A>::draw) draw;
};

#define ISOMORPH_BODY(isa) \
    Body<A> { isa::RowsBody<A>::z_at, isa::RowsBody<A>::stats, isa::RowsBody<A>::gradient, isa::RowsBody<A>::draw }
template <typename A>
Body<A> body() {
    return ISOMORPH_OF_ISA(ISOMORPH_BODY);
}
#undef ISOMORPH_BODY

struct Rows {
    char* data;
    Storage type;
    int64_t num_rows, num_columns, item_bytes, row_bytes;  // row_bytes: from one row to the next

    explicit Rows(const Matrix& rows)
        : data(static_cast<char*>(rows.data())), type(storage_of(Array(rows), "a row kernel", true)), num_rows(rows.shape(0)),
          num_columns(rows.shape(1)), item_bytes(rows.dtype().bits / 8), row_bytes(rows.stride(0) * item_bytes) {
        if (num_columns > 1 && rows.stride(1) != 1) throw nb::value_error("rows must have stride 1 along V; call .contiguous() on them");
    }
    char* row(int64_t i) const { return data + i * row_bytes; }
    int64_t num_blocks() const { return (num_columns + kRowBlock - 1) / kRowBlock; }
    int64_t live(int64_t block) const { return std::min(kRowBlock, num_columns - block * kRowBlock); }
    const char* end() const { return row(num_rows - 1) + num_columns * item_bytes; }
};

template <typename A>
A* items(const Vector& values, int64_t size, const char* name) {
    if (values.dtype() != nb::dtype<A>() || static_cast<int64_t>(values.shape(0)) != size)
        throw nb::type_error((std::string(name) + " must have the dtype and length that belong to the rows").c_str());
    return static_cast<A*>(values.data());
}
template <typename A>
A* items(const MaybeVector& values, int64_t size, const char* name) {
    return values ? items<A>(*values, size, name) : nullptr;
}

// A NaN anywhere makes the sums NaN; a row with only -inf has sums 0.
BlockStats merge(const BlockStats* blocks, int64_t num_blocks) {
    BlockStats row = {-std::numeric_limits<double>::infinity(), 0, 0};
    for (int64_t b = 0; b < num_blocks; ++b) row.top = std::max(row.top, blocks[b].top);
    for (int64_t b = 0; b < num_blocks; ++b) {
        const bool empty = std::isinf(blocks[b].top) && blocks[b].top < 0;
        const double shift = empty ? 0.0 : blocks[b].top - row.top, scale = std::exp(shift);
        row.sum += scale * blocks[b].sum;
        row.weighted += scale * (blocks[b].weighted + blocks[b].sum * shift);
    }
    return row;
}

template <typename A>
void run_stats(const Rows& rows, const int64_t* target, const RowScale<A>& scale, A* logprob, A* entropy, A* lse) {
    const int64_t num_blocks = rows.num_blocks();
    const Body<A> run = body<A>();
    std::vector<BlockStats> blocks(rows.num_rows * num_blocks);
    for_each_task(rows.num_rows * num_blocks, [&](int64_t i, int64_t) noexcept {
        const int64_t block = i % num_blocks;
        blocks[i] = run.stats(rows.row(i / num_blocks), rows.type, block * kRowBlock, rows.live(block), scale);
    });
    for_each_task(rows.num_rows, [&](int64_t i, int64_t) noexcept {
        const BlockStats row = merge(&blocks[i * num_blocks], num_blocks);
        const double log_sum = std::log(row.sum), z = run.z_at(rows.row(i), rows.type, target[i], scale);
        logprob[i] = static_cast<A>((z - row.top) - log_sum);
        entropy[i] = static_cast<A>(log_sum - row.weighted / row.sum);
        // as torch.logsumexp: of -inf only log_sum is -inf, with a NaN it is NaN
        lse[i] = static_cast<A>(std::isinf(row.top) && row.top > 0 ? row.top : row.top + log_sum);
    });
}

// Whether blocks of out overlap other blocks of the same row: out is narrower and starts where the rows start. Then
// block b of out covers half of block b / 2 of the row. The only other overlap that is allowed is out = logits, where
// each block covers itself.
bool covers_other_blocks(const Rows& rows, const Rows& out) {
    if (rows.num_rows == 0 || rows.num_columns == 0 || out.data >= rows.end() || rows.data >= out.end()) return false;
    const bool same_rows = out.data == rows.data && (rows.num_rows == 1 || out.row_bytes == rows.row_bytes);
    if (!same_rows || out.item_bytes > rows.item_bytes)
        throw nb::value_error("row_gradient: out must be the logits, the first half of each of their rows, or other memory");
    return out.item_bytes < rows.item_bytes;
}

template <typename A>
void run_gradient(const Rows& rows, const Rows& out, const std::vector<RowGradient<A>>& grads,
                  const RowScale<A>& scale, const Body<A>& run, bool in_order) {
    const int64_t num_blocks = rows.num_blocks();
    const auto one_block = [&](int64_t row, int64_t block) noexcept {
        run.gradient(rows.row(row), rows.type, block * kRowBlock, rows.live(block), scale, grads[row], out.row(row),
                     out.type);
    };
    // In order: one task processes the first blocks of a row one after the other, so block b is written after b / 2 was
    // read. Then the blocks [first, 2 first) can be written concurrently, because they overlap blocks before first.
    int64_t first = 0, last = num_blocks;
    if (in_order) {
        first = std::min(kFirstBlocks, num_blocks);
        for_each_task(rows.num_rows, [&](int64_t row, int64_t) noexcept {
            for (int64_t block = 0; block < first; ++block) one_block(row, block);
        });
        last = std::min(2 * first, num_blocks);
    }
    while (first < num_blocks) {
        const int64_t num = last - first;
        for_each_task(rows.num_rows * num,
                      [&](int64_t i, int64_t) noexcept { one_block(i / num, first + i % num); });
        first = last, last = std::min(2 * first, num_blocks);
    }
}

template <typename A>
void stats_as(const Rows& rows, const Vector& target, const MaybeVector& bias, double inv_temperature,
              const Vector& logprob, const Vector& entropy, const Vector& lse) {
    const int64_t n = rows.num_rows;
    const RowScale<A> scale = {items<A>(bias, rows.num_columns, "bias"), static_cast<A>(inv_temperature)};
    const auto* ids = items<int64_t>(target, n, "target");
    A* out[3] = {items<A>(logprob, n, "logprob"), items<A>(entropy, n, "entropy"), items<A>(lse, n, "lse")};
    nb::gil_scoped_release release;
    run_stats<A>(rows, ids, scale, out[0], out[1], out[2]);
}

void row_stats(Matrix logits, Vector target, MaybeVector bias, double inv_temperature, Vector logprob, Vector entropy,
               Vector lse) {
    const Rows rows(logits);
    const auto run = rows.type == Storage::kFloat64 ? stats_as<double> : stats_as<float>;
    run(rows, target, bias, inv_temperature, logprob, entropy, lse);
}

template <typename A>
void gradient_as(const Rows& rows, const Vector& target, const Vector& logprob, const Vector& entropy,
                 const MaybeVector (&grads)[3], const MaybeVector& bias, double inv_temperature, const Rows& out) {
    const int64_t n = rows.num_rows;
    const RowScale<A> scale = {items<A>(bias, rows.num_columns, "bias"), static_cast<A>(inv_temperature)};
    const auto* ids = items<int64_t>(target, n, "target");
    const A *lp = items<A>(logprob, n, "logprob"), *ent = items<A>(entropy, n, "entropy");
    const A *dlp = items<A>(grads[0], n, "dlogprob"), *dent = items<A>(grads[1], n, "dentropy");
    const A* dlse = items<A>(grads[2], n, "dlse");
    const bool in_order = covers_other_blocks(rows, out);
    nb::gil_scoped_release release;
    const Body<A> run = body<A>();
    std::vector<RowGradient<A>> row(n);  // reads z of the targets before they are overwritten
    for (int64_t i = 0; i < n; ++i) {
        row[i] = {run.z_at(rows.row(i), rows.type, ids[i], scale), lp[i], ent[i], dlp ? dlp[i] : A(0),
                  dent ? dent[i] : A(0), dlse ? dlse[i] : A(0), ids[i]};
        if (row[i].z_target == -std::numeric_limits<A>::infinity()) row[i].z_target = A(0);  // logprob is -lse then
        if (!dent) row[i].entropy = A(0);  // an unused entropy may be NaN
    }
    run_gradient<A>(rows, out, row, scale, run, in_order);
}

void row_gradient(Matrix logits, Vector target, Vector logprob, Vector entropy, MaybeVector dlogprob,
                  MaybeVector dentropy, MaybeVector dlse, MaybeVector bias, double inv_temperature, Matrix out) {
    const Rows rows(logits), to(out);
    const bool wide = rows.type == Storage::kFloat64;
    if (to.num_rows != rows.num_rows || to.num_columns != rows.num_columns || wide != (to.type == Storage::kFloat64))
        throw nb::type_error("row_gradient: out must have the shape of the logits, and be float64 where they are");
    const MaybeVector grads[3] = {dlogprob, dentropy, dlse};
    const auto run = wide ? gradient_as<double> : gradient_as<float>;
    run(rows, target, logprob, entropy, grads, bias, inv_temperature, to);
}

// One token per row: the column with the largest z + Gumbel noise, the first of equal ones.
template <typename A>
void run_draw(const Rows& rows, const int64_t* rng_key, const int64_t* position, const RowScale<A>& scale, int64_t* token,
              A* logprob) {
    const int64_t num_blocks = rows.num_blocks();
    const Body<A> run = body<A>();
    std::vector<BlockDraw> draws(rows.num_rows * num_blocks);
    for_each_task(rows.num_rows * num_blocks, [&](int64_t i, int64_t) noexcept {
        const int64_t row = i / num_blocks, block = i % num_blocks;
        draws[i] = run.draw(rows.row(row), rows.type, block * kRowBlock, rows.live(block), scale, rng_key[row],
                            position[row]);
    });
    for_each_task(rows.num_rows, [&](int64_t i, int64_t) noexcept {
        const BlockDraw* blocks = &draws[i * num_blocks];
        const BlockDraw* best = blocks;
        double top = blocks->top, sum = 0;
        for (int64_t b = 1; b < num_blocks; ++b) {
            if (blocks[b].score > best->score) best = blocks + b;
            top = std::max(top, blocks[b].top);
        }
        const bool empty = std::isinf(top) && top < 0;
        for (int64_t b = 0; b < num_blocks; ++b) sum += std::exp(empty ? 0.0 : blocks[b].top - top) * blocks[b].sum;
        token[i] = best->column;
        logprob[i] = static_cast<A>((best->z - top) - std::log(sum));
    });
}

template <typename A>
void draw_as(const Rows& rows, const Vector& rng_key, const Vector& position, double inv_temperature, const Vector& token,
             const Vector& logprob) {
    const int64_t n = rows.num_rows;
    const RowScale<A> scale = {nullptr, static_cast<A>(inv_temperature)};
    const auto *keys = items<int64_t>(rng_key, n, "rng_key"), *positions = items<int64_t>(position, n, "position");
    auto* tokens = items<int64_t>(token, n, "token");
    A* out = items<A>(logprob, n, "logprob");
    nb::gil_scoped_release release;
    run_draw<A>(rows, keys, positions, scale, tokens, out);
}

void draw_token(Matrix logits, Vector rng_key, Vector position, double inv_temperature, Vector token, Vector logprob) {
    const Rows rows(logits);
    const auto run = rows.type == Storage::kFloat64 ? draw_as<double> : draw_as<float>;
    run(rows, rng_key, position, inv_temperature, token, logprob);
}

}  // namespace

void bind_rows(nb::module_& module) {
    module.def("row_stats", &row_stats, nb::arg("logits").noconvert(), nb::arg("target").noconvert(),
               nb::arg("bias").none(), nb::arg("inv_temperature"), nb::arg("logprob").noconvert(),
               nb::arg("entropy").noconvert(), nb::arg("lse").noconvert());
    module.def("row_gradient", &row_gradient, nb::arg("logits").noconvert(), nb::arg("target").noconvert(),
               nb::arg("logprob").noconvert(), nb::arg("entropy").noconvert(), nb::arg("dlogprob").none(),
               nb::arg("dentropy").none(), nb::arg("dlse").none(), nb::arg("bias").none(), nb::arg("inv_temperature"),
               nb::arg("out").noconvert());
    module.def("draw_token", &draw_token, nb::arg("logits").noconvert(), nb::arg("rng_key").noconvert(),
               nb::arg("position").noconvert(), nb::arg("inv_temperature"), nb::arg("token").noconvert(),
               nb::arg("logprob").noconvert());
}

}  // namespace isomorph
