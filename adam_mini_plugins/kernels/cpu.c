/* One step of Adam-mini on a CPU: what update.py defines, with each number read and written once.
 *
 * Plain C over raw pointers, loaded by cpu.py, which says what each tensor's tasks are. A tensor's elements are
 * copied in tiles to float32 where they are of another type; a block that is short enough to stay in the cache is
 * summed and updated at once, a long one in two phases. Sums of squares are added up in float64, in an order that
 * depends on the tensor alone: any number of threads gives the same bits.
 *
 * Built without -ffast-math, whose start-up code would change the floating-point mode of the whole process.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#define TILE 1024
#define SHORT 64

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

typedef struct {
    double lr, beta1, beta2, weight_decay, eps;
    int64_t maximize, tensors;
    const uintptr_t *params, *grads, *exp_avgs, *exp_avg_sqs, *steps; /* addresses */
    const Kind *kinds;
    Rates *rates;
    const Task *sums, *moments, *updates;
    int64_t num_sums, num_moments, num_updates;
    double *partial;
} Step;

typedef struct {
    const Step *step;
    const Task *tasks;
    int64_t count, next;
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

INLINE uint16_t to_bfloat(float x) {
    uint32_t u = bits_of(x);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

INLINE uint32_t mixed(uint32_t h) {
    h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
    h = (h ^ (h >> 13)) * 0xC2B2AE35u;
    return h ^ (h >> 16);
}

/* Rounds element `start + i` at random; rounding.py says how. */
INLINE void to_bfloat_stochastic(const float *x, uint16_t *out, int64_t n, int64_t start, uint32_t key) {
    uint32_t low = (uint32_t)start, high = mixed((uint32_t)(start >> 32)), next = mixed((uint32_t)(start >> 32) + 1);
    for (int64_t i = 0; i < n; i++) {
        uint32_t index = low + (uint32_t)i;
        uint32_t random = mixed((index * 0x9E3779B9u + key) ^ (index < low ? next : high)) >> 16;
        uint32_t u = bits_of(x[i]), size = u & 0x7fffffff;
        uint32_t rounded = size < 0x7f800000 ? u + random : u;
        out[i] = (uint16_t)(size > 0x7f800000 ? 0x7fc0 : rounded >> 16);
    }
}

/* The n elements from `start` on as float32: where they lie, or copied to the buffer. */
INLINE float *load(uintptr_t address, int64_t kind, int64_t start, int64_t n, float *buffer) {
    if (kind == FLOAT32) return (float *)address + start;
    const uint16_t *from = (const uint16_t *)address + start;
    if (kind == FLOAT16)
        for (int64_t i = 0; i < n; i++) buffer[i] = from_half(from[i]);
    else
        for (int64_t i = 0; i < n; i++) buffer[i] = float_of((uint32_t)from[i] << 16);
    return buffer;
}

INLINE void store(uintptr_t address, int64_t kind, int64_t start, int64_t n, const float *buffer, uint32_t key) {
    uint16_t *to = (uint16_t *)address + start;
    if (kind == FLOAT16)
        for (int64_t i = 0; i < n; i++) to[i] = to_half(buffer[i]);
    else if (kind == BFLOAT16)
        for (int64_t i = 0; i < n; i++) to[i] = to_bfloat(buffer[i]);
    else if (kind == BFLOAT16_STOCHASTIC)
        to_bfloat_stochastic(buffer, to, n, start, key);
}

/* The arithmetic. */

/* In float32 as far as it loses nothing that counts, a few squares a lane, and from there in float64. */
INLINE double sum_of_squares(const float *g, int64_t n) {
    double total = 0;
    while (n > 0) {
        const int64_t count = n < 256 ? n : 256;
        float part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t i = 0; i < count; i++) part += g[i] * g[i];
        total += part;
        g += count;
        n -= count;
    }
    return total;
}

INLINE float sum_of_few(const float *g, int64_t n) {
    float even = 0, odd = 0;
    for (int64_t i = 0; i + 1 < n; i += 2) {
        even += g[i] * g[i];
        odd += g[i + 1] * g[i + 1];
    }
    return even + odd + (n % 2 ? g[n - 1] * g[n - 1] : 0);
}

INLINE double sum_over(const Step *s, int64_t t, int64_t start, int64_t n) {
    float buffer[TILE];
    double total = 0;
    for (int64_t end = start + n; start < end; start += TILE) {
        int64_t count = end - start < TILE ? end - start : TILE;
        total += sum_of_squares(load(s->grads[t], s->kinds[t].grad, start, count, buffer), count);
    }
    return total;
}

INLINE float moved(const Step *s, float v, double mean) { return (float)(s->beta2 * v + (1 - s->beta2) * mean); }

INLINE float scale_of(float v, float step_size, float correction, float eps) {
    return step_size / (sqrtf(v) / correction + eps);
}

/* One tile: its elements as float32, in place or in buffers. */
typedef struct {
    float *p, *g, *m, buffers[3][TILE + 48];
} Tile;

INLINE void open_tile(Tile *tile, const Step *s, int64_t t, int64_t start, int64_t n) {
    tile->p = load(s->params[t], s->kinds[t].param, start, n, tile->buffers[0]);
    tile->g = load(s->grads[t], s->kinds[t].grad, start, n, tile->buffers[1]);
    tile->m = load(s->exp_avgs[t], s->kinds[t].exp_avg, start, n, tile->buffers[2]);
}

INLINE void close_tile(const Tile *tile, const Step *s, int64_t t, int64_t start, int64_t n) {
    store(s->params[t], s->kinds[t].param, start, n, tile->p, s->rates[t].key);
    store(s->exp_avgs[t], s->kinds[t].exp_avg, start, n, tile->m, 0);
}

/* As torch's lerp: from the end that is nearer, so that beta1 = 0 leaves nothing of the momentum. */
#define AVERAGED(m, g) (weight < 0.5f ? (m) + weight * ((g) - (m)) : (g) - rest * ((g) - (m)))

INLINE void descend(const Step *s, float *restrict p, const float *restrict g, float *restrict m, int64_t n,
                    float scale) {
    const float sign = s->maximize ? -1.0f : 1.0f, decay = (float)(1 - s->lr * s->weight_decay);
    const float weight = (float)(1 - s->beta1), rest = (float)s->beta1;
    for (int64_t i = 0; i < n; i++) {
        m[i] = AVERAGED(m[i], sign * g[i]);
        p[i] = decay * p[i] - scale * m[i];
    }
}

INLINE void descend_by_element(const Step *s, float *restrict p, const float *restrict g, float *restrict m,
                               const float *restrict scales, int64_t n) {
    const float sign = s->maximize ? -1.0f : 1.0f, decay = (float)(1 - s->lr * s->weight_decay);
    const float weight = (float)(1 - s->beta1), rest = (float)s->beta1;
    for (int64_t i = 0; i < n; i++) {
        m[i] = AVERAGED(m[i], sign * g[i]);
        p[i] = decay * p[i] - scales[i] * m[i];
    }
}

/* Blocks of `size` rows of `columns`; with `given`, the second moments are new already. */
INLINE void blocks(const Step *s, const Task *task, int given) {
    const int64_t t = task->tensor, length = task->size * task->columns;
    const float step_size = s->rates[t].step_size, correction = s->rates[t].root_correction, eps = (float)s->eps;
    float *v = (float *)s->exp_avg_sqs[t] + task->row;
    Tile tile;
    if (length < SHORT) { /* loops over so few elements would cost more than what they do */
        const int64_t at_once = TILE / length;
        float scales[TILE], of_elements[TILE];
        for (int64_t first = 0; first < task->blocks; first += at_once) {
            const int64_t count = task->blocks - first < at_once ? task->blocks - first : at_once;
            const int64_t start = task->start + first * length;
            float *of_rows = v + first * task->size;
            open_tile(&tile, s, t, start, count * length);
            for (int64_t b = 0; b < count; b++) {
                const float old = of_rows[b * task->size];
                scales[b] = given ? old : moved(s, old, sum_of_few(tile.g + b * length, length) / (double)length);
                if (!given)
                    for (int64_t row = 0; row < task->size; row++) of_rows[b * task->size + row] = scales[b];
            }
            for (int64_t b = 0; b < count; b++) scales[b] = scale_of(scales[b], step_size, correction, eps);
            for (int64_t b = 0; b < count; b++)
                for (int64_t i = 0; i < length; i++) of_elements[b * length + i] = scales[b];
            descend_by_element(s, tile.p, tile.g, tile.m, of_elements, count * length);
            close_tile(&tile, s, t, start, count * length);
        }
        return;
    }
    if (length <= TILE) { /* whole blocks, as many as go into a tile */
        const int64_t at_once = TILE / length;
        for (int64_t first = 0; first < task->blocks; first += at_once) {
            const int64_t count = task->blocks - first < at_once ? task->blocks - first : at_once;
            const int64_t start = task->start + first * length;
            open_tile(&tile, s, t, start, count * length);
            for (int64_t b = 0; b < count; b++) {
                float *of_rows = v + (first + b) * task->size, *g = tile.g + b * length;
                const float new = given ? of_rows[0] : moved(s, of_rows[0], sum_of_squares(g, length) / (double)length);
                if (!given)
                    for (int64_t row = 0; row < task->size; row++) of_rows[row] = new;
                descend(s, tile.p + b * length, g, tile.m + b * length, length,
                        scale_of(new, step_size, correction, eps));
            }
            close_tile(&tile, s, t, start, count * length);
        }
        return;
    }
    for (int64_t b = 0; b < task->blocks; b++) {
        float *of_rows = v + b * task->size;
        int64_t start = task->start + b * length;
        const int64_t end = start + length;
        const float new = given ? of_rows[0] : moved(s, of_rows[0], sum_over(s, t, start, length) / (double)length);
        if (!given)
            for (int64_t row = 0; row < task->size; row++) of_rows[row] = new;
        const float scale = scale_of(new, step_size, correction, eps);
        for (; start < end; start += TILE) {
            const int64_t count = end - start < TILE ? end - start : TILE;
            open_tile(&tile, s, t, start, count);
            descend(s, tile.p, tile.g, tile.m, count, scale);
            close_tile(&tile, s, t, start, count);
        }
    }
}

INLINE void columns(const Step *s, const Task *task, int given) {
    const int64_t t = task->tensor, length = task->columns;
    const float step_size = s->rates[t].step_size, correction = s->rates[t].root_correction, eps = (float)s->eps;
    float scales[TILE];
    Tile tile;
    for (int64_t row = 0; row < task->blocks; row++)
        for (int64_t column = 0; column < length; column += TILE) {
            const int64_t count = length - column < TILE ? length - column : TILE;
            const int64_t start = task->start + row * length + column;
            float *v = (float *)s->exp_avg_sqs[t] + task->row + column;
            open_tile(&tile, s, t, start, count);
            if (!given) {
                const float beta2 = (float)s->beta2, rest = (float)(1 - s->beta2);
                const float *g = tile.g;
                for (int64_t i = 0; i < count; i++) v[i] = beta2 * v[i] + rest * (g[i] * g[i]);
            }
            for (int64_t i = 0; i < count; i++) scales[i] = scale_of(v[i], step_size, correction, eps);
            descend_by_element(s, tile.p, tile.g, tile.m, scales, count);
            close_tile(&tile, s, t, start, count);
        }
}

/* The tasks of one phase, taken by whatever thread is free. */
INLINE void work_through(Work *work) {
    const Step *s = work->step;
    for (int64_t i; (i = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < work->count;) {
        const Task *task = work->tasks + i;
        switch (task->kind) {
        case BLOCKS: blocks(s, task, 0); break;
        case ROWS: blocks(s, task, 1); break;
        case COLUMNS: columns(s, task, 1); break;
        case ELEMENTS: columns(s, task, 0); break;
        case SUMS: s->partial[task->slot] = sum_over(s, task->tensor, task->start, task->columns); break;
        }
    }
}

/* The same for each width of registers. Without fused multiply-add, which rounds otherwise. */
typedef void Version(void *);
static void plain(void *work) { work_through(work); }
#if defined(__x86_64__)
__attribute__((target("avx2"))) static void avx2(void *work) { work_through(work); }
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) static void avx512(void *work) { work_through(work); }
static Version *widest(void) {
#define HAS __builtin_cpu_supports
    if (HAS("avx512f") && HAS("avx512bw") && HAS("avx512vl") && HAS("avx512dq")) return avx512;
    return HAS("avx2") ? avx2 : plain;
}
#else
static Version *widest(void) { return plain; }
#endif

static void run(const Step *s, const Task *tasks, int64_t count, unsigned threads, Parallel parallel) {
    Work work = {s, tasks, count, 0};
    if (parallel && threads > 1 && count > 1)
        parallel(widest(), &work, (int64_t)threads < count ? threads : (unsigned)count, 0);
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
