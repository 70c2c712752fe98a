#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace cna {

namespace {

bool always() { return true; }

#if defined(__x86_64__)
// __builtin_cpu_supports asks the operating system, too: a level whose registers the system does
// not save counts as absent.
bool has_f16c() {  // not a name that every compiler's __builtin_cpu_supports knows
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & 1u << 29);
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// The tile registers are large, so Linux gives them only to a process that asks.
bool has_amx() {
#if defined(CNA_AMX_EMULATED)
  return true;
#elif defined(__linux__)
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;  // cpuid 7, edx
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;   // arch_prctl
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (AMX_BF16 | AMX_TILE)) != (AMX_BF16 | AMX_TILE)) return false;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

struct Candidate {
  const Level *level;
  bool (*supported)();
};

// All levels that are compiled, best last.
const Candidate CANDIDATES[] = {
    {&LEVEL_GENERIC, always},
#if defined(__x86_64__)
    {&LEVEL_AVX2, has_avx2},
    {&LEVEL_AVX512, has_avx512},
    {&LEVEL_AVX512_BF16, [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }},
#ifdef CNA_COMPILES_AMX
    {&LEVEL_AMX, [] { return has_avx512() && __builtin_cpu_supports("avx512bf16") && has_amx(); }},
#endif
#elif defined(__aarch64__)
    {&LEVEL_NEON, always},
#endif
};

const Level *find(const char *name) {
  for (const Candidate &candidate : CANDIDATES)
    if (std::strcmp(candidate.level->name, name) == 0) return candidate.supported() ? candidate.level : nullptr;
  return nullptr;
}

const Level *by_default() {
  const char *name = std::getenv("CNA_CPU_ISA");
  if (name && *name) return find(name);
  const Level *best = nullptr;
  for (const Candidate &candidate : CANDIDATES)
    if (candidate.supported()) best = candidate.level;
  return best;
}

std::atomic<const Level *> chosen(nullptr);

struct Names {
  char text[128] = "";
  Names() {
    for (const Candidate &candidate : CANDIDATES)
      if (candidate.supported()) {
        if (*text) std::strcat(text, " ");
        std::strcat(text, candidate.level->name);
      }
  }
};

}  // namespace

const Level *current_level() {
  static const Level *const usual = by_default();
  const Level *level = chosen;
  return level ? level : usual;
}

}  // namespace cna

extern "C" {

const char *cna_isa_levels(void) {
  static const cna::Names names;
  return names.text;
}

const char *cna_isa(void) {
  const cna::Level *level = cna::current_level();
  return level ? level->name : "";
}

int cna_use_isa(const char *name) {
  const cna::Level *level = name ? cna::find(name) : nullptr;
  if (name && !level) return CNA_ERR_ISA;
  cna::chosen = level;
  return CNA_OK;
}
}
