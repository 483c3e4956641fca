// The CPU kernels: BiWKV and the depthwise 5x5 convolution, float32, channels-last, forward and backward.
// A plain C interface without torch or Python headers; native.py loads it through ctypes.
//
// One source, several instruction sets: the bodies are included once per set, each in its own namespace, and
// the best one is chosen at load time. So a wheel travels, and nothing is built with -march=native.
// Work is cut into (batch element, block of L channels); the scratch of one block lives in L2.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

// clang's OpenMP needs its own runtime, which torch may not have loaded: one thread there.
#if defined(_OPENMP) && !defined(__clang__)
#define OMP(x) _Pragma(#x)
#else
#define OMP(x)
#endif

namespace {

// The float scratch is right while |w| T <= WIDE, or while w >= 0 and k spans at most WIDE: then a token whose
// exp(k - max k) is clamped at e^-87 weighs less than e^-27 of the sum. Beyond, the torch form takes over.
constexpr double WIDE = 60;
constexpr float MAX_U = 30;

enum Status { DONE = 0, REFUSED = 1, NO_MEMORY = 2 };

struct Biwkv {
    const float *w, *u, *k, *v;
    int64_t k_b, k_t, v_b, v_t;                             // strides of batch and token; channels are contiguous
    float *y, *den;                                         // (B, T, C) contiguous, as are g, gk, gv
    const float* g;
    float *gk, *gv, *gw, *gu;                               // gw, gu: (B, C), summed over B by the caller
    int64_t B, T, C;
};

struct Dwconv5 {
    const float *x, *weight, *g;                            // (B, H, W, C) contiguous, (25, C)
    float *y, *gw;                                          // gw: (B, 25, C), summed over B by the caller
    int64_t B, H, W, C;
    int64_t flip;                                           // 1: the window turned round, for the input's gradient
    int64_t strip;                                          // rows packed at a time
};

// A namespace with the three bodies for one instruction set.
#define LANES 4
namespace baseline {
#include "simd.inc"
#include "biwkv/biwkv.inc"
#include "dwconv5/dwconv5.inc"
}
#undef LANES

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LINIC_CLONES 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LANES 8
namespace avx2 {
#include "simd.inc"
#include "biwkv/biwkv.inc"
#include "dwconv5/dwconv5.inc"
}
#undef LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define LANES 16
namespace avx512 {
#include "simd.inc"
#include "biwkv/biwkv.inc"
#include "dwconv5/dwconv5.inc"
}
#undef LANES
#pragma GCC pop_options
#endif

struct Isa {
    const char* name;
    int64_t lanes;
    bool (*biwkv_forward)(const Biwkv&, int64_t, int64_t, float*);
    bool (*biwkv_backward)(const Biwkv&, int64_t, int64_t, float*);
    bool (*dwconv5_forward)(const Dwconv5&, int64_t, int64_t, float*);
    bool (*dwconv5_weight)(const Dwconv5&, int64_t, int64_t, float*);
};
#define ISA(ns) {#ns, ns::L, ns::biwkv_forward, ns::biwkv_backward, ns::dwconv5_forward, ns::dwconv5_weight}

const Isa isas[] = {
#ifdef LINIC_CLONES
    ISA(avx512), ISA(avx2),
#endif
    ISA(baseline),
};

bool runs_here(const Isa& isa) {
#ifdef LINIC_CLONES
    __builtin_cpu_init();
    if (!strcmp(isa.name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")
               && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (!strcmp(isa.name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return !strcmp(isa.name, "baseline");
}

const Isa* choose() {
    for (const Isa& isa : isas)
        if (runs_here(isa)) return &isa;
    return nullptr;                                         // not reached: the baseline always runs
}

const Isa* isa = choose();

// Every block of channels of every batch element, each thread with its own scratch of `floats` floats.
template <class Args, class Body>
int each_block(const Args& a, Body body, int64_t floats, int64_t threads) {
    const int64_t blocks = (a.C + isa->lanes - 1) / isa->lanes, jobs = a.B * blocks;
    std::atomic<int> status{DONE};
    (void)threads;
    OMP(omp parallel num_threads(threads) if (threads > 1 && jobs > 1))
    {
        void* raw = malloc(sizeof(float) * floats + 64);
        float* scratch = (float*)(((uintptr_t)raw + 63) & ~(uintptr_t)63);
        if (!raw) status = NO_MEMORY;
        OMP(omp for schedule(dynamic, 1))
        for (int64_t job = 0; job < jobs; job++)
            if (status == DONE && !body(a, job / blocks, job % blocks * isa->lanes, scratch)) status = REFUSED;
        free(raw);
    }
    return status;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API const char* linic_isa() { return isa->name; }

// For tests: the best instruction set is in use from the start, `name` from now on. 0: not one of this machine.
API int linic_use_isa(const char* name) {
    for (const Isa& other : isas)
        if (!strcmp(other.name, name) && runs_here(other)) return isa = &other, 1;
    return 0;
}

// Names of this machine's instruction sets, best first, nullptr after the last.
API const char* linic_isa_here(int64_t index) {
    for (const Isa& other : isas)
        if (runs_here(other) && index-- == 0) return other.name;
    return nullptr;
}

API int linic_openmp() {
#if defined(_OPENMP) && !defined(__clang__)
    return 1;
#else
    return 0;
#endif
}

API int linic_biwkv_forward(const float* w, const float* u, const float* k, int64_t k_b, int64_t k_t, const float* v,
                            int64_t v_b, int64_t v_t, float* y, float* den, int64_t B, int64_t T, int64_t C,
                            int64_t threads) {
    Biwkv a{w, u, k, v, k_b, k_t, v_b, v_t, y, den, nullptr, nullptr, nullptr, nullptr, nullptr, B, T, C};
    return each_block(a, isa->biwkv_forward, 3 * T * isa->lanes, threads);
}

API int linic_biwkv_backward(const float* w, const float* u, const float* k, int64_t k_b, int64_t k_t, const float* v,
                             int64_t v_b, int64_t v_t, const float* y, const float* den, const float* g, float* gk,
                             float* gv, float* gw, float* gu, int64_t B, int64_t T, int64_t C, int64_t threads) {
    Biwkv a{w, u, k, v, k_b, k_t, v_b, v_t, (float*)y, (float*)den, g, gk, gv, gw, gu, B, T, C};
    return each_block(a, isa->biwkv_backward, 5 * T * isa->lanes, threads);
}

// Rows a strip: the packed plane takes about 256 KiB, a quarter of a common L2.
static int64_t strip(int64_t H, int64_t W) {
    int64_t rows = (256 << 10) / (4 * isa->lanes * (W + 4)) - 4;
    return rows < 4 ? 4 : rows < H ? rows : H;
}

API int linic_dwconv5_forward(const float* x, const float* weight, float* y, int64_t B, int64_t H, int64_t W, int64_t C,
                              int64_t flip, int64_t threads) {
    Dwconv5 a{x, weight, nullptr, y, nullptr, B, H, W, C, flip, strip(H, W)};
    return each_block(a, isa->dwconv5_forward, isa->lanes * (W + 4) * (a.strip + 4), threads);
}

API int linic_dwconv5_weight(const float* x, const float* g, float* gw, int64_t B, int64_t H, int64_t W, int64_t C,
                             int64_t threads) {
    Dwconv5 a{x, nullptr, g, nullptr, gw, B, H, W, C, 0, strip(H, W)};
    return each_block(a, isa->dwconv5_weight, isa->lanes * (W + 4) * (a.strip + 4), threads);
}

// setuptools exports this name on Windows; nobody imports the library as a module.
API void* PyInit__native() { return nullptr; }
