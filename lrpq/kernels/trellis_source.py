"""CUDA C++ of `lrpq.kernels.trellis_cuda`: a block of threads goes down a segment, column after column.

A thread has ``EACH`` histories, and of each the ``SYMBOLS`` states that become it, or half of them: their values stay
in its registers, and from row to row it reads what the histories that lead to them cost. Those, and which symbol left
each history, are in the multiprocessor's shared memory, which makes the way back, a read for every row that waits for
the one before it, short. (x - v)^2 w is w v^2 - 2 w x v + w x^2: two operations a state, and one a history.

Outside of that a thread has a row. Errors go to the columns to the right sixteen at a time, as do those of other blocks
of rows: what is read for one column serves all sixteen.
"""

SOURCE = r"""
// Macros: BITS; THREADS of a block; ROWS of a segment, at most; EDGE, rows on either side of its end; LEAF, columns
// whose errors go to all later ones at once; FARTHEST, where a target is cut.
constexpr int STATES = 4096;
constexpr int SYMBOLS = 1 << BITS;
constexpr int KEPT = STATES >> BITS;                          // histories: states without their oldest symbol
constexpr int MIDDLES = KEPT >> BITS;                         // histories without their own oldest symbol
constexpr int PARTS = THREADS > KEPT ? THREADS / KEPT : 1;    // threads that share a history, by its oldest symbols
constexpr int EACH = KEPT * PARTS / THREADS;
constexpr int OLDEST = SYMBOLS / PARTS;
constexpr int OWN_MIDDLES = EACH > SYMBOLS ? EACH / SYMBOLS : 1;
constexpr int WARPS = THREADS / 32;
constexpr int TILE = THREADS * 4 / LEAF;                      // rows of other blocks that are read at once
constexpr unsigned ALL = 0xffffffffu;
#if BITS < 4
typedef unsigned short Note;                                  // the symbols that leave a thread's histories
#else
typedef unsigned char Note;
#endif
typedef unsigned long long Key;
static_assert(EACH * THREADS == KEPT * PARTS && PARTS <= 2 && EACH * BITS <= 8 * sizeof(Note), "threads");
static_assert(THREADS == ROWS && LEAF % 4 == 0 && THREADS * 4 % LEAF == 0, "rows and leaves");

struct Shared {
    float cost[2][KEPT];
    Note back[ROWS][THREADS / PARTS];
    float4 terms[ROWS];                                       // w, -2 w x, w x^2
    float4 others[THREADS];                                   // a leaf of TILE rows of other blocks
    short found[ROWS];
    Key least[WARPS];
    float sums[WARPS];
    int mask[32];                                             // -SYMBOLS, which the compiler must not know
};

// A constant in every lane's own register: with another one that an instruction holds, one operation clears a cost's
// last bits and notes a symbol there. Two constants make it two.
__device__ __forceinline__ void prepare(Shared& shared)
{
    if (threadIdx.x < 32) *(volatile int*)&shared.mask[threadIdx.x] = -SYMBOLS;
    __syncthreads();
}

// Down some rows from `start`, around the end; the state of least cost. Where `meet` is not -1, among those of that
// history, with which it also begins.
__device__ __forceinline__ int walk(Shared& shared, const float (&value)[EACH][OLDEST], int start, int steps, int rows,
                                    int meet)
{
    const int thread = threadIdx.x, first = thread / PARTS * EACH, middle = first / SYMBOLS;
    const int part = PARTS > 1 ? thread % PARTS * OLDEST : 0;     // its first oldest symbol
    for (int history = thread; history < KEPT; history += THREADS)
        shared.cost[0][history] = meet < 0 || history == meet ? 0.f : 1e30f;
    const int mask = shared.mask[thread % 32];
    int at = start + mask + SYMBOLS, now = 0;
    __syncthreads();
    float4 here = shared.terms[at];
    for (int i = 1; i < steps; ++i) {
        at = at + 1 == rows ? 0 : at + 1;
        float before[OWN_MIDDLES][OLDEST];
        #pragma unroll
        for (int o = 0; o < OLDEST; ++o)
            #pragma unroll
            for (int m = 0; m < OWN_MIDDLES; ++m)
                before[m][o] = shared.cost[now][(part + o) * MIDDLES + middle + m] + here.z;
        float least_of[EACH];
        unsigned note = 0;
        #pragma unroll
        for (int e = 0; e < EACH; ++e) {
            int least = 0x7fffffff;                           // floats that are not negative compare as their bits do
            #pragma unroll
            for (int o = 0; o < OLDEST; ++o) {
                const float v = value[e][o];
                const float cost = fmaf(v, fmaf(here.x, v, here.y), before[OWN_MIDDLES > 1 ? e / SYMBOLS : 0][o]);
                least = min(least, (__float_as_int(cost) & mask) | o);
            }
            if (PARTS > 1) {
                least += part;                                // below the mask, where there is room for it
                least = min(least, __shfl_xor_sync(ALL, least, 1));
            }
            least_of[e] = __int_as_float(least & mask);
            note |= (unsigned)(least & (SYMBOLS - 1)) << (BITS * e);
        }
        here = shared.terms[at];
        now ^= 1;
        #pragma unroll
        for (int e = 0; e < EACH; ++e) shared.cost[now][first + e] = least_of[e];
        shared.back[i][thread / PARTS] = (Note)note;
        __syncthreads();
    }
    Key least = ~0ull;
    #pragma unroll
    for (int e = 0; e < EACH; ++e)
        #pragma unroll
        for (int o = 0; o < OLDEST; ++o) {
            const float v = value[e][o];
            const int oldest = part + o, history = oldest * MIDDLES + middle + (OWN_MIDDLES > 1 ? e / SYMBOLS : 0);
            const float cost = fmaf(v, fmaf(here.x, v, here.y), shared.cost[now][history] + here.z);
            const Key key = (Key)__float_as_uint(fmaxf(cost, 0.f)) << 32 | (unsigned)(oldest * KEPT + first + e);
            if ((meet < 0 || first + e == meet) && key < least) least = key;
        }
    #pragma unroll
    for (int other = 16; other; other >>= 1) {
        const Key theirs = __shfl_xor_sync(ALL, least, other);
        least = theirs < least ? theirs : least;
    }
    if (thread % 32 == 0) shared.least[thread / 32] = least;
    __syncthreads();
    least = shared.least[0];
    #pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) least = shared.least[warp] < least ? shared.least[warp] : least;
    return (int)(least & 0xffffffffu);
}

// The state of the row above: what the state holds of it, and its oldest symbol as noted.
__device__ __forceinline__ int above(int state, const Note* back)
{
    const int history = state >> BITS;
    return history + KEPT * ((back[history / EACH] >> (BITS * (history % EACH))) & (SYMBOLS - 1));
}

// The state of the thread's row, which is to be x and has a weight of its own; rows behind the last one have none.
__device__ __forceinline__ int round_column(Shared& shared, const float (&value)[EACH][OLDEST], float x, float weight,
                                            int rows, int edge)
{
    const int thread = threadIdx.x;
    float sum = weight;
    #pragma unroll
    for (int other = 16; other; other >>= 1) sum += __shfl_xor_sync(ALL, sum, other);
    if (thread % 32 == 0) shared.sums[thread / 32] = sum;
    __syncthreads();
    float total = 0.f;
    #pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += shared.sums[warp];
    const float w = total > 0.f ? weight * (rows / total) : weight;
    shared.terms[thread] = make_float4(w, -2.f * w * x, w * x * x, 0.f);
    __syncthreads();
    // where the end meets the beginning, without a constraint: the history that both agree on
    int state = walk(shared, value, rows - edge, 2 * edge, rows, -1);
    for (int i = 2 * edge - 1; i >= edge; --i) state = above(state, shared.back[i]);
    const int meet = state & (KEPT - 1);
    __syncthreads();
    state = walk(shared, value, 0, rows, rows, meet);
    if (thread < 32)
        for (int row = rows - 1; row >= 0; --row) {
            if (thread == 0) shared.found[row] = (short)state;
            if (row) state = above(state, shared.back[row]);
        }
    __syncthreads();
    return shared.found[min(thread, rows - 1)];
}

// What errors of the columns `from` to `to` of one row add to the target of column k: R[j, k] errors[j].
__device__ __forceinline__ float fed(const float* R, long long R_row, long long R_column, const float* errors,
                                     long long rows, int from, int to, int k)
{
    float sums[4] = {0.f, 0.f, 0.f, 0.f};
    #pragma unroll 2
    for (int j = from; j < to; j += 4)
        #pragma unroll
        for (int i = 0; i < 4; ++i)
            if (j + i < to) sums[i] = fmaf(R[(j + i) * R_row + k * R_column], errors[(j + i) * rows], sums[i]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The same added to all columns behind a whole leaf, which begins at `from`: its errors stay in registers.
__device__ __forceinline__ void feed(const float* R, long long R_row, long long R_column, float* errors,
                                     long long rows, int from, int columns)
{
    float error[LEAF];
    #pragma unroll
    for (int i = 0; i < LEAF; ++i) error[i] = errors[(from + i) * rows];
    const bool side_by_side = R_row == 1 && R_column % 4 == 0 && (unsigned long long)(R + from) % 16 == 0;
    #pragma unroll 4
    for (int k = from + LEAF; k < columns; ++k) {
        float sum = errors[k * rows], other = 0.f;
        const float* own = R + from * R_row + k * R_column;
        #pragma unroll
        for (int i = 0; i < LEAF; i += 4) {
            float4 r;
            if (side_by_side)
                r = *(const float4*)(own + i);
            else
                r = make_float4(own[i * R_row], own[(i + 1) * R_row], own[(i + 2) * R_row], own[(i + 3) * R_row]);
            sum = fmaf(r.x, error[i], sum);
            other = fmaf(r.y, error[i + 1], other);
            sum = fmaf(r.z, error[i + 2], sum);
            other = fmaf(r.w, error[i + 3], other);
        }
        errors[k * rows] = sum + other;
    }
}

// What other blocks' rows add to a leaf of targets of the thread's row: pull[r, row] others[r].
__device__ __forceinline__ void add_others(Shared& shared, float (&target)[LEAF], const float* pull,
                                           long long chunk_rows, const float* others, long long pitch, int count,
                                           bool has_row)
{
    for (int first = 0; first < count; first += TILE) {
        const int own = first + threadIdx.x / (LEAF / 4);
        float4 leaf = make_float4(0.f, 0.f, 0.f, 0.f);
        // past this multiprocessor's cache: others have written it
        if (own < count) leaf = __ldcg((const float4*)(others + own * pitch) + threadIdx.x % (LEAF / 4));
        float by[TILE];
        #pragma unroll
        for (int r = 0; r < TILE; ++r) by[r] = has_row && first + r < count ? pull[(first + r) * chunk_rows] : 0.f;
        __syncthreads();
        shared.others[threadIdx.x] = leaf;
        __syncthreads();
        #pragma unroll
        for (int r = 0; r < TILE; ++r)
            #pragma unroll
            for (int i = 0; i < LEAF; i += 4) {
                const float4 m = shared.others[r * (LEAF / 4) + i / 4];
                target[i] = fmaf(by[r], m.x, target[i]);
                target[i + 1] = fmaf(by[r], m.y, target[i + 1]);
                target[i + 2] = fmaf(by[r], m.z, target[i + 2]);
                target[i + 3] = fmaf(by[r], m.w, target[i + 3]);
            }
    }
}

__device__ __forceinline__ void load(float (&value)[EACH][OLDEST], const float* book)
{
    const int part = PARTS > 1 ? threadIdx.x % PARTS * OLDEST : 0, first = threadIdx.x / PARTS * EACH;
    #pragma unroll
    for (int e = 0; e < EACH; ++e)
        #pragma unroll
        for (int o = 0; o < OLDEST; ++o) value[e][o] = book[(part + o) * KEPT + first + e];
}

__device__ __forceinline__ float clamped(float x) { return fminf(fmaxf(x, -FARTHEST), FARTHEST); }

__device__ __forceinline__ signed char code(int state) { return (signed char)((state & (SYMBOLS - 1)) - SYMBOLS / 2); }

// Some columns of every segment; errors of those before its first one are in T already.
extern "C" __global__ void __launch_bounds__(THREADS)
round_segments(float* T, const float* W, const float* S, const float* R, const float* weights, const long long* runs,
               const float* book, signed char* codes, const int* edges, const int* firsts, long long columns,
               long long most_columns, long long rows, long long R_row, long long R_column)
{
    __shared__ Shared shared;
    const int segment = blockIdx.x, begin = firsts[segment];
    if (begin < 0 || begin >= columns) return;
    const int end = begin + most_columns < columns ? begin + most_columns : columns;
    const int top = edges[segment], here = edges[segment + 1] - top, edge = min(here, EDGE);
    const bool has_row = threadIdx.x < here;
    const long long row = top + threadIdx.x;
    float value[EACH][OLDEST];
    prepare(shared);
    load(value, book);
    for (int leaf = begin; leaf < end; leaf += LEAF) {
        const int leaf_end = min(leaf + LEAF, end);
        for (int k = leaf; k < leaf_end; ++k) {
            const long long place = k * rows + row;
            float x = 0.f, weight = 0.f, s = 0.f;
            if (has_row) {
                s = S[runs[k] * rows + row];
                weight = weights[row] * s * s;
                x = clamped((T[place] + fed(R, R_row, R_column, T + row, rows, leaf, k, k)) / s);
            }
            const int state = round_column(shared, value, x, weight, here, edge);
            if (has_row) {
                T[place] = fmaf(-book[state], s, W[place]);
                codes[place] = code(state);
            }
        }
        if (has_row && leaf_end == leaf + LEAF) feed(R, R_row, R_column, T + row, rows, leaf, end);
    }
}

// All columns of all segments, whose blocks of rows move the later ones' targets, a leaf behind each other. A segment
// takes a number when it begins, and waits for such as have taken theirs before it alone: they are running or done.
// `moved` has a row's columns side by side, `pitch` for each row.
extern "C" __global__ void __launch_bounds__(THREADS)
round_blocks(float* W, float* moved, float* errors, const float* S, const float* R, const float* weights,
             const long long* runs, const float* book, signed char* codes, const int* edges, const float* pulls,
             const long long* places, int* done, long long columns, long long segments, long long rows,
             long long pitch, long long R_row, long long R_column)
{
    __shared__ Shared shared;
    __shared__ int number;
    if (threadIdx.x == 0) number = atomicAdd(done + segments, 1);
    __syncthreads();
    const int segment = number;
    const int top = edges[segment], here = edges[segment + 1] - top, edge = min(here, EDGE);
    const long long* place_of = places + 6 * segment;
    const int chunk = place_of[0], rows_before = place_of[1];     // first row of its chunk, and rows of earlier blocks
    const int waits_from = place_of[2], waits_to = place_of[3];   // segments of these
    const long long chunk_rows = place_of[5];
    const bool has_row = threadIdx.x < here;
    const long long row = top + threadIdx.x;
    const float* pull = pulls + place_of[4] + (row - chunk);      // [rows that move, rows that are moved]
    float* own = moved + row * pitch;
    float value[EACH][OLDEST];
    prepare(shared);
    load(value, book);
    for (int leaf = 0; leaf < columns; leaf += LEAF) {
        const int leaf_end = leaf + LEAF < columns ? leaf + LEAF : (int)columns;
        for (int other = waits_from + threadIdx.x; other < waits_to; other += THREADS) {
            int columns_done;
            do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(columns_done) : "l"(done + other) : "memory");
            while (columns_done < leaf_end);
        }
        __syncthreads();
        float target[LEAF];
        #pragma unroll
        for (int i = 0; i < LEAF; ++i) {
            target[i] = has_row && leaf + i < columns ? W[(leaf + i) * rows + row] : 0.f;
            if (has_row && leaf + i < columns) own[leaf + i] = target[i];
        }
        if (rows_before) {
            add_others(shared, target, pull, chunk_rows, moved + chunk * pitch + leaf, pitch, rows_before, has_row);
            #pragma unroll
            for (int i = 0; i < LEAF; ++i)
                if (has_row && leaf + i < columns) W[(leaf + i) * rows + row] = target[i];
        }
        for (int k = leaf; k < leaf_end; ++k) {
            const long long place = k * rows + row;
            float x = 0.f, weight = 0.f, s = 0.f;
            if (has_row) {
                s = S[runs[k] * rows + row];
                weight = weights[row] * s * s;
                x = clamped((W[place] + errors[place] + fed(R, R_row, R_column, errors + row, rows, leaf, k, k)) / s);
            }
            const int state = round_column(shared, value, x, weight, here, edge);
            if (has_row) {
                errors[place] = fmaf(-book[state], s, W[place]);
                own[k] = fmaf(-book[state], s, own[k]);
                codes[place] = code(state);
            }
        }
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0)
            asm volatile("st.release.gpu.global.s32 [%0], %1;" :: "l"(done + segment), "r"(leaf_end) : "memory");
        if (has_row && leaf_end == leaf + LEAF) feed(R, R_row, R_column, errors + row, rows, leaf, columns);
    }
}
"""
