// A block is converted into a buffer in the L1 cache, processed there, and converted back. Only the number of lanes
// differs between instruction sets.
#include "rows.h"

#include "lanes.h"

namespace isomorph {
namespace ISOMORPH_ISA {
namespace {

constexpr int64_t kSums = 4;  // independent accumulators hide instruction latency
static_assert(kRowBlock % (kLanes * kSums) == 0);

template <typename T, typename A>
void read_as(const void* row, int64_t first, int64_t n, A* to) {
    const T* from = static_cast<const T*>(row) + first;
    for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}
template <typename T, typename A>
void write_as(const A* from, int64_t n, void* row, int64_t first) {
    T* to = static_cast<T*>(row) + first;
    for (int64_t i = 0; i < n; ++i) narrow(to + i, from[i]);
}

template <typename A>
void read(const void* row, Storage type, int64_t first, int64_t n, A* to) {
    if constexpr (sizeof(A) == sizeof(double)) return read_as<double>(row, first, n, to);
    else if (type == Storage::kFloat32) return read_as<float>(row, first, n, to);
    else if (type == Storage::kBFloat16) return read_as<BFloat16>(row, first, n, to);
    else return read_as<Float16>(row, first, n, to);
}

template <typename A>
void write(const A* from, int64_t n, void* row, Storage type, int64_t first) {
    if constexpr (sizeof(A) == sizeof(double)) return write_as<double>(from, n, row, first);
    else if (type == Storage::kFloat32) return write_as<float>(from, n, row, first);
    else if (type == Storage::kBFloat16) return write_as<BFloat16>(from, n, row, first);
    else return write_as<Float16>(from, n, row, first);
}

// Computes z of n columns, padded to whole vectors with -inf, a probability of 0. Returns the padded number.
template <typename A>
int64_t read_z(const void* row, Storage type, int64_t first, int64_t n, const RowScale<A>& scale, A* z) {
    constexpr int64_t kStep = kLanes * kSums;
    const int64_t padded = (n + kStep - 1) / kStep * kStep;
    read(row, type, first, n, z);
    if (scale.bias) {
        for (int64_t i = 0; i < n; ++i) z[i] += scale.bias[first + i];
    }
    for (int64_t i = 0; i < n; ++i) z[i] *= scale.inv_temperature;
    for (int64_t i = n; i < padded; ++i) z[i] = -static_cast<A>(INFINITY);
    return padded;
}

// Clamps a log-probability, so that its product with a probability of 0 is 0 and not NaN.
template <typename A>
ISOMORPH_INLINE Vec<A> finite_log(const Vec<A>& logp) {
    return logp < A(-1e30) ? Vec<A>{} + A(-1e30) : logp;
}

template <typename A>
A largest(const A* z, int64_t n) {
    Vec<A> top[kSums];
    for (int64_t k = 0; k < kSums; ++k) top[k] = Vec<A>{} - static_cast<A>(INFINITY);
    for (int64_t i = 0; i < n; i += kLanes * kSums) {
        for (int64_t k = 0; k < kSums; ++k) {
            const Vec<A> v = load<Vec<A>>(z + i + k * kLanes);
            top[k] = v > top[k] ? v : top[k];
        }
    }
    A best = top[0][0];
    for (int64_t k = 0; k < kSums; ++k) {
        for (int64_t i = 0; i < kLanes; ++i) best = top[k][i] > best ? top[k][i] : best;
    }
    return best;
}

template <typename A>
double total(const Vec<A> (&sums)[kSums]) {
    double sum = 0;
    for (int64_t k = 0; k < kSums; ++k) {
        for (int64_t i = 0; i < kLanes; ++i) sum += static_cast<double>(sums[k][i]);
    }
    return sum;
}

// -- noise
constexpr int64_t kWords = 4, kWordColumns = kRowBlock / kWords;  // word w of counter i is for column w * 256 + i

// Philox 4x32-10 (Salmon et al. 2011) on counters (first_counter + i, 0, position), for i < n.
void philox(uint64_t key, uint64_t position, uint32_t first_counter, int64_t n, uint32_t (&words)[kWords][kWordColumns]) {
    for (int64_t i = 0; i < n; ++i) {
        words[0][i] = first_counter + static_cast<uint32_t>(i);
        words[1][i] = 0;
        words[2][i] = static_cast<uint32_t>(position);
        words[3][i] = static_cast<uint32_t>(position >> 32);
    }
    uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        for (int64_t i = 0; i < n; ++i) {
            const uint64_t a = uint64_t{0xD2511F53u} * words[0][i], b = uint64_t{0xCD9E8D57u} * words[2][i];
            words[0][i] = static_cast<uint32_t>(b >> 32) ^ words[1][i] ^ key0;
            words[1][i] = static_cast<uint32_t>(b);
            words[2][i] = static_cast<uint32_t>(a >> 32) ^ words[3][i] ^ key1;
            words[3][i] = static_cast<uint32_t>(a);
        }
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
}

// log of positive normal numbers, in place.
ISOMORPH_INLINE void log_in_place(Vec<float>& x) {
    typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));
    Ints bits;
    memcpy(&bits, &x, sizeof(bits));
    const Ints exponent = (bits - 0x3f3504f3) >> 23;  // so that the mantissa is in sqrt(1/2) .. sqrt(2)
    bits -= exponent << 23;
    Vec<float> f;
    memcpy(&f, &bits, sizeof(f));
    f -= 1.0f;
    const Vec<float> e = __builtin_convertvector(exponent, Vec<float>), f2 = f * f;
    Vec<float> y = Vec<float>{} + 7.0376836292e-2f;
    y = y * f - 1.1514610310e-1f;
    y = y * f + 1.1676998740e-1f;
    y = y * f - 1.2420140846e-1f;
    y = y * f + 1.4249322787e-1f;
    y = y * f - 1.6668057665e-1f;
    y = y * f + 2.0000714765e-1f;
    y = y * f - 2.4999993993e-1f;
    y = y * f + 3.3333331174e-1f;
    y = y * f * f2 - e * 2.12194440e-4f - 0.5f * f2;
    x = (f + y) + e * 0.693359375f;
}
ISOMORPH_INLINE void log_in_place(Vec<double>& x) {
    for (int64_t i = 0; i < kLanes; ++i) x[i] = log(x[i]);
}

// Gumbel noise -log(E) for E = -log(1 - u), u = (word + 1/2) 2^-32. Accurate for small E, where the noise is large.
template <typename A>
ISOMORPH_INLINE Vec<A> gumbel(const uint32_t* words) {
    typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
    const A most = A(1) - A(5.9604644775390625e-8);  // 1 - 2^-24
    Vec<A> u = (__builtin_convertvector(load<Words>(words), Vec<A>) + A(0.5)) * A(2.3283064365386963e-10);
    u = u > most ? Vec<A>{} + most : u;
    const Vec<A> rest = A(1) - u, rounded = A(1) - rest;  // log(1 - u) to full precision (Kahan's log1p)
    Vec<A> e = rest;
    log_in_place(e);
    e = rounded == A(0) ? u : -e * u / (rounded == A(0) ? Vec<A>{} + A(1) : rounded);
    log_in_place(e);
    return -e;
}

template <typename A>
struct SameSize {
    typedef int32_t type __attribute__((vector_size(kLanes * sizeof(int32_t))));
};
template <>
struct SameSize<double> {
    typedef int64_t type __attribute__((vector_size(kLanes * sizeof(int64_t))));
};

}  // namespace

