// The CPU kernels: BiWKV, the depthwise 5x5 convolution and what lies between the products of a mix; float32,
// channels-last, forward and backward. Operands of a mix's products may be bf16.
// A plain C interface without torch or Python headers; native.py loads it through ctypes.
//
// One source, several instruction sets: the bodies are included once per set, each in its own namespace, and
// the best one is chosen at load time. So a wheel travels, and nothing is built with -march=native.
// Work is cut into (batch element, block of L channels), the scratch of one block lives in L2; or into CHUNKs of rows.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

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

constexpr int64_t CHUNK = 64;                               // rows of one job; sums over rows are formed in chunks

struct bf16 { uint16_t bits; };

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

// The mixes (mix/__init__.py). `half`: operands, products and their gradients are bf16, else float; void* is either.
struct Norm {
    const float *x, *weight, *bias, *kernel;                // (B, H, W, C), (C,), (C,), (25, C) or null
    float* stats;                                           // (B H W, 2)
    void* y;
    const void* g;                                          // gradient of y
    const float* residual;                                  // what comes on top of gx
    float *gx, *gn, *gaffine, *gkernel;                     // gn: scratch of x's size; gkernel: (B, 25, C)
    int64_t half, B, H, W, C, strip;
    float eps;
};

struct Attend {
    const void* kvr;                                        // (B, T, 3C) contiguous, as gkvr
    const float *w, *u;
    float *y, *den;                                         // (B, T, C), as p and g; null: for use only
    void* p;
    const void* g;
    void* gkvr;
    float *gw, *gu;                                         // (B, C)
    int64_t half, hard, B, T, C;
    float limit_k, limit_v, limit_r;
};

struct Channel {
    const void* kr;                                         // (rows, hidden + C), as gkr
    void* square;                                           // (rows, hidden); backward: its gradient
    const float* x;                                         // (rows, C), as o, y, go; backward: gradient of y
    const void* o;
    float* y;
    void *go, *gkr;
    int64_t half, C, hidden;
    float limit_k, limit_r;
};

struct Point {                                              // pointwise/__init__.py; all of n elements
    const float *x, *s, *g;
    float *y, *gx, *gs;
    float limit;
    int64_t n;
};

// A namespace with the bodies for one instruction set.
#define LANES 4
namespace baseline {
#include "simd.inc"
#include "biwkv/biwkv.inc"
#include "dwconv5/dwconv5.inc"
#include "mix/norm.inc"
#include "mix/attend.inc"
#include "mix/channel.inc"
#include "pointwise/pointwise.inc"
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
#include "mix/norm.inc"
#include "mix/attend.inc"
#include "mix/channel.inc"
#include "pointwise/pointwise.inc"
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
#include "mix/norm.inc"
#include "mix/attend.inc"
#include "mix/channel.inc"
#include "pointwise/pointwise.inc"
}
#undef LANES
#pragma GCC pop_options
#endif

// Arguments that go by value: a store may alias anything in memory, a local copy stays in registers.
struct Isa {
    const char* name;
    int64_t lanes;
    bool (*biwkv_forward)(const Biwkv&, int64_t, int64_t, float*);
    bool (*biwkv_backward)(const Biwkv&, int64_t, int64_t, float*);
    bool (*dwconv5_forward)(const Dwconv5&, int64_t, int64_t, float*);
    bool (*dwconv5_weight)(const Dwconv5&, int64_t, int64_t, float*);
    void (*norm_forward)(Norm, int64_t, int64_t);
    void (*norm_backward)(Norm, int64_t, int64_t);
    bool (*norm_planes_forward)(Norm, int64_t, int64_t, float*);
    bool (*norm_planes_backward)(Norm, int64_t, int64_t, float*);
    bool (*attend_forward)(const Attend&, int64_t, int64_t, float*);
    bool (*attend_backward)(const Attend&, int64_t, int64_t, float*);
    void (*square_forward)(Channel, int64_t, int64_t);
    void (*square_backward)(Channel, int64_t, int64_t);
    void (*gate_forward)(Channel, int64_t, int64_t);
    void (*gate_backward)(Channel, int64_t, int64_t);
    void (*add_rows)(Channel, int64_t, int64_t);
    void (*gaussian_forward)(Point, int64_t, int64_t);
    void (*gaussian_backward)(Point, int64_t, int64_t);
    void (*gelu_forward)(Point, int64_t, int64_t);
    void (*gelu_backward)(Point, int64_t, int64_t);
};
#define ISA(ns) \
    {#ns, ns::L, ns::biwkv_forward, ns::biwkv_backward, ns::dwconv5_forward, ns::dwconv5_weight, ns::norm_forward, \
     ns::norm_backward, ns::norm_planes_forward, ns::norm_planes_backward, ns::attend_forward, ns::attend_backward, \
     ns::square_forward, ns::square_backward, ns::gate_forward, ns::gate_backward, ns::add_rows, \
     ns::gaussian_forward, ns::gaussian_backward, ns::gelu_forward, ns::gelu_backward}

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

