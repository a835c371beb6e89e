// The instruction set of the CPU kernels, chosen at run time.
//
// Each kernel source is compiled once per instruction set into a namespace of that name. What those
// files include must put every function into that namespace too: two inline functions of one name,
// one of them compiled for AVX-512, would be merged by the linker.
#pragma once

#include <string>
#include <vector>

namespace rlhf {

enum class Isa { baseline, avx2, avx512 };

// The one in use: the best that this processor has, unless set_isa asked for another.
Isa isa();

// Names of those that this processor has, the slowest first.
std::vector<std::string> isas();
std::string isa_name();
// Throws std::invalid_argument where the processor does not have it. For tests.
void set_isa(const std::string& name);

}  // namespace rlhf

// Declares `name` in the namespace of every instruction set, and rlhf::cpu::name that calls the
// right one.
#if RLHF_X86
#define RLHF_CPU_KERNEL(name, Args)    \
  namespace rlhf::baseline {           \
  void name(const Args&);              \
  }                                    \
  namespace rlhf::avx2 {               \
  void name(const Args&);              \
  }                                    \
  namespace rlhf::avx512 {             \
  void name(const Args&);              \
  }                                    \
  namespace rlhf::cpu {                \
  inline void name(const Args& args) { \
    switch (isa()) {                   \
      case Isa::avx512:                \
        return avx512::name(args);     \
      case Isa::avx2:                  \
        return avx2::name(args);       \
      default:                         \
        return baseline::name(args);   \
    }                                  \
  }                                    \
  }
#else
#define RLHF_CPU_KERNEL(name, Args)                                   \
  namespace rlhf::baseline {                                          \
  void name(const Args&);                                             \
  }                                                                   \
  namespace rlhf::cpu {                                               \
  inline void name(const Args& args) { return baseline::name(args); } \
  }
#endif
