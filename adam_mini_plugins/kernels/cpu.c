/* One step of Adam-mini on a CPU: what update.py defines, with each number read and written once.
 *
 * Plain C over raw pointers, loaded by cpu.py, which says what each tensor's tasks are. A tensor's elements are
 * turned into float32 and back on their way through registers; a block that is short enough to stay in the cache is
 * summed and updated at once, a long one in two phases. Sums of squares are added up in float64, in an order that
 * depends on the tensor alone: any number of threads gives the same bits.
 *
 * Built without -ffast-math, whose start-up code would change the floating-point mode of the whole process.
 */
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("tree-vectorize", "vect-cost-model=dynamic") /* as -O3 has it, which takes minutes */
#endif

#define INLINE static inline __attribute__((always_inline))

#define TILE 1024  /* elements in buffers on the stack */
#define FEW 512    /* elements whose squares are added up in float32; of float16, those in a buffer */
#define SHORT 64   /* elements of a block that is not worth a loop of its own */
#define NEAR 2048  /* elements by which to ask ahead, found by trying: in short blocks */
#define FAR 4096   /* and in long ones */

enum { FLOAT32, BFLOAT16, FLOAT16, BFLOAT16_STOCHASTIC };

/* What a task does with its elements. */
enum {
    BLOCKS,   /* `blocks` blocks of `size` rows of `columns`: second moment from the gradient, then the update */
    ROWS,     /* `blocks` rows of `columns`: the update, by the second moment that stands there */
    COLUMNS,  /* `blocks` rows of `columns` with one second moment a column: the update */
    ELEMENTS, /* `columns` elements, each a block: second moment, then the update */
    SUMS,     /* the sum of squares of `columns` elements, into partial[slot] */
    MOMENTS,  /* the second moments of `size` rows of one long block, from `blocks` partial sums at `slot` */
};

typedef struct {
    int64_t kind, tensor, start, row, blocks, size, columns, slot; /* start: first element; row: first second moment */
} Task;

typedef struct {
    int64_t param, grad, exp_avg; /* types */
    int64_t seed;
} Kind;

typedef struct {
    float step_size, root_correction;
    uint32_t key;
} Rates;

/* What torch's stable C interface (aoti_torch/c/shim.h) tells of a tensor, given where its handle is; 0 if it can. */
typedef int32_t Query(const uintptr_t *tensor, void *answer);

typedef struct {
    double lr, beta1, beta2, weight_decay, eps;
    int64_t maximize, tensors;
    uintptr_t *grads; /* addresses, like the next */
    const uintptr_t *params, *exp_avgs, *exp_avg_sqs, *steps; /* one after the other */
    const Kind *kinds;
    Rates *rates;
    const Task *sums, *moments, *updates;
    int64_t num_sums, num_moments, num_updates;
    double *partial;
    /* What adam_mini_holds looks at. */
    Query *data_ptr, *dtype, *dim, *sizes, *strides;
    const int64_t *shapes; /* of each tensor the dtypes of parameter and gradient, the number of axes, their extents */
    void *(*address_of)(void *);
    void *const *written; /* the objects of all that `params` and what follows it are the addresses of */
} Step;

typedef struct {
    const Step *step;
    const Task *tasks;
    int64_t count, next, threads;
} Work;

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

/* Types. */

INLINE uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INLINE float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

INLINE float from_half(uint16_t h) {
    uint32_t u = (uint32_t)(h & 0x7fff) << 13, exponent = u & 0x0f800000u;
    float normal = float_of(u + (112u << 23) + (exponent == 0x0f800000u ? 112u << 23 : 0)); /* infinities, NaN: again */
    float small = float_of(u + (113u << 23)) - float_of(113u << 23);
    return float_of(bits_of(exponent ? normal : small) | (uint32_t)(h & 0x8000) << 16);
}