template <typename A>
A RowsBody<A>::z_at(const void* row, Storage type, int64_t column, const RowScale<A>& scale) {
    alignas(64) A z[kLanes * kSums];
    read_z(row, type, column, 1, scale, z);
    return z[0];
}

template <typename A>
BlockStats RowsBody<A>::stats(const void* row, Storage type, int64_t first, int64_t num_columns,
                              const RowScale<A>& scale) {
    alignas(64) A z[kRowBlock];
    const int64_t n = read_z(row, type, first, num_columns, scale, z);
    const A top = largest(z, n);
    const A shift = top == -static_cast<A>(INFINITY) ? A(0) : top;
    Vec<A> sum[kSums] = {}, weighted[kSums] = {};
    for (int64_t i = 0; i < n; i += kLanes * kSums) {
        for (int64_t k = 0; k < kSums; ++k) {
            const Vec<A> d = load<Vec<A>>(z + i + k * kLanes) - shift;
            Vec<A> p = d;
            exp_in_place(p);
            sum[k] += p;
            weighted[k] += p * finite_log<A>(d);
        }
    }
    return {top, total<A>(sum), total<A>(weighted)};
}

template <typename A>
void RowsBody<A>::gradient(const void* row, Storage type, int64_t first, int64_t num_columns, const RowScale<A>& scale,
                           const RowGradient<A>& grad, void* out, Storage out_type) {
    alignas(64) A z[kRowBlock];
    const int64_t n = read_z(row, type, first, num_columns, scale, z);
    const A factor = grad.dlse - grad.dlogprob;
    for (int64_t i = 0; i < n; i += kLanes) {
        const Vec<A> logp = load<Vec<A>>(z + i) - grad.z_target + grad.logprob;
        Vec<A> p = logp;
        exp_in_place(p);
        store(z + i, p * (factor - grad.dentropy * (finite_log<A>(logp) + grad.entropy)));
    }
    if (grad.target >= first && grad.target < first + num_columns) z[grad.target - first] += grad.dlogprob;
    for (int64_t i = 0; i < n; ++i) z[i] *= scale.inv_temperature;
    write(z, num_columns, out, out_type, first);
}

