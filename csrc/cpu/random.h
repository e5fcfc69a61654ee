// What the launch code of the operators that draw shares.
#pragma once
#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored \
    "-Wmaybe-uninitialized"  // GCC 12 says it of its own AVX-512 header, falsely (bug 105593)
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "common/philox.h"
#include "cpu/tensor.h"

namespace fk {

inline RandomStream stream_of(const Tensor& seed, int64_t stream) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "seed must be one int64");
  return {static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr())), static_cast<uint64_t>(stream)};
}

}  // namespace fk
