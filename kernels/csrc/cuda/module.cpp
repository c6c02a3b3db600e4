// The module isomorph.kernels._native_cuda. Importing it does not call the driver. Tensors are passed by DLPack, the
// stream as PyTorch's handle; Python checks shapes and ranges before the call.
#include <optional>
#include <string>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include "rows.h"

namespace nb = nanobind;

namespace isomorph {
namespace cuda {
namespace {

using Matrix = nb::ndarray<nb::ndim<2>, nb::device::cuda>;
using Vector = nb::ndarray<nb::ndim<1>, nb::device::cuda, nb::c_contig>;
using MaybeVector = std::optional<Vector>;

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw nb::value_error((std::string(what) + ": " + cudaGetErrorString(error)).c_str());
}

// Makes a device the current one for its lifetime.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        check(cudaSetDevice(device), "cudaSetDevice");
    }
    ~OnDevice() { cudaSetDevice(before_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = 0;
};

RowType type_of(nb::dlpack::dtype dtype) {
    if (dtype == nb::dtype<float>()) return RowType::kFloat32;
    if (dtype == nb::dtype<double>()) return RowType::kFloat64;
    if (dtype.bits == 16 && dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat))
        return RowType::kBFloat16;
    if (dtype.bits == 16 && dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float))
        return RowType::kFloat16;
    throw nb::type_error("rows must be float32, bfloat16, float16 or float64");
}

Rows rows_of(const Matrix& matrix) {
    if (matrix.shape(1) > 1 && matrix.stride(1) != 1) throw nb::value_error("rows must have stride 1 along V; call .contiguous() on them");
    return {matrix.data(), type_of(matrix.dtype()), static_cast<int64_t>(matrix.shape(0)),
            static_cast<int64_t>(matrix.shape(1)), matrix.stride(0)};
}

// Checks vectors with one element per row or per column: their dtype and device must belong to the rows.
struct Expected {
    nb::dlpack::dtype dtype;
    int device;

    explicit Expected(const Matrix& rows)
        : dtype(rows.dtype() == nb::dtype<double>() ? nb::dtype<double>() : nb::dtype<float>()),
          device(rows.device_id()) {}
    void* data(const Vector& values, int64_t size, nb::dlpack::dtype wanted, const char* name) const {
        const bool fits = values.dtype() == wanted && static_cast<int64_t>(values.shape(0)) == size;
        if (!fits || values.device_id() != device)
            throw nb::type_error((std::string(name) + " must have the dtype, length and device that belong to the rows").c_str());
        return values.data();
    }
    void* data(const Vector& values, int64_t size, const char* name) const { return data(values, size, dtype, name); }
    void* data(const MaybeVector& values, int64_t size, const char* name) const {
        return values ? data(*values, size, dtype, name) : nullptr;
    }
    const int64_t* ids(const Vector& values, int64_t size, const char* name) const {
        return static_cast<const int64_t*>(data(values, size, nb::dtype<int64_t>(), name));
    }
};

cudaStream_t stream_of(uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

void py_row_stats(Matrix logits, Vector target, MaybeVector bias, double inv_temperature, Vector logprob,
                  Vector entropy, Vector lse, uintptr_t stream) {
    const Rows rows = rows_of(logits);
    const Expected expected(logits);
    const int64_t n = rows.num_rows;
    const Head head = {expected.ids(target, n, "target"), expected.data(bias, rows.num_columns, "bias"),
                       inv_temperature};
    const Stats out = {expected.data(logprob, n, "logprob"), expected.data(entropy, n, "entropy"),
                       expected.data(lse, n, "lse")};
    if (n == 0) return;
    const OnDevice guard(logits.device_id());
    check(row_stats(rows, head, out, stream_of(stream)), "row_stats");
}

void py_row_gradient(Matrix logits, Vector target, Vector logprob, Vector entropy, MaybeVector dlogprob,
                     MaybeVector dentropy, MaybeVector dlse, MaybeVector bias, double inv_temperature, Matrix out,
                     uintptr_t stream) {
    const Rows rows = rows_of(logits), to = rows_of(out);
    const Expected expected(logits);
    const int64_t n = rows.num_rows;
    if (to.num_rows != n || to.num_columns != rows.num_columns || out.device_id() != logits.device_id())
        throw nb::type_error("row_gradient: out must have the shape and the device of the logits");
    if (to.type != rows.type && !(rows.type == RowType::kFloat32 && to.type == RowType::kBFloat16))
        throw nb::type_error("row_gradient: out must have the dtype of the logits, or be bfloat16 for float32");
    const Head head = {expected.ids(target, n, "target"), expected.data(bias, rows.num_columns, "bias"),
                       inv_temperature};
    const Stats stats = {expected.data(logprob, n, "logprob"), expected.data(entropy, n, "entropy"), nullptr};
    const StatGradients grads = {expected.data(dlogprob, n, "dlogprob"), expected.data(dentropy, n, "dentropy"),
                                 expected.data(dlse, n, "dlse")};
    if (n == 0) return;
    const OnDevice guard(logits.device_id());
    check(row_gradient(rows, head, stats, grads, to, stream_of(stream)), "row_gradient");
}

}  // namespace

NB_MODULE(_native_cuda, module) {
    module.def("row_stats", &py_row_stats, nb::arg("logits").noconvert(), nb::arg("target").noconvert(),
               nb::arg("bias").none(), nb::arg("inv_temperature"), nb::arg("logprob").noconvert(),
               nb::arg("entropy").noconvert(), nb::arg("lse").noconvert(), nb::arg("stream"));
    module.def("row_gradient", &py_row_gradient, nb::arg("logits").noconvert(), nb::arg("target").noconvert(),
               nb::arg("logprob").noconvert(), nb::arg("entropy").noconvert(), nb::arg("dlogprob").none(),
               nb::arg("dentropy").none(), nb::arg("dlse").none(), nb::arg("bias").none(), nb::arg("inv_temperature"),
               nb::arg("out").noconvert(), nb::arg("stream"));
}

}  // namespace cuda
}  // namespace isomorph
