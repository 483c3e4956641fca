// The integer kernels: the operators of normative programs (entropy/operators.py defines them) on int32 registers.
// A plain C interface without torch or Python headers; __init__.py loads it through ctypes.
//
// One source, several instruction sets, chosen at load, as in native.cpp. Results never depend on the set, on threads
// or on how rows are cut: integers only, no sum can leave its type (the bounds are checked when a program is loaded),
// and the two floats there are (a quotient, a root) are estimates that exact integers correct.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LINIC_CLONES 1
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

// clang's OpenMP needs its own runtime, which torch may not have loaded: one thread there.
#if defined(_OPENMP) && !defined(__clang__)
#define OMP(x) _Pragma(#x)
#else
#define OMP(x)
#endif

namespace {

enum Status { DONE = 0, NO_MEMORY = 2 };

constexpr int64_t ROWS = 48;                                // rows that go through all steps of a chain together
constexpr int64_t BLOCK = 16;                               // outputs or channels that are packed together
constexpr int64_t EXP_FIRST = -20246, FALL_FIRST = -5910, SPAN = 14 << 10;     // as in entropy/operators.py

// clamp((sum m + c) >> s, low, high) of a BLOCK of channels. Those with even and with odd numbers lie apart, as 32-bit
// products want them. c has 2^53 on top, so that a logical shift will do; `excess` is what is left of it afterwards,
// modulo 2^32, where the result fits.
struct Requant {
    int64_t m[2][BLOCK / 2], c[2][BLOCK / 2], s[2][BLOCK / 2];
    int32_t excess[BLOCK], low[BLOCK], high[BLOCK];
};

// A chain: steps that compute a row of their result from the same row of their inputs, and GATHER, which takes the
// rows of `a` that `b` names: NOTHING is a row of zeros, anything below leaves what is there.
enum Kind { LINEAR, NORM, RESCALE, LOOKUP, GATE, SQUARE, ADD, COPY, GATHER };
constexpr int32_t NOTHING = -1;

struct Step {
    int64_t kind, out, out_at, a, a_at, b, b_at;            // slots, and the first channel in each
    int64_t channels, inputs;                               // of the result; of a, for LINEAR
    int64_t numbers[3], tensors[2], stride[2];              // stride: from one quality's row of a tensor to the next
};

// INSIDE: base is an offset in the scratch, else a pointer. WHOLE: only GATHER reads it, by rows of its own.
enum Where { INSIDE, BY_ROWS, WHOLE };
struct Slot { int64_t base, stride, where; };

struct Chain {
    const Step* steps;
    int64_t count;
    const Slot* slots;
    int64_t quality, scratch, pairs;                        // scratch: channels; pairs: of the widest LINEAR's inputs
};

struct Rows { int32_t* p; int64_t stride; };

struct Biwkv {
    const int32_t* k;
    int64_t k_t;                                            // stride of a token; batches follow one another
    const int32_t* v;
    int64_t v_t;
    const int32_t *decay, *bonus, *exp, *fall;
    int32_t* y;                                             // (B, T, C) contiguous
    int64_t B, T, C;
};

struct Depthwise {
    const int32_t* x;
    int64_t stride;                                         // of a pixel
    const int32_t* weight;                                  // (25, C padded to BLOCK)
    const Requant* requant;
    int32_t* y;                                             // (B, H, W, C) contiguous
    int64_t B, H, W, C;
};

// A namespace with the bodies for one instruction set; LANES is its vector width in int32.
#define LANES 4
namespace baseline {
#include "linear.inc"
#include "rows.inc"
#include "biwkv.inc"
#include "depthwise.inc"
}
#undef LANES

#ifdef LINIC_CLONES
#pragma GCC push_options
#pragma GCC target("avx2")
#define LANES 8
namespace avx2 {
#include "linear.inc"
#include "rows.inc"
#include "biwkv.inc"
#include "depthwise.inc"
}
#undef LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,prefer-vector-width=512")
#define LANES 16
namespace avx512 {
#include "linear.inc"
#include "rows.inc"
#include "biwkv.inc"
#include "depthwise.inc"
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx2,prefer-vector-width=512")
#define VNNI 1
namespace avx512vnni {
#include "linear.inc"
#include "rows.inc"
#include "biwkv.inc"
#include "depthwise.inc"
}
#undef VNNI
#undef LANES
#pragma GCC pop_options
#endif

struct Isa {
    const char* name;
    int64_t lanes;
    void (*chain)(const Chain&, int64_t, int64_t, int32_t*);
    void (*biwkv)(const Biwkv&, int64_t, int64_t, int64_t*);
    void (*depthwise)(const Depthwise&, int64_t);
};
#define ISA(ns) {#ns, 2 * ns::H, ns::chain, ns::biwkv, ns::depthwise}

const Isa isas[] = {
#ifdef LINIC_CLONES
    ISA(avx512vnni), ISA(avx512), ISA(avx2),
#endif
    ISA(baseline),
};

bool runs_here(const Isa& isa) {
#ifdef LINIC_CLONES
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")
                        && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (!strcmp(isa.name, "avx512vnni")) return avx512 && __builtin_cpu_supports("avx512vnni");
    if (!strcmp(isa.name, "avx512")) return avx512;
    if (!strcmp(isa.name, "avx2")) return __builtin_cpu_supports("avx2");
#endif
    return !strcmp(isa.name, "baseline");
}

const Isa* choose() {
    for (const Isa& isa : isas)
        if (runs_here(isa)) return &isa;
    return nullptr;                                         // not reached: the baseline always runs
}

const Isa* isa = choose();

// body(job, scratch) for every job, each thread with `bytes` of its own.
template <class Body>
int each(int64_t jobs, int64_t bytes, int64_t threads, Body body) {
    std::atomic<int> status{DONE};
    (void)threads;
    OMP(omp parallel num_threads(threads) if (threads > 1 && jobs > 1))
    {
        void* raw = malloc(bytes + 64);
        if (!raw) status = NO_MEMORY;
        OMP(omp for schedule(dynamic, 1))
        for (int64_t job = 0; job < jobs; job++)
            if (raw) body(job, (void*)(((uintptr_t)raw + 63) & ~(uintptr_t)63));
        free(raw);
    }
    return status;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API const char* linic_exact_isa() { return isa->name; }

// The best instruction set is in use from the start, `name` from now on. 0: not one of this machine.
API int linic_exact_use_isa(const char* name) {
    for (const Isa& other : isas)
        if (!strcmp(other.name, name) && runs_here(other)) return isa = &other, 1;
    return 0;
}

// Names of this machine's instruction sets, best first, nullptr after the last.
API const char* linic_exact_isa_here(int64_t index) {
    for (const Isa& other : isas)
        if (runs_here(other) && index-- == 0) return other.name;
    return nullptr;
}

API int linic_exact_openmp() {
#if defined(_OPENMP) && !defined(__clang__)
    return 1;
#else
    return 0;
#endif
}

// All steps over `rows` rows. scratch: channels of the slots inside, together.
API int linic_exact_chain(const void* steps, int64_t count, const void* slots, int64_t scratch, int64_t quality,
                          int64_t rows, int64_t threads) {
    Chain a{(const Step*)steps, count, (const Slot*)slots, quality, scratch, 0};
    for (int64_t i = 0; i < count; i++)
        if (a.steps[i].kind == LINEAR && (a.steps[i].inputs + 1) / 2 > a.pairs) a.pairs = (a.steps[i].inputs + 1) / 2;
    const Isa* set = isa;
    return each((rows + ROWS - 1) / ROWS, 4 * ROWS * (scratch + a.pairs), threads, [&](int64_t job, void* own) {
        set->chain(a, job * ROWS, (job + 1) * ROWS < rows ? (job + 1) * ROWS : rows, (int32_t*)own);
    });
}

API int linic_exact_biwkv(const int32_t* k, int64_t k_t, const int32_t* v, int64_t v_t, const int32_t* decay,
                          const int32_t* bonus, const int32_t* exp, const int32_t* fall, int32_t* y, int64_t B,
                          int64_t T, int64_t C, int64_t threads) {
    const Biwkv a{k, k_t, v, v_t, decay, bonus, exp, fall, y, B, T, C};
    const int64_t blocks = (C + BLOCK - 1) / BLOCK;
    const Isa* set = isa;
    return each(B * blocks, 8 * set->lanes * T, threads, [&](int64_t job, void* own) {
        set->biwkv(a, job / blocks, job % blocks * BLOCK, (int64_t*)own);
    });
}

API int linic_exact_depthwise(const int32_t* x, int64_t stride, const int32_t* weight, const void* requant, int32_t* y,
                              int64_t B, int64_t H, int64_t W, int64_t C, int64_t threads) {
    const Depthwise a{x, stride, weight, (const Requant*)requant, y, B, H, W, C};
    const Isa* set = isa;
    return each(B * H, 0, threads, [&](int64_t job, void*) { set->depthwise(a, job); });
}

// setuptools exports this name on Windows; nobody imports the library as a module.
API void* PyInit__exact() { return nullptr; }