template <typename A>
BlockDraw RowsBody<A>::draw(const void* row, Storage type, int64_t first, int64_t num_columns, const RowScale<A>& scale,
                            int64_t rng_key, int64_t position) {
    using Columns = typename SameSize<A>::type;
    alignas(64) A z[kRowBlock];
    alignas(64) uint32_t words[kWords][kWordColumns];
    const int64_t n = read_z(row, type, first, num_columns, scale, z);
    for (int64_t i = n; i < kRowBlock; ++i) z[i] = -static_cast<A>(INFINITY);
    const int64_t num_counters = num_columns < kWordColumns ? (num_columns + kLanes - 1) / kLanes * kLanes : kWordColumns;
    philox(static_cast<uint64_t>(rng_key), static_cast<uint64_t>(position),
           static_cast<uint32_t>(first / kRowBlock * kWordColumns), num_counters, words);

    const A top = largest(z, n);
    const A shift = top == -static_cast<A>(INFINITY) ? A(0) : top;
    Vec<A> sum[kSums] = {};
    for (int64_t i = 0; i < n; i += kLanes * kSums) {
        for (int64_t k = 0; k < kSums; ++k) {
            Vec<A> p = load<Vec<A>>(z + i + k * kLanes) - shift;
            exp_in_place(p);
            sum[k] += p;
        }
    }

    Vec<A> best = Vec<A>{} - static_cast<A>(INFINITY);
    Columns lane = {}, column = {};
    for (int64_t i = 0; i < kLanes; ++i) lane[i] = i;
    for (int64_t w = 0; w < kWords && w * kWordColumns < num_columns; ++w) {
        for (int64_t i = 0; i < num_counters; i += kLanes) {  // ascending columns: the first of equal scores wins
            const int32_t at = static_cast<int32_t>(w * kWordColumns + i);
            const Vec<A> score = load<Vec<A>>(z + at) + gumbel<A>(words[w] + i);
            const auto better = score > best;
            best = better ? score : best;
            column = better ? lane + at : column;
        }
    }
    int64_t winner = 0;
    for (int64_t i = 1; i < kLanes; ++i) {
        if (best[i] > best[winner] || (best[i] == best[winner] && column[i] < column[winner])) winner = i;
    }
    const int64_t drawn = column[winner];
    return {top, total<A>(sum), best[winner], z[drawn], first + drawn};
}

template struct RowsBody<float>;
template struct RowsBody<double>;

}  // namespace ISOMORPH_ISA
}  // namespace isomorph
