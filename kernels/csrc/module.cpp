#include "native.h"

NB_MODULE(_native, module) {
    isomorph::bind_isa(module);
    isomorph::bind_parallel(module);
    isomorph::bind_attention(module);
    isomorph::bind_packing(module);
    isomorph::bind_advantage(module);
    isomorph::bind_decode(module);
    isomorph::bind_gemm(module);
    isomorph::bind_bit_hash(module);
    isomorph::bind_rows(module);
    isomorph::bind_layer(module);
}
