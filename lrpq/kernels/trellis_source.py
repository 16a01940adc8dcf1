"""CUDA C++ of `lrpq.kernels.trellis_cuda`: a block of threads goes down a segment, column after column.

A thread has ``EACH`` histories, and of each the ``SYMBOLS`` states that become it: their values stay in its registers,
and from row to row it reads what the histories that lead to them cost. Those, and which symbol left each history, are
in the multiprocessor's shared memory, which makes the way back, a read for every row that waits for the one before it,
short. (x - v)^2 w is w v^2 - 2 w x v + w x^2: two operations a state, and one a history.
"""

SOURCE = r"""
constexpr int STATES = 4096;
constexpr int ROWS = 128;                                     // of a segment, at most
constexpr int SYMBOLS = 1 << BITS;
constexpr int KEPT = STATES >> BITS;                          // histories: states without their oldest symbol
constexpr int MIDDLES = KEPT >> BITS;                         // histories without their own oldest symbol
constexpr int EACH = KEPT / THREADS;
constexpr int OWN_MIDDLES = EACH > SYMBOLS ? EACH / SYMBOLS : 1;
constexpr int SHARE = ROWS / THREADS;                         // rows of a thread
constexpr int WARPS = THREADS / 32;
constexpr int LEAF = 16;                                      // columns whose errors go to all later ones at once
constexpr unsigned ALL = 0xffffffffu;
#if BITS < 4
typedef unsigned short Note;                                  // the symbols that leave a thread's histories
#else
typedef unsigned char Note;
#endif
typedef unsigned long long Key;
static_assert(EACH * THREADS == KEPT && EACH * BITS <= 8 * sizeof(Note) && SHARE * THREADS == ROWS, "threads");

struct Shared {
    float cost[2][KEPT];
    Note back[ROWS][THREADS];
    float4 terms[ROWS];                                       // w, -2 w x, w x^2
    short found[ROWS];
    Key least[WARPS];
    float sums[WARPS];
};

// Down some rows from `start`, around the end; the state of least cost, among those of the history `meet` where that is
// none of -1, with which it then began, too.
__device__ __forceinline__ int walk(Shared& shared, const float (&value)[EACH][SYMBOLS], int start, int steps, int rows,
                                    int meet)
{
    const int thread = threadIdx.x, first = thread * EACH, middle = first / SYMBOLS;
    for (int history = thread; history < KEPT; history += THREADS)
        shared.cost[0][history] = meet < 0 || history == meet ? 0.f : 1e30f;
    int at = start, now = 0;
    __syncthreads();
    float4 here = shared.terms[at];
    for (int i = 1; i < steps; ++i) {
        at = at + 1 == rows ? 0 : at + 1;
        float before[OWN_MIDDLES][SYMBOLS];
        #pragma unroll
        for (int oldest = 0; oldest < SYMBOLS; ++oldest)
            #pragma unroll
            for (int m = 0; m < OWN_MIDDLES; ++m)
                before[m][oldest] = shared.cost[now][oldest * MIDDLES + middle + m] + here.z;
        float least_of[EACH];
        unsigned note = 0;
        #pragma unroll
        for (int e = 0; e < EACH; ++e) {
            int least = 0x7fffffff;                           // floats that are not negative compare as their bits do
            #pragma unroll
            for (int oldest = 0; oldest < SYMBOLS; ++oldest) {
                const float v = value[e][oldest];
                const float cost = fmaf(v, fmaf(here.x, v, here.y), before[OWN_MIDDLES > 1 ? e / SYMBOLS : 0][oldest]);
                least = min(least, (__float_as_int(cost) & -SYMBOLS) | oldest);
            }
            least_of[e] = __int_as_float(least & -SYMBOLS);
            note |= (unsigned)(least & (SYMBOLS - 1)) << (BITS * e);
        }
        here = shared.terms[at];
        now ^= 1;
        #pragma unroll
        for (int e = 0; e < EACH; ++e) shared.cost[now][first + e] = least_of[e];
        shared.back[i][thread] = (Note)note;
        __syncthreads();
    }
    Key least = ~0ull;
    #pragma unroll
    for (int e = 0; e < EACH; ++e)
        #pragma unroll
        for (int oldest = 0; oldest < SYMBOLS; ++oldest) {
            const float v = value[e][oldest];
            const int history = oldest * MIDDLES + middle + (OWN_MIDDLES > 1 ? e / SYMBOLS : 0);
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
    const int shared = state >> BITS;
    return shared + KEPT * ((back[shared / EACH] >> (BITS * (shared % EACH))) & (SYMBOLS - 1));
}

// x and its weight are those of the thread's rows; the states that are found are left in shared memory.
__device__ __forceinline__ void round_column(Shared& shared, const float (&value)[EACH][SYMBOLS],
                                             const float (&x)[SHARE], const float (&weight)[SHARE], int rows, int edge)
{
    const int thread = threadIdx.x;
    float sum = 0.f;
    #pragma unroll
    for (int p = 0; p < SHARE; ++p) sum += weight[p];
    #pragma unroll
    for (int other = 16; other; other >>= 1) sum += __shfl_xor_sync(ALL, sum, other);
    if (thread % 32 == 0) shared.sums[thread / 32] = sum;
    __syncthreads();
    float total = 0.f;
    #pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += shared.sums[warp];
    const float share = total > 0.f ? rows / total : 1.f;
    #pragma unroll
    for (int p = 0; p < SHARE; ++p) {
        const float w = weight[p] * share;
        shared.terms[thread + p * THREADS] = make_float4(w, -2.f * w * x[p], w * x[p] * x[p], 0.f);
    }
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

__device__ __forceinline__ void load(float (&value)[EACH][SYMBOLS], const float* book)
{
    #pragma unroll
    for (int e = 0; e < EACH; ++e)
        #pragma unroll
        for (int oldest = 0; oldest < SYMBOLS; ++oldest)
            value[e][oldest] = book[oldest * KEPT + threadIdx.x * EACH + e];
}

__device__ __forceinline__ float clamped(float x) { return fminf(fmaxf(x, -FARTHEST), FARTHEST); }

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
    float value[EACH][SYMBOLS];
    load(value, book);
    for (int leaf = begin; leaf < end; leaf += LEAF) {
    const int leaf_end = min(leaf + LEAF, end);
    for (int k = leaf; k < leaf_end; ++k) {
        float x[SHARE], weight[SHARE], s[SHARE];
        #pragma unroll
        for (int p = 0; p < SHARE; ++p) {
            const int row = threadIdx.x + p * THREADS;
            x[p] = weight[p] = s[p] = 0.f;
            if (row < here) {
                const float* own = T + top + row;
                const float target = own[k * rows] + fed(R, R_row, R_column, own, rows, leaf, k, k);
                s[p] = S[runs[k] * rows + top + row];
                weight[p] = weights[top + row] * s[p] * s[p];
                x[p] = clamped(target / s[p]);
            }
        }
        round_column(shared, value, x, weight, here, edge);
        #pragma unroll
        for (int p = 0; p < SHARE; ++p) {
            const int row = threadIdx.x + p * THREADS;
            if (row < here) {
                const int state = shared.found[row];
                const long long place = k * rows + top + row;
                T[place] = fmaf(-book[state], s[p], W[place]);
                codes[place] = (signed char)((state & (SYMBOLS - 1)) - SYMBOLS / 2);
            }
        }
    }
    if (leaf_end == leaf + LEAF)
        #pragma unroll
        for (int p = 0; p < SHARE; ++p) {
            const int row = threadIdx.x + p * THREADS;
            if (row < here) feed(R, R_row, R_column, T + top + row, rows, leaf, end);
        }
    }
}

// All columns of all segments, whose blocks of rows move the later ones' targets, a leaf behind each other. A
// segment takes a number when it begins, and waits for such as have taken theirs before it alone: they are running or
// done. `moved` has a row's columns side by side, `pitch` for each row.
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
    const float* pull = pulls + place_of[4] + (top - chunk);      // [rows that move, rows that are moved]
    float value[EACH][SYMBOLS];
    load(value, book);
    for (int leaf = 0; leaf < columns; leaf += LEAF) {
        const int leaf_end = leaf + LEAF < columns ? leaf + LEAF : (int)columns;
        for (int other = waits_from + threadIdx.x; other < waits_to; other += THREADS) {
            int columns_done;
            do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(columns_done) : "l"(done + other) : "memory");
            while (columns_done < leaf_end);
        }
        __syncthreads();
        #pragma unroll
        for (int p = 0; p < SHARE; ++p) {
            const int row = threadIdx.x + p * THREADS;
            if (row < here && rows_before) {
                float pulled[LEAF];
                #pragma unroll
                for (int i = 0; i < LEAF; ++i) pulled[i] = 0.f;
                const float* others = moved + (long long)chunk * pitch + leaf;
                #pragma unroll 8
                for (int r = 0; r < rows_before; ++r) {
                    const float by = pull[r * chunk_rows + row];
                    #pragma unroll
                    for (int i = 0; i < LEAF; i += 4) {  // past this multiprocessor's cache: others have written them
                        const float4 m = __ldcg((const float4*)(others + r * pitch + i));
                        pulled[i] = fmaf(by, m.x, pulled[i]);
                        pulled[i + 1] = fmaf(by, m.y, pulled[i + 1]);
                        pulled[i + 2] = fmaf(by, m.z, pulled[i + 2]);
                        pulled[i + 3] = fmaf(by, m.w, pulled[i + 3]);
                    }
                }
                #pragma unroll
                for (int i = 0; i < LEAF; ++i) if (leaf + i < columns) {
                    const long long place = (leaf + i) * rows + top + row;
                    moved[(top + row) * pitch + leaf + i] = W[place];
                    W[place] += pulled[i];
                }
            } else if (row < here)
                for (int k = leaf; k < leaf_end; ++k) moved[(top + row) * pitch + k] = W[k * rows + top + row];
        }
        for (int k = leaf; k < leaf_end; ++k) {
            float x[SHARE], weight[SHARE], s[SHARE];
            #pragma unroll
            for (int p = 0; p < SHARE; ++p) {
                const int row = threadIdx.x + p * THREADS;
                x[p] = weight[p] = s[p] = 0.f;
                if (row < here) {
                    const long long own = top + row;
                    const float target = W[k * rows + own] + errors[k * rows + own]
                        + fed(R, R_row, R_column, errors + own, rows, leaf, k, k);
                    s[p] = S[runs[k] * rows + own];
                    weight[p] = weights[own] * s[p] * s[p];
                    x[p] = clamped(target / s[p]);
                }
            }
            round_column(shared, value, x, weight, here, edge);
            #pragma unroll
            for (int p = 0; p < SHARE; ++p) {
                const int row = threadIdx.x + p * THREADS;
                if (row < here) {
                    const int state = shared.found[row];
                    const long long place = k * rows + top + row, in_row = (top + row) * pitch + k;
                    errors[place] = fmaf(-book[state], s[p], W[place]);
                    moved[in_row] = fmaf(-book[state], s[p], moved[in_row]);
                    codes[place] = (signed char)((state & (SYMBOLS - 1)) - SYMBOLS / 2);
                }
            }
        }
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0)
            asm volatile("st.release.gpu.global.s32 [%0], %1;" :: "l"(done + segment), "r"(leaf_end) : "memory");
        if (leaf_end == leaf + LEAF)
            #pragma unroll
            for (int p = 0; p < SHARE; ++p) {
                const int row = threadIdx.x + p * THREADS;
                if (row < here) feed(R, R_row, R_column, errors + top + row, rows, leaf, columns);
            }
    }
}
"""