// Every chunk of `size` rows.
template <class Args>
void each_chunk(const Args& a, void (*body)(Args, int64_t, int64_t), int64_t rows, int64_t threads,
                int64_t size = CHUNK) {
    const int64_t chunks = (rows + size - 1) / size;
    (void)threads;
    OMP(omp parallel for schedule(static) num_threads(threads) if (threads > 1 && chunks > 1))
    for (int64_t i = 0; i < chunks; i++) body(a, i * size, (i + 1) * size < rows ? (i + 1) * size : rows);
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
    return each_block(a, isa->biwkv_forward, baseline::forward_slots(false) * T * isa->lanes, threads);
}

API int linic_biwkv_backward(const float* w, const float* u, const float* k, int64_t k_b, int64_t k_t, const float* v,
                             int64_t v_b, int64_t v_t, const float* y, const float* den, const float* g, float* gk,
                             float* gv, float* gw, float* gu, int64_t B, int64_t T, int64_t C, int64_t threads) {
    Biwkv a{w, u, k, v, k_b, k_t, v_b, v_t, (float*)y, (float*)den, g, gk, gv, gw, gu, B, T, C};
    return each_block(a, isa->biwkv_backward, baseline::backward_slots(false) * T * isa->lanes, threads);
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

API int64_t linic_chunk() { return CHUNK; }

// y: float or bf16. stats is written here and read by the backward pass.
API int linic_norm_forward(const float* x, const float* weight, const float* bias, const float* kernel, float* stats,
                           void* y, float eps, int64_t half, int64_t B, int64_t H, int64_t W, int64_t C,
                           int64_t threads) {
    Norm a{x, weight, bias, kernel, stats, y, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
           half, B, H, W, C, strip(H, W), eps};
    each_chunk(a, isa->norm_forward, B * H * W, threads);
    return kernel ? each_block(a, isa->norm_planes_forward, isa->lanes * (W + 4) * (a.strip + 4), threads) : DONE;
}

API int linic_norm_backward(const float* x, const float* weight, const float* bias, const float* kernel,
                            const float* stats, const void* g, const float* residual, float* gx, float* gn,
                            float* gaffine, float* gkernel, int64_t half, int64_t B, int64_t H, int64_t W, int64_t C,
                            int64_t threads) {
    Norm a{x, weight, bias, kernel, (float*)stats, nullptr, g, residual, gx, gn, gaffine, gkernel,
           half, B, H, W, C, strip(H, W), 0};
    if (kernel && each_block(a, isa->norm_planes_backward, isa->lanes * (W + 4) * (a.strip + 4), threads) != DONE)
        return NO_MEMORY;
    each_chunk(a, isa->norm_backward, B * H * W, threads);
    return DONE;
}

API int linic_attend_forward(const void* kvr, const float* w, const float* u, float* y, float* den, void* p,
                             float limit_k, float limit_v, float limit_r, int64_t half, int64_t hard, int64_t B,
                             int64_t T, int64_t C, int64_t threads) {
    Attend a{kvr, w, u, y, den, p, nullptr, nullptr, nullptr, nullptr, half, hard, B, T, C, limit_k, limit_v, limit_r};
    return each_block(a, isa->attend_forward, baseline::forward_slots(true) * T * isa->lanes, threads);
}

API int linic_attend_backward(const void* kvr, const float* w, const float* u, const float* y, const float* den,
                              const void* g, void* gkvr, float* gw, float* gu, float limit_k, float limit_v,
                              float limit_r, int64_t half, int64_t hard, int64_t B, int64_t T, int64_t C,
                              int64_t threads) {
    Attend a{kvr, w, u, (float*)y, (float*)den, nullptr, g, gkvr, gw, gu, half, hard, B, T, C, limit_k, limit_v, limit_r};
    return each_block(a, isa->attend_backward, baseline::backward_slots(true) * T * isa->lanes, threads);
}

API void linic_square_forward(const void* kr, void* square, float limit_k, int64_t half, int64_t rows, int64_t C,
                              int64_t hidden, int64_t threads) {
    Channel a{kr, square, nullptr, nullptr, nullptr, nullptr, nullptr, half, C, hidden, limit_k, 0};
    each_chunk(a, isa->square_forward, rows, threads);
}

// Writes the first `hidden` columns of gkr; linic_gate_backward writes the others.
API void linic_square_backward(const void* kr, const void* gsquare, void* gkr, float limit_k, int64_t half,
                               int64_t rows, int64_t C, int64_t hidden, int64_t threads) {
    Channel a{kr, (void*)gsquare, nullptr, nullptr, nullptr, nullptr, gkr, half, C, hidden, limit_k, 0};
    each_chunk(a, isa->square_backward, rows, threads);
}

API void linic_gate_forward(const float* x, const void* kr, const void* o, float* y, float limit_r, int64_t half,
                            int64_t rows, int64_t C, int64_t hidden, int64_t threads) {
    Channel a{kr, nullptr, x, o, y, nullptr, nullptr, half, C, hidden, 0, limit_r};
    each_chunk(a, isa->gate_forward, rows, threads);
}

API void linic_gate_backward(const float* g, const void* kr, const void* o, void* go, void* gkr, float limit_r,
                             int64_t half, int64_t rows, int64_t C, int64_t hidden, int64_t threads) {
    Channel a{kr, nullptr, g, o, nullptr, go, gkr, half, C, hidden, 0, limit_r};
    each_chunk(a, isa->gate_backward, rows, threads);
}

// x: as many rows as o, or one for all.
API void linic_add(const float* x, const void* o, float* y, int64_t one_row, int64_t rows, int64_t C, int64_t threads) {
    Channel a{nullptr, nullptr, x, o, y, nullptr, nullptr, 1, C, one_row ? 0 : C, 0, 0};
    each_chunk(a, isa->add_rows, rows, threads);
}

static void each_element(void (*body)(Point, int64_t, int64_t), const Point& a, int64_t threads) {
    each_chunk(a, body, a.n, threads, 4096);
}

API void linic_gaussian_forward(const float* d, const float* s, float* p, float least, int64_t n, int64_t threads) {
    each_element(isa->gaussian_forward, {d, s, nullptr, p, nullptr, nullptr, least, n}, threads);
}

API void linic_gaussian_backward(const float* d, const float* s, const float* p, const float* g, float* gd, float* gs,
                                 float least, int64_t n, int64_t threads) {
    each_element(isa->gaussian_backward, {d, s, g, (float*)p, gd, gs, least, n}, threads);
}

API void linic_gelu_forward(const float* x, float* y, float limit, int64_t n, int64_t threads) {
    each_element(isa->gelu_forward, {x, nullptr, nullptr, y, nullptr, nullptr, limit, n}, threads);
}

API void linic_gelu_backward(const float* x, const float* g, float* gx, float limit, int64_t n, int64_t threads) {
    each_element(isa->gelu_backward, {x, nullptr, g, nullptr, gx, nullptr, limit, n}, threads);
}

// setuptools exports this name on Windows; nobody imports the library as a module.
API void* PyInit__native() { return nullptr; }