INLINE uint16_t to_half(float x) {
    uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000;
    u &= 0x7fffffff;
    uint32_t normal = (u - (112u << 23) + 0xfff + ((u >> 13) & 1)) >> 13;
    uint32_t small = bits_of(float_of(u) + 0.5f) - bits_of(0.5f); /* the unit rounds, to multiples of 2^-24 */
    uint32_t large = u > 0x7f800000 ? 0x7e00 : 0x7c00;
    return (uint16_t)(sign | (u >= 0x47800000 ? large : u < 0x38800000 ? small : normal));
}

/* The same for many, by the processor's own instructions where it has them: no compiler makes them of the above. */
static int has_halves;
#if defined(__x86_64__)
#define HALVES static __attribute__((target("avx,f16c"), noinline)) void
HALVES from_halves_by_8(float *to, const uint16_t *from, int64_t n) {
    for (int64_t i = 0; i < n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
}
HALVES to_halves_by_8(uint16_t *to, const float *from, int64_t n) {
    for (int64_t i = 0; i < n; i += 8)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
}
#else
static void from_halves_by_8(float *to, const uint16_t *from, int64_t n) { (void)to, (void)from, (void)n; }
static void to_halves_by_8(uint16_t *to, const float *from, int64_t n) { (void)to, (void)from, (void)n; }
#endif
INLINE void from_halves(float *to, uintptr_t from, int64_t n) {
    const int64_t even = n & ~7;
    from_halves_by_8(to, (const uint16_t *)from, even);
    for (int64_t i = even; i < n; i++) to[i] = from_half(((const uint16_t *)from)[i]);
}
INLINE void to_halves(uintptr_t to, const float *from, int64_t n) {
    const int64_t even = n & ~7;
    to_halves_by_8((uint16_t *)to, from, even);
    for (int64_t i = even; i < n; i++) ((uint16_t *)to)[i] = to_half(from[i]);
}

INLINE uint16_t to_bfloat(float x) {
    uint32_t u = bits_of(x);
    uint32_t rounded = u + 0x7fff + ((u >> 16) & 1);
    rounded |= -(uint32_t)(x != x); /* stays NaN; less to do than to choose between two */
    return (uint16_t)(rounded >> 16);
}

INLINE uint32_t mixed(uint32_t h) {
    h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
    h = (h ^ (h >> 13)) * 0xC2B2AE35u;
    return h ^ (h >> 16);
}

/* The random numbers of elements from one on: rounding.py says how. */
typedef struct {
    uint32_t low, high, next, key;
} Random;

INLINE Random random_from(int64_t start, uint32_t key) {
    const uint32_t high = (uint32_t)(start >> 32);
    return (Random){(uint32_t)start, mixed(high), mixed(high + 1), key};
}

INLINE uint16_t to_bfloat_at_random(float x, Random r, int64_t i) {
    uint32_t index = r.low + (uint32_t)i;
    uint32_t random = mixed((index * 0x9E3779B9u + r.key) ^ (index < r.low ? r.next : r.high)) >> 16;
    uint32_t u = bits_of(x), size = u & 0x7fffffff;
    return (uint16_t)(size > 0x7f800000 ? 0x7fc0 : (size < 0x7f800000 ? u + random : u) >> 16);
}

INLINE uintptr_t at(uintptr_t address, int64_t kind, int64_t i) { return address + i * (kind == FLOAT32 ? 4 : 2); }

INLINE float get(uintptr_t address, int64_t kind, int64_t i) {
    if (kind == FLOAT32) return ((const float *)address)[i];
    const uint16_t half = ((const uint16_t *)address)[i];
    return kind == FLOAT16 ? from_half(half) : float_of((uint32_t)half << 16);
}

INLINE void put(uintptr_t address, int64_t kind, int64_t i, float x, Random random) {
    if (kind == FLOAT32)
        ((float *)address)[i] = x;
    else
        ((uint16_t *)address)[i] = kind == FLOAT16               ? to_half(x)
                                   : kind == BFLOAT16_STOCHASTIC ? to_bfloat_at_random(x, random, i)
                                                                 : to_bfloat(x);
}

/* The arithmetic. Types are constants wherever it counts: `specialised` below has a copy for each common set. */

typedef struct {
    uintptr_t p, g, m; /* the first elements */
    int64_t of_p, of_g, of_m; /* types */
    Random random;
} Range;

INLINE Range range_from(const Step *s, int64_t t, int64_t start, Kind of) {
    return (Range){at(s->params[t], of.param, start), at(s->grads[t], of.grad, start),
                   at(s->exp_avgs[t], of.exp_avg, start), of.param, of.grad, of.exp_avg,
                   random_from(start, s->rates[t].key)};
}

INLINE Range later(Range r, int64_t by) {
    const int64_t sum = (int64_t)r.random.low + by;
    return (Range){at(r.p, r.of_p, by), at(r.g, r.of_g, by), at(r.m, r.of_m, by), r.of_p, r.of_g, r.of_m,
                   {(uint32_t)sum, sum >> 32 ? r.random.next : r.random.high, r.random.next, r.random.key}};
}

/* The same as below, for squares that are too large for float32, and for what is no number. */
static __attribute__((noinline)) double sum_of_large_squares(uintptr_t g, int64_t of_g, int64_t n) {
    double total = 0;
    for (int64_t i = 0; i < n; i++) total += (double)get(g, of_g, i) * get(g, of_g, i);
    return total;
}

INLINE float sum_of_few_squares(uintptr_t g, int64_t of_g, int64_t n) {
    const int64_t q = n / 4;
    float part = 0;
    /* Four at once, so that few additions wait for each other. */
#pragma omp simd reduction(+ : part)
    for (int64_t i = 0; i < q; i++)
        part += (get(g, of_g, i) * get(g, of_g, i) + get(g, of_g, i + q) * get(g, of_g, i + q)) +
                (get(g, of_g, i + 2 * q) * get(g, of_g, i + 2 * q) + get(g, of_g, i + 3 * q) * get(g, of_g, i + 3 * q));
    for (int64_t i = 4 * q; i < n; i++) part += get(g, of_g, i) * get(g, of_g, i);
    return part;
}

/* In float32 as far as it loses nothing that counts, a few squares a lane, and from there in float64. */
INLINE double sum_of_squares(uintptr_t g, int64_t of_g, int64_t n) {
    double total = 0;
    for (int64_t first = 0; first < n; first += FEW) {
        const int64_t count = n - first < FEW ? n - first : FEW;
        const uintptr_t from = at(g, of_g, first);
        if (of_g == FLOAT16 && has_halves) {
            float few[FEW];
            from_halves(few, from, count);
            total += sum_of_few_squares((uintptr_t)few, FLOAT32, count);
        } else
            total += sum_of_few_squares(from, of_g, count);
    }
    return total <= DBL_MAX ? total : sum_of_large_squares(g, of_g, n);
}

INLINE float moved(const Step *s, float v, double mean) { return (float)(s->beta2 * v + (1 - s->beta2) * mean); }

INLINE float scale_of(float v, float step_size, float correction, float eps) {
    return step_size / (sqrtf(v) / correction + eps);
}

typedef struct {
    float decay, beta1, weight; /* of p, of m, of the gradient in m */
} Constants;

INLINE Constants constants_of(const Step *s) {
    return (Constants){(float)(1 - s->lr * s->weight_decay), (float)s->beta1,
                       (float)(s->maximize ? s->beta1 - 1 : 1 - s->beta1)};
}

INLINE void descend_one(Constants c, Range r, int64_t i, float scale) {
    const float m = c.beta1 * get(r.m, r.of_m, i) + c.weight * get(r.g, r.of_g, i);
    put(r.m, r.of_m, i, m, r.random);
    put(r.p, r.of_p, i, c.decay * get(r.p, r.of_p, i) - scale * m, r.random);
}

/* By one scale, or by one an element. */
INLINE void descend_all(Constants c, Range r, int64_t n, float scale, const float *scales) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) descend_one(c, r, i, scales ? scales[i] : scale);
}

