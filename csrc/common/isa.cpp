#include "common/isa.h"

#include "common/check.h"

namespace rlhf {
namespace {

const char* const kNames[] = {"baseline", "avx2", "avx512"};

Isa best() {
#if RLHF_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

const Isa kBest = best();
Isa current = kBest;

}  // namespace

Isa isa() { return current; }

std::vector<std::string> isas() { return {kNames, kNames + static_cast<int>(kBest) + 1}; }

std::string isa_name() { return kNames[static_cast<int>(current)]; }

void set_isa(const std::string& name) {
  std::string known;
  for (int i = 0; i <= static_cast<int>(kBest); ++i) {
    if (name == kNames[i]) {
      current = static_cast<Isa>(i);
      return;
    }
    known += (i ? ", " : "") + std::string(kNames[i]);
  }
  RLHF_CHECK(false, "isa: expected one of " + known + ", got '" + name + "'");
}

}  // namespace rlhf
