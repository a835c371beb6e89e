// Element types of logits. The numbers are part of the interface between _native.py and _C.
#pragma once

#include <cstdint>

namespace rlhf {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// Storage of the 16-bit types; converted by load() and store() of vec.h and device.cuh.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Calls f(T{}) with the C++ type of `dtype`.
template <class Function>
void with_type(Dtype dtype, Function f) {
  switch (dtype) {
    case Dtype::float32:
      return f(float{});
    case Dtype::bfloat16:
      return f(BFloat16{});
    case Dtype::float16:
      return f(Half{});
  }
}

}  // namespace rlhf