/* float16 on its way through buffers, where that is faster. */
INLINE void descend_some(Constants c, Range r, int64_t n, float scale, const float *scales) {
    if (r.of_p != FLOAT16 || r.of_g != FLOAT16 || r.of_m != FLOAT16 || !has_halves) {
        descend_all(c, r, n, scale, scales);
        return;
    }
    float p[FEW], g[FEW], m[FEW];
    const Range few = {(uintptr_t)p, (uintptr_t)g, (uintptr_t)m, FLOAT32, FLOAT32, FLOAT32, r.random};
    for (int64_t first = 0; first < n; first += FEW) {
        const int64_t count = n - first < FEW ? n - first : FEW;
        const Range part = later(r, first);
        from_halves(p, part.p, count), from_halves(g, part.g, count), from_halves(m, part.m, count);
        descend_all(c, few, count, scale, scales ? scales + first : scales);
        to_halves(part.p, p, count), to_halves(part.m, m, count);
    }
}

/* What a task's thread comes to after the elements of `r`: `left` of the task are left there, then `next` begins. */
typedef struct {
    Range next;
    int64_t left, distance;
} Ahead;

/* Four cache lines of what is the larger, in elements. */
INLINE int64_t stride_of(Range r) { return r.of_p == FLOAT32 || r.of_m == FLOAT32 ? 64 : 128; }

