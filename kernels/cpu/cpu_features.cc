#include "kernels/cpu/cpu_features.h"

#include <cpuid.h>

#include <cstdint>

#include "kernels/backend.h"

namespace switchyard::cpu {
namespace {

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers Cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
  return r;
}

bool Bit(uint32_t value, int bit) { return (value >> bit & 1) != 0; }

// The register states that the operating system saves (XCR0); 0 without XSAVE.
uint64_t SavedStates() {
  if (!Bit(Cpuid(1, 0).ecx, 27)) return 0;  // OSXSAVE
  uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

struct Features {
  bool avx2 = false;
  bool avx512 = false;
};

Features Detect() {
  constexpr uint64_t kYmm = 0x6;   // SSE and AVX state
  constexpr uint64_t kZmm = 0xe6;  // and opmask, upper ZMM, ZMM16-31
  const uint64_t states = SavedStates();
  const Registers leaf1 = Cpuid(1, 0);
  const Registers leaf7 = Cpuid(7, 0);
  Features f;
  // AVX, FMA, F16C, AVX2.
  f.avx2 = (states & kYmm) == kYmm && Bit(leaf1.ecx, 28) && Bit(leaf1.ecx, 12) &&
           Bit(leaf1.ecx, 29) && Bit(leaf7.ebx, 5);
  // F, DQ, BW, VL, VNNI, and BF16 in subleaf 1.
  f.avx512 = f.avx2 && (states & kZmm) == kZmm && Bit(leaf7.ebx, 16) && Bit(leaf7.ebx, 17) &&
             Bit(leaf7.ebx, 30) && Bit(leaf7.ebx, 31) && Bit(leaf7.ecx, 11) && leaf7.eax >= 1 &&
             Bit(Cpuid(7, 1).eax, 5);
  return f;
}

}  // namespace

const KernelTable* FindKernelTable(const std::string& name) {
  static const Features features = Detect();
  if (name == "portable") return &cpu_portable::Table();
  if (name == "avx2" && features.avx2) return &cpu_avx2::Table();
  if (name == "avx512" && features.avx512) return &cpu_avx512::Table();
  return nullptr;
}

}  // namespace switchyard::cpu

namespace switchyard {

std::vector<std::string> CpuIsaPaths() {
  std::vector<std::string> paths;
  for (const char* name : {"avx512", "avx2", "portable"})
    if (cpu::FindKernelTable(name) != nullptr) paths.emplace_back(name);
  return paths;
}

}  // namespace switchyard