/* Asks for a stride of each, ahead of an element: between the sum over a block and its update no two streams run
 * on for long enough for the processor to see them. Of shorter types somewhat more is asked for than is used at once,
 * and at a task's end something beyond it. */
INLINE void prefetch(Range r, Ahead ahead, int64_t i) {
    const int64_t to = i + ahead.distance;
    const Range soon = to < ahead.left ? later(r, to) : later(ahead.next, to - ahead.left);
    for (int64_t line = 0; line < 4; line++) {
        __builtin_prefetch((const char *)soon.g + 64 * line, 0);
        __builtin_prefetch((const char *)soon.p + 64 * line, 1);
        __builtin_prefetch((const char *)soon.m + 64 * line, 1);
    }
}

INLINE void descend(const Step *s, Range r, int64_t n, float scale, Ahead ahead) {
    const Constants c = constants_of(s);
    const int64_t stride = stride_of(r), size = r.of_g == FLOAT16 ? FEW : stride;
    int64_t first = 0;
    for (; first + size <= n; first += size) {
        for (int64_t i = first; i < first + size; i += stride) prefetch(r, ahead, i);
        descend_some(c, later(r, first), size, scale, 0);
    }
    descend_some(c, later(r, first), n - first, scale, 0);
}

INLINE void descend_by_element(const Step *s, Range r, const float *scales, int64_t n) {
    descend_some(constants_of(s), r, n, 0, scales);
}

INLINE void spread_over(float *restrict to, const float *restrict from, int64_t count, int64_t length) {
    for (int64_t b = 0; b < count; b++)
        for (int64_t i = 0; i < length; i++) to[b * length + i] = from[b];
}

/* Writes each number `length` times; common lengths are constants, so that no loop is over so few. */
INLINE void spread(float *restrict to, const float *restrict from, int64_t count, int64_t length) {
    switch (length) {
    case 1: spread_over(to, from, count, 1); break;
    case 4: spread_over(to, from, count, 4); break;
    case 8: spread_over(to, from, count, 8); break;
    case 16: spread_over(to, from, count, 16); break;
    case 32: spread_over(to, from, count, 32); break;
    default: spread_over(to, from, count, length);
    }
}

/* Blocks of few elements, as many at once as go into a tile: loops over one block would cost more than what they do. */
INLINE void short_blocks(const Step *s, const Task *task, Range next, Kind of, int given) {
    const int64_t t = task->tensor, size = task->size, length = size * task->columns, at_once = TILE / length;
    const float beta2 = (float)s->beta2, rest = (float)(1 - s->beta2) / (float)length, eps = (float)s->eps;
    const float step_size = s->rates[t].step_size, correction = s->rates[t].root_correction;
    float sums[TILE], scales[TILE];
    for (int64_t first = 0; first < task->blocks; first += at_once) {
        const int64_t count = task->blocks - first < at_once ? task->blocks - first : at_once;
        const Range r = range_from(s, t, task->start + first * length, of);
        float *v = (float *)s->exp_avg_sqs[t] + task->row + first * size;
        const Ahead ahead = {next, (task->blocks - first) * length, NEAR};
        for (int64_t i = 0; i < count * length; i += stride_of(r)) prefetch(r, ahead, i);
        if (!given) {
            if (of.grad == FLOAT16 && has_halves) {
                from_halves(sums, r.g, count * length);
#pragma omp simd
                for (int64_t i = 0; i < count * length; i++) sums[i] *= sums[i];
            } else {
#pragma omp simd
                for (int64_t i = 0; i < count * length; i++) sums[i] = get(r.g, of.grad, i) * get(r.g, of.grad, i);
            }
            int64_t left = length;
            for (; left % 2 == 0; left /= 2) /* halves all blocks at once; what is written was read before */
#pragma omp simd
                for (int64_t i = 0; i < count * left / 2; i++) sums[i] = sums[2 * i] + sums[2 * i + 1];
            for (int64_t b = 0; b < count && left > 1; b++) {
                float sum = 0;
                for (int64_t i = 0; i < left; i++) sum += sums[b * left + i];
                sums[b] = sum;
            }
            int large = 0;
            for (int64_t b = 0; b < count; b++) {
                scales[b] = beta2 * v[b * size] + rest * sums[b];
                large |= !(sums[b] <= FLT_MAX);
            }
            for (int64_t b = 0; b < count && large; b++)
                if (!(sums[b] <= FLT_MAX)) {
                    const double sum = sum_of_large_squares(at(r.g, of.grad, b * length), of.grad, length);
                    scales[b] = moved(s, v[b * size], sum / (double)length);
                }
            spread(v, scales, count, size);
        }
        for (int64_t b = 0; b < count; b++) sums[b] = scale_of(v[b * size], step_size, correction, eps);
        spread(scales, sums, count, length);
        descend_by_element(s, r, scales, count * length);
    }
}

/* Blocks of `size` rows of `columns`; with `given`, the second moments are new already. */
INLINE void blocks(const Step *s, const Task *task, Range next, Kind of, int given) {
    const int64_t t = task->tensor, length = task->size * task->columns;
    const float step_size = s->rates[t].step_size, correction = s->rates[t].root_correction, eps = (float)s->eps;
    for (int64_t b = 0; b < task->blocks; b++) {
        float *v = (float *)s->exp_avg_sqs[t] + task->row + b * task->size;
        const Range r = range_from(s, t, task->start + b * length, of);
        const float new = given ? v[0] : moved(s, v[0], sum_of_squares(r.g, of.grad, length) / (double)length);
        if (!given)
            for (int64_t row = 0; row < task->size; row++) v[row] = new;
        const Ahead ahead = {next, (task->blocks - b) * length, length < NEAR ? NEAR : FAR};
        descend(s, r, length, scale_of(new, step_size, correction, eps), ahead);
    }
}

/* Rows of elements with a second moment each, which stand there if they are `given`. */
INLINE void columns(const Step *s, const Task *task, Kind of, int given) {
    const int64_t t = task->tensor, length = task->columns;
    const float step_size = s->rates[t].step_size, correction = s->rates[t].root_correction, eps = (float)s->eps;
    const float beta2 = (float)s->beta2, rest = (float)(1 - s->beta2);
    float scales[TILE];
    for (int64_t row = 0; row < task->blocks; row++)
        for (int64_t column = 0; column < length; column += TILE) {
            const int64_t count = length - column < TILE ? length - column : TILE;
            const Range r = range_from(s, t, task->start + row * length + column, of);
            float *v = (float *)s->exp_avg_sqs[t] + task->row + column;
            for (int64_t i = 0; i < count && !given; i++) {
                const float g = get(r.g, of.grad, i);
                v[i] = beta2 * v[i] + rest * g * g; /* as AdamW: the square alone may be too large */
            }
            for (int64_t i = 0; i < count; i++) scales[i] = scale_of(v[i], step_size, correction, eps);
            descend_by_element(s, r, scales, count);
        }
}

INLINE void perform(const Step *s, const Task *task, const Task *after, Kind of) {
    const int is_short = task->size * task->columns < SHORT;
    const int given = task->kind == ROWS || task->kind == COLUMNS;
    const Range next = range_from(s, after->tensor, after->start, of);
    switch (task->kind) {
    case BLOCKS:
    case ROWS: is_short ? short_blocks(s, task, next, of, given) : blocks(s, task, next, of, given); break;
    case COLUMNS:
    case ELEMENTS: columns(s, task, of, given); break;
    case SUMS:
        s->partial[task->slot] =
            sum_of_squares(at(s->grads[task->tensor], of.grad, task->start), of.grad, task->columns);
        break;
    }
}

INLINE void specialised(const Step *s, const Task *task, const Task *after) {
    const Kind of = s->kinds[task->tensor];
#define CASE(P, G, M) if (of.param == P && of.grad == G && of.exp_avg == M) perform(s, task, after, (Kind){P, G, M, 0})
    CASE(FLOAT32, FLOAT32, FLOAT32);
    else CASE(BFLOAT16, BFLOAT16, BFLOAT16);
    else CASE(BFLOAT16, BFLOAT16, FLOAT32);
    else CASE(BFLOAT16_STOCHASTIC, BFLOAT16, BFLOAT16);
    else CASE(BFLOAT16_STOCHASTIC, BFLOAT16, FLOAT32);
    else CASE(FLOAT16, FLOAT16, FLOAT16);
    else perform(s, task, after, of);
}

/* The tasks of one phase, taken by whatever thread is free. */
INLINE void work_through(Work *work) {
    const Step *s = work->step;
    for (int64_t i; (i = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < work->count;)
        specialised(s, work->tasks + i, work->tasks + (i + work->threads < work->count ? i + work->threads : i));
}

/* The same for each width of registers. Without fused multiply-add, which rounds otherwise. */
typedef void Version(void *);
static void plain(void *work) { work_through(work); }
#if defined(__x86_64__)
__attribute__((target("avx2"))) static void avx2(void *work) { work_through(work); }
#if defined(__clang__)
#define WIDE
#else
#define WIDE ",prefer-vector-width=512" /* of which Clang has no name, and which GCC must be told */
#endif
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq" WIDE))) static void avx512(void *work) { work_through(work); }
/* Asked of the processor itself: __builtin_cpu_supports finds nothing where Zig compiles. */
static Version *find_widest(void) {
    const unsigned all = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
    unsigned a, b, c, d, kept = 0; /* registers that the system keeps for a process */
    if (__get_cpuid(1, &a, &b, &c, &d) && c & bit_OSXSAVE) __asm__("xgetbv" : "=a"(kept), "=d"(d) : "c"(0));
    has_halves = (kept & 0x6) == 0x6 && c & bit_F16C;
    if ((kept & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return plain;
    return (kept & 0xe6) == 0xe6 && (b & all) == all ? avx512 : avx2;
}
static Version *widest(void) {
    static Version *found; /* finding it takes a virtual machine long */
    Version *version = __atomic_load_n(&found, __ATOMIC_RELAXED);
    if (!version) __atomic_store_n(&found, version = find_widest(), __ATOMIC_RELAXED);
    return version;
}
#else
static Version *widest(void) { return plain; }
#endif

static void run(const Step *s, const Task *tasks, int64_t count, unsigned threads, Parallel parallel) {
    if (count < threads) threads = (unsigned)count;
    Work work = {s, tasks, count, 0, parallel ? threads : 1};
    if (parallel && threads > 1)
        parallel(widest(), &work, threads, 0);
    else
        widest()(&work);
}

/* One step of all tensors. `parallel` runs a function in that many threads of torch's own OpenMP; or is null. */
void adam_mini_step(const Step *s, unsigned threads, Parallel parallel) {
    double taken = -1;
    Rates rates = {0};
    for (int64_t t = 0; t < s->tensors; t++) {
        float *step = (float *)s->steps[t];
        *step += 1;
        if (*step != taken) {
            taken = *step;
            rates.step_size = (float)(s->lr / (1 - pow(s->beta1, taken)));
            rates.root_correction = (float)sqrt(1 - pow(s->beta2, taken));
        }
        rates.key = mixed((uint32_t)s->kinds[t].seed + 0x9E3779B9u * (uint32_t)(int64_t)taken);
        s->rates[t] = rates;
    }
    run(s, s->sums, s->num_sums, threads, parallel);
    for (const Task *task = s->moments; task < s->moments + s->num_moments; task++) {
        float *v = (float *)s->exp_avg_sqs[task->tensor] + task->row;
        double total = 0;
        for (int64_t i = 0; i < task->blocks; i++) total += s->partial[task->slot + i];
        const float new = moved(s, v[0], total / (double)(task->size * task->columns));
        for (int64_t row = 0; row < task->size; row++) v[row] = new;
    }
    run(s, s->updates, s->num_updates, threads, parallel);
}

/* Asks for memory that is about to be read. */
void adam_mini_prefetch(const uintptr_t *addresses, int64_t count) {
    for (int64_t i = 0; i < count; i++) __builtin_prefetch((const void *)addresses[i]);
}

/* Whether a tensor is contiguous, and of a dtype and shape. */
static int is_like(const Step *s, const uintptr_t *tensor, int64_t dtype, int64_t axes, const int64_t *extents) {
    int32_t its_dtype;
    int64_t its_axes, *its_extents, *its_strides, elements = 1, stride = 1;
    if (s->dtype(tensor, &its_dtype) || s->dim(tensor, &its_axes) || its_dtype != dtype || its_axes != axes) return 0;
    if (s->sizes(tensor, &its_extents) || s->strides(tensor, &its_strides)) return 0;
    for (int64_t axis = 0; axis < axes; elements *= extents[axis++])
        if (its_extents[axis] != extents[axis]) return 0;
    for (int64_t axis = axes; elements && axis--; stride *= extents[axis])
        if (extents[axis] != 1 && its_strides[axis] != stride) return 0;
    return 1;
}

/* Notes where the gradients of a step are, of which handles are given, like those of the parameters. Tells whether all
 * is what and where it was: memory may be another's, or of another shape, under the same object. */
int adam_mini_holds(const Step *s, const uintptr_t *params, const uintptr_t *grads) {
    int holds = 1;
    const int64_t *shape = s->shapes;
    for (int64_t t = 0; t < s->tensors; t++, shape += 3 + shape[2])
        holds &= is_like(s, params + t, shape[0], shape[2], shape + 3) &&
                 is_like(s, grads + t, shape[1], shape[2], shape + 3) && !s->data_ptr(grads + t, s->grads + t) &&
                 (s->grads[t] || !s->params[t]); /* some tensors have no memory of their own */
    for (int64_t i = 0; i < 4 * s->tensors; i++) holds &= s->address_of(s->written[i]) == (void *)s->params[i];
    return holds;
}
